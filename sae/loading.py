"""Getting a Hugging Face model and its tokenizer from a hub name, a folder or an object, ready for analysis.

1. Find the device and the number type.
2. Load, or take what was given; put it in evaluation mode and freeze all parameters.
3. Load the tokenizer beside it, unless one was given.
4. `fingerprint` says whether two models are the same, in any number type.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sae.errors import UserError, near_paths, unknown
from sae.hub import hub_reachable
from sae.sites import model_type

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
FULL_PRECISION_PARAMETERS = 2_000_000_000  # up to this many, dtype "auto" on CUDA is float32 as it is elsewhere
POSITION_LIMITS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
SAMPLED_VALUES = 64  # of each parameter, for the fingerprint


def resolve_device(device: str | torch.device) -> torch.device:
    """A device by name, the best there is for auto."""
    return auto_device() if device == "auto" else _device(device)


def auto_device() -> torch.device:
    """CUDA if there is one, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def load_hf(
    model: str | Path | nn.Module, *, tokenizer: Any, device: str | torch.device, dtype: str | torch.dtype
) -> tuple[nn.Module, Any, str]:
    """The model in evaluation mode with frozen parameters, its tokenizer or None, and a name for both.

    An object keeps its device and number type where these are "auto". A loaded model goes to `auto_device()`; its
    weights become float32, but stay as stored on a GPU from two billion parameters on.
    """
    wanted = _dtype(dtype)
    if isinstance(model, nn.Module):
        hf, name = model, getattr(getattr(model, "config", None), "_name_or_path", "")
        if device != "auto":
            hf.to(_device(device))
        if wanted is not None:
            hf.to(wanted)
    else:
        name, place = str(model), resolve_device(device)
        hf = _load_model(name, wanted)  # asked for when loading, for a later cast would round rotary frequencies too
        n_parameters = sum(parameter.numel() for parameter in hf.parameters())
        if wanted is None and (place.type != "cuda" or n_parameters < FULL_PRECISION_PARAMETERS):
            hf.to(torch.float32)
        hf.to(place)
    hf.eval().requires_grad_(False)
    if tokenizer is None and name:
        tokenizer = _load_tokenizer(name, required=not isinstance(model, nn.Module))
    return hf, tokenizer, name or type(hf).__name__


def weights_fingerprint(name: str) -> str:
    """The fingerprint of a model by hub name or folder, whose weights are read once and dropped again."""
    return fingerprint(_load_model(name, None))


def fingerprint(hf: nn.Module) -> str:
    """A short hash of the architecture, all shapes and a sample of all weights; the same in every number type."""
    digest = hashlib.sha256(model_type(hf).encode())
    for parameter in hf.parameters():
        digest.update(repr(tuple(parameter.shape)).encode())
        if parameter.device.type == "meta" or not parameter.numel():
            continue
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLED_VALUES)][:SAMPLED_VALUES]
        digest.update(sample.cpu().to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def max_positions(hf: nn.Module) -> int | None:
    """The number of positions a model's config allows, its text model's where it has several; None for no bound."""
    config = getattr(hf, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        for name in POSITION_LIMITS:
            if isinstance(limit := getattr(part, name, None), int) and limit > 0:
                return limit
    return None


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError:
        raise unknown("device", str(device), ["auto", "cpu", "cuda", "mps"]) from None
    if place.type == "meta":
        raise UserError("device 'meta' holds no numbers: allowed are auto, cpu, cuda and mps")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.get(place.type, True)
    if not available:
        raise UserError(f"device {str(device)!r} is not available on this machine: allowed are auto and cpu")
    return place


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto" and dtype not in DTYPES:
        raise unknown("dtype", dtype, ["auto", *DTYPES])
    return DTYPES.get(dtype)


def _load_model(name: str, dtype: torch.dtype | None) -> nn.Module:
    if Path(name).is_file():
        raise UserError(f"model {name!r} is a file: give the folder that holds config.json and the weights")
    local = Path(name).is_dir() or not hub_reachable()
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", local_files_only=local)
    except (OSError, ValueError) as error:
        raise _not_loaded("model", name, "config.json and the weights", error) from error


def _load_tokenizer(name: str, *, required: bool) -> Any:
    folder = Path(name)
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=folder.is_dir() or not hub_reachable())
    except Exception as error:  # the many ways a folder's files can be odd; a bare tokenizer.json still serves
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        if not required:
            return None
        raise _not_loaded("tokenizer of model", name, "tokenizer.json", error) from error


def _not_loaded(what: str, name: str, contents: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(name).is_dir():
        return UserError(f"{what} {name!r} cannot be loaded: the folder needs {contents} ({reason})")
    return UserError(
        f"unknown {what} {name!r}: there is no such folder, and the Hugging Face hub did not give it (not connected, "
        f"or a wrong or private name); give a local folder that holds {contents}, or a name on the hub"
        f"{near_paths(name, folders=True)}"
    )
