"""Getting a Hugging Face model and its tokenizer from a hub name, a folder or an object, ready for analysis.

1. Find the device and the number type.
2. Load, or take what was given; put it in evaluation mode and freeze all parameters.
3. Load the tokenizer beside it, unless one was given.
4. `fingerprints` say whether two models are the same. They are taken of the weights as they are stored, so that a model
   has the same ones in whatever number type it is loaded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sae.errors import UserError, unknown
from sae.model.pretrained import pretrained_model, pretrained_tokenizer
from sae.model.sites import model_type

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
FULL_PRECISION_PARAMETERS = 2_000_000_000  # up to this many, dtype "auto" on CUDA is float32 as it is elsewhere
POSITION_LIMITS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
SAMPLED_VALUES = 64  # of each parameter, for the fingerprint


def resolve_device(device: str | torch.device) -> torch.device:
    """A device by name, the best there is for auto."""
    if device == "auto":
        return auto_device()
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise unknown("device", str(device), ["auto", "cpu", "cuda", "mps"]) from None
    if resolved.type == "meta":
        raise UserError("device 'meta' holds no numbers: allowed are auto, cpu, cuda and mps")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.get(resolved.type, True)
    if not available:
        raise UserError(f"device {str(device)!r} is not available on this machine: allowed are auto and cpu")
    return resolved


def auto_device() -> torch.device:
    """CUDA if there is one, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


@dataclass(frozen=True)
class Loaded:
    """A model ready for analysis."""

    hf: nn.Module
    """In evaluation mode, with frozen parameters."""
    tokenizer: Any
    """Its tokenizer or None."""
    name: str
    """The folder, the hub name or the class."""
    fingerprints: tuple[str, str]
    """Of its weights as they are stored; see `fingerprints`."""


def load_hf(
    model: str | Path | nn.Module, *, tokenizer: Any, device: str | torch.device, dtype: str | torch.dtype | None
) -> Loaded:
    """The model in evaluation mode with frozen parameters, its tokenizer or None, and a name for both.

    An object keeps its device where it is "auto", and its number type where that is None or "auto". A loaded model goes
    to `auto_device()`; its weights become float32, but with "auto" stay as stored on a GPU from two billion parameters.
    """
    precision = _dtype(dtype)
    if isinstance(model, nn.Module):
        hf, name = model, getattr(getattr(model, "config", None), "_name_or_path", "")
        marks = fingerprints(hf)
        if device != "auto":
            hf.to(resolve_device(device))
        if precision is not None:
            hf.to(precision)
    else:
        name, resolved = str(model), resolve_device(device)
        hf = pretrained_model(name, None)
        marks = fingerprints(hf)
        n_parameters = sum(parameter.numel() for parameter in hf.parameters())
        if precision is None and (dtype is None or resolved.type != "cuda" or n_parameters < FULL_PRECISION_PARAMETERS):
            precision = torch.float32
        if precision in (torch.float32, torch.float64):
            hf.to(precision)
        elif precision is not None and any(parameter.dtype != precision for parameter in hf.parameters()):
            del hf  # loaded again, for a cast would round rotary frequencies too
            hf = pretrained_model(name, precision)
        hf.to(resolved)
    hf.eval().requires_grad_(False)
    if tokenizer is None and name:
        tokenizer = pretrained_tokenizer(name, required=not isinstance(model, nn.Module))
    return Loaded(hf, tokenizer, name or type(hf).__name__, marks)


def weights_fingerprint(name: str) -> str:
    """The fingerprint of a model by hub name or folder, whose weights are read once and dropped again."""
    return fingerprints(pretrained_model(name, None))[0]


def fingerprints(hf: nn.Module) -> tuple[str, str]:
    """Short hashes of the architecture, all shapes and a sample of all weights: as they are, which is the model's
    fingerprint, and as they are after a stay in float16, which records of such a model may hold.

    Both round to bfloat16, so that the number type does not show where it is at least as wide as the stored one.
    """
    direct, by_half = hashlib.sha256(model_type(hf).encode()), hashlib.sha256(model_type(hf).encode())
    for parameter in hf.parameters():
        shape = repr(tuple(parameter.shape)).encode()
        direct.update(shape)
        by_half.update(shape)
        if parameter.device.type == "meta" or not parameter.numel():
            continue
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLED_VALUES)][:SAMPLED_VALUES].cpu()
        direct.update(sample.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
        by_half.update(sample.to(torch.float16).to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return direct.hexdigest()[:16], by_half.hexdigest()[:16]


def stored_fingerprints(name: str, marks: tuple[str, ...]) -> tuple[str, ...]:
    """For a float16 model that was given as an object: the fingerprints of the folder it came from, if it did."""
    stored = fingerprints(pretrained_model(name, None)) if Path(name).is_dir() else ()
    return stored if set(stored) & set(marks) else ()


def max_positions(hf: nn.Module) -> int | None:
    """The number of positions a model's config allows, its text model's where it has several; None for no bound."""
    config = getattr(hf, "config", None)
    for sub_config in (config, getattr(config, "text_config", None)):
        for name in POSITION_LIMITS:
            if isinstance(limit := getattr(sub_config, name, None), int) and limit > 0:
                return limit
    return None


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto" and dtype not in DTYPES:
        raise unknown("dtype", dtype, ["auto", *DTYPES])
    return DTYPES.get(dtype)
