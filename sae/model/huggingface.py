"""Getting a Hugging Face model and its tokenizer from a hub name, a folder or an object, ready for analysis.

1. Find the device and the number type.
2. Load, or take what was given; put it in evaluation mode and freeze all parameters.
3. Load the tokenizer beside it, unless one was given.
4. `fingerprints` say whether two models are the same. They are taken of the weights as they are stored, so that a model
   has the same ones in whatever number type it is loaded.

Of files: `config.json` is read before anything is built from it, for sizes that no model has would take for ever. Code
that comes with a model is never run. Every exception of the library becomes one sentence that names the folder, and
what is wrong with a file where its first bytes tell. A model some of whose weights are not in the files is refused: the
library would make them up.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerFast

from sae._files import read_json, shorten
from sae._hub import hub_reachable
from sae.errors import UserError, near_paths, unknown
from sae.model.device_map import DeviceMap, check_modules, is_spread, offload_folder, parse_device_map, weights_of
from sae.model.sites import model_type

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
FULL_PRECISION_PARAMETERS = 2_000_000_000  # up to this many, dtype "auto" on CUDA is float32 as it is elsewhere
POSITION_LIMITS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
SAMPLED_VALUES = 64  # of each parameter, for the fingerprint
LFS_POINTER = b"version https://git-lfs"
MOST_MODULES = 10_000
"""Of layers, experts, heads: what a model builds one module or loops over for each."""
LARGEST_SIZE = 2**31
COUNTS = ("layers", "layer", "experts", "heads", "head", "blocks")
HEADER_BYTES = 8


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
    """Fingerprints of its weights as they are stored; see `fingerprints`."""


def load_hf(
    model: str | Path | nn.Module,
    *,
    tokenizer: Any,
    device: str | torch.device,
    dtype: str | torch.dtype | None,
    device_map: DeviceMap | None = None,
    quantize: str | None = None,
) -> Loaded:
    """The model in evaluation mode with frozen parameters, its tokenizer or None, and a name for both.

    An object keeps its device where it is "auto", and its number type where that is None or "auto". A loaded model goes
    to `auto_device()`; its weights become float32, but with "auto" stay as stored on a GPU from two billion parameters.
    """
    precision = _dtype(dtype)
    if quantize is not None and isinstance(model, nn.Module):
        raise UserError("quantize is for a model by name: one that is loaded already has its weights")
    if device_map is not None and (device != "auto" or isinstance(model, nn.Module)):
        given = f"device is {str(device)!r}" if device != "auto" else "a model that is loaded already has its devices"
        raise UserError(f"{given}, and device-map says where each module goes: give one of them")
    if isinstance(model, nn.Module):
        hf, name = model, getattr(getattr(model, "config", None), "_name_or_path", "")
        marks = fingerprints(hf)
        if device != "auto" and is_spread(hf):
            raise UserError(f"device is {str(device)!r}, and a device map has spread the model: leave device out")
        if device != "auto":
            hf.to(resolve_device(device))
        if precision is not None:
            hf.to(precision)
    else:
        name, resolved = str(model), resolve_device(device)
        spread = None if device_map is None else parse_device_map(device_map)
        options = {} if quantize is None else check_quantizer(quantize, name)
        hf = pretrained_model(name, None, {"": "disk"} if options else spread)
        marks = fingerprints(hf)
        n_parameters = sum(parameter.numel() for parameter in hf.parameters())
        if precision is None and (dtype is None or resolved.type != "cuda" or n_parameters < FULL_PRECISION_PARAMETERS):
            precision = torch.float32
        if spread is None and not options and not quantization(hf) and precision in (torch.float32, torch.float64):
            hf.to(precision)
        elif options or (precision is not None and any(weight.dtype != precision for weight in hf.parameters())):
            del hf  # loaded again, for a cast would round rotary frequencies too, and not reach what waits on disk
            where = spread or ({"": str(resolved)} if options else None)
            hf = pretrained_model(name, precision, where, quantize=quantize)
        if spread is None and not options:
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
    return hash_of(model_type(hf), ((tuple(weight.shape), _sample(weight)) for weight in weights_of(hf)))


def hash_of(architecture: str, weights: Iterable[tuple[tuple[int, ...], Tensor | None]]) -> tuple[str, str]:
    """The fingerprints of a model, from the shape and the sample of each weight; None where it has no values."""
    direct, by_half = hashlib.sha256(architecture.encode()), hashlib.sha256(architecture.encode())
    for shape, sample in weights:
        direct.update(repr(shape).encode())
        by_half.update(repr(shape).encode())
        if sample is None or not sample.numel():
            continue
        direct.update(sample.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
        by_half.update(sample.to(torch.float16).to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return direct.hexdigest()[:16], by_half.hexdigest()[:16]


def sampled(n_values: int) -> slice:
    """Which of a weight's values are in its sample, counted in a row."""
    step = max(1, n_values // SAMPLED_VALUES)
    return slice(0, min(n_values, step * SAMPLED_VALUES), step)


def _sample(weight: Tensor) -> Tensor | None:
    return None if weight.device.type == "meta" else weight.detach().flatten()[sampled(weight.numel())].cpu()


def stored_fingerprints(name: str, marks: tuple[str, ...]) -> tuple[str, ...]:
    """For a float16 model that was given as an object: the fingerprints of the folder it came from, if it did."""
    stored = fingerprints(pretrained_model(name, None)) if Path(name).is_dir() else ()
    return stored if set(stored) & set(marks) else ()


def evaluation_mode(hf: nn.Module) -> None:
    """Put a model into evaluation mode where a part of it is in another; asked before every run, so quickly."""
    modules: list[nn.Module | None] = [hf]
    for module in modules:  # grows meanwhile: `modules()` remembers whom it has met, which takes four times longer
        if module is not None:
            if module.training:
                hf.eval()
                return
            modules.extend(module._modules.values())


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


# ---- files


def pretrained_model(
    name: str,
    dtype: torch.dtype | None,
    device_map: str | dict[str, str] | None = None,
    *,
    quantize: str | None = None,
) -> nn.Module:
    """The model by folder or hub name in a number type, as stored where it is None, on the CPU or spread over devices,
    with linear layers in 8 or 4 bits. `UserError` where it cannot be loaded whole.
    """
    if Path(name).is_file():
        raise UserError(f"model {name!r} is a file: give the folder that holds config.json and the weights")
    local = Path(name).is_dir() or not hub_reachable()
    _check_config(Path(name) / "config.json")

    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False, "output_loading_info": True}
    try:
        with ExitStack() as stack:
            models: list[nn.Module] = []
            if device_map is not None:
                folder, models = stack.enter_context(offload_folder())
                options |= {"device_map": device_map, "offload_folder": folder}
            if quantize is not None:
                options["quantization_config"] = quantizer(quantize, dtype or torch.bfloat16)
            model, info = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype or "auto", ignore_mismatched_sizes=True, **options
            )
            models.append(model)
    except Exception as error:
        if device_map is not None and "device" in str(error):
            raise UserError(f"device-map does not fit model {name!r}: {shorten(str(error), 300)}") from error
        raise not_loaded("model", name, "config.json and the weights", error) from error
    if device_map is not None:
        check_modules(model, device_map)
    for what, key in (("has no weights for", "missing_keys"), ("has weights of another shape for", "mismatched_keys")):
        if names := sorted(_named(entry) for entry in info.get(key) or ()):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"model {name!r} {what} {names[0]}{more}: they would be random; download it again, or mend config.json"
            )
    return model


QUANTIZERS = ("8bit", "4bit")


def check_quantizer(quantize: str, name: str) -> dict[str, str]:
    """The packages that hold weights in 8 or 4 bits, with their versions; `UserError` where one is not installed, or
    the model's weights are stored that way.
    """
    if quantize not in QUANTIZERS:
        raise unknown("quantize", quantize, QUANTIZERS)
    versions = {}
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"quantize needs the package {package}: pip install 'sparse-feature-circuits[quantize]'")
        versions[package] = importlib.metadata.version(package)
    config = None
    with suppress(OSError, ValueError):  # loading it says what is wrong
        config = AutoConfig.from_pretrained(name, local_files_only=Path(name).is_dir() or not hub_reachable())
    if getattr(config, "quantization_config", None):
        raise UserError(f"model {name!r} is stored quantised: leave quantize out")
    return versions


def quantizer(quantize: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How linear layers are held: in 8 bits (LLM.int8, Dettmers et al. 2022) or 4 (NF4, Dettmers et al. 2023), which
    compute in `dtype`. Gradients go through them to their inputs.
    """
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line whenever inputs are cast
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def quantization(hf: nn.Module) -> str | None:
    """How weights are held, where that is not as numbers: 8bit, 4bit or the name of another method; else None."""
    config = getattr(getattr(hf, "config", None), "quantization_config", None)
    if config is None:
        return None
    entries: dict[str, Any] = config if isinstance(config, dict) else config.to_dict()
    method = getattr(entries["quant_method"], "value", entries["quant_method"])
    return next(
        (name for name in QUANTIZERS if entries.get(f"load_in_{name}") or entries.get(f"_load_in_{name}")), method
    )


def _named(entry: Any) -> str:
    """A weight, with its shape in the files and the one that config.json asks for where these differ."""
    if isinstance(entry, str):
        return entry
    name, *shapes = entry
    return f"{name} ({' and not '.join(str(list(shape)) for shape in shapes)})"


def pretrained_tokenizer(name: str, *, required: bool) -> Any:
    """The tokenizer by folder or hub name; None where there is none and none is required."""
    folder = Path(name)
    local = folder.is_dir() or not hub_reachable()

    try:
        try:
            return AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=False)
        except Exception:  # the many ways a folder's files can be odd; a bare tokenizer.json still serves
            if not (folder / "tokenizer.json").is_file():
                raise
            return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    except Exception as error:
        if required:
            raise not_loaded("tokenizer of model", name, "tokenizer.json", error) from error
        return None


def not_loaded(what: str, name: str, contents: str, error: Exception) -> UserError:
    """The sentence for whatever the library raised; raise what this returns."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, UnpicklingError):
        lines = ["a .bin file holds more than tensors, and is not opened: it could run code"]
    if "custom code" in str(error):
        lines = ["its config.json names code of its own (auto_map), which is never run"]
    reason = shorten(" ".join([type(error).__name__, *lines[:2]]) if lines else type(error).__name__, 300)
    if Path(name).is_dir():
        return UserError(
            f"{what} {name!r} cannot be loaded: the folder needs {contents} ({_damaged(Path(name)) or reason})"
        )
    return UserError(
        f"unknown {what} {name!r}: there is no such folder, and the Hugging Face hub did not give it (not connected, "
        f"or a wrong or private name); give a local folder that holds {contents}, or a name on the hub"
        f"{near_paths(name, folders=True)}"
    )


def _check_config(path: Path) -> None:
    """Raise UserError for a config.json that is no object, or has a size or a count that no model has."""
    if not path.is_file():
        return
    config = read_json(path)
    for key, value in _numbers(config):
        name = key.rpartition(".")[2]
        if not name.endswith("_id") and isinstance(value, int) and abs(value) > LARGEST_SIZE:
            raise UserError(f"{path}: {key} is {shorten(str(value))}: at most {LARGEST_SIZE} is allowed")
        if name.endswith(COUNTS) and value > MOST_MODULES:
            raise UserError(f"{path}: {key} is {shorten(str(value))}: at most {MOST_MODULES} is allowed")


def _numbers(value: Any, key: str = "") -> list[tuple[str, int | float]]:
    """Every number of nested objects with its key."""
    if isinstance(value, dict):
        return [entry for name, member in value.items() for entry in _numbers(member, f"{key}.{name}" if key else name)]
    return [(key, value)] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def _damaged(folder: Path) -> str:
    """The fault of the folder's files, if it can be told from their first bytes; else empty."""
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.suffix not in (".safetensors", ".bin", ".json", ".model"):
            continue
        with path.open("rb") as file:
            head = file.read(len(LFS_POINTER))
        if head == LFS_POINTER:
            return f"{path.name} is a pointer of Git LFS, not the file: run git lfs pull"
        if path.suffix == ".safetensors" and (short := _missing_bytes(path)):
            return f"{path.name} ends {short} bytes early: download it again"
    return ""


def _missing_bytes(path: Path) -> int:
    """How many bytes a safetensors file lacks by its own header; 0 where that cannot be told."""
    size = path.stat().st_size
    with path.open("rb") as file:
        n_header = int.from_bytes(file.read(HEADER_BYTES), "little")
        if n_header > size:
            return n_header + HEADER_BYTES - size if n_header < LARGEST_SIZE else 0
        try:
            header = json.loads(file.read(n_header))
            offsets = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return max(0, HEADER_BYTES + n_header + max(offsets, default=0) - size)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return 0
