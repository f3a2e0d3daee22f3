"""Helpers that the readers and writers of foreign formats share.

1. Open: safetensors, npz without pickled objects, or a `.pt` with `weights_only=True`, which runs no code. Headers are
   read first: what claims to be far larger than its file is refused before anything is unpacked.
2. Pick: every tensor of the file is either wanted or known to be without effect; anything else is an error, because a
   tensor that is silently left out (a skip connection, a scale) makes every number wrong without a sign.
3. Fold: in float32, whatever the file's precision, the decoder is brought to unit rows without changing x̂.
4. Write: into a new folder beside the one asked for. What was written is read back and tried: an autoencoder that a
   format does not hold is refused, not approximated.
"""

from __future__ import annotations

import math
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sae._files import TensorSpec, check_tensors, make_folder, missing_file, read_json, temporary_name
from sae.autoencoder import SKIP, ReadKind, SAEConfig, SparseAutoencoder
from sae.errors import UserError
from sae.folding import fold_norms
from sae.formats.site_names import READ_HOOKS
from sae.model.sites import Site

LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
"""Tensors of two `torch.nn.Linear`, by our names for them."""
MOST_UNPACKED = 16
"""Weights hardly compress: a file that unpacks to more than this many times its size holds something else, ..."""
FREE_BYTES = 64 * 2**20
"""... unless that is less than this."""
TRIED_ROWS = 64
TOLERANCE = 1e-4
"""Largest difference of x̂ that counts as rounding, relative to x and x̂."""
OTHERWISE_ACTIVE = 1 / 16
"""Share of the rows that may differ more: rounding turns a feature on or off that is just at its threshold."""


def read_entries(path: Path, schema: Any) -> dict[str, Any]:
    """A config by its schema (a TypedDict), without the entries that are null: those stand for their defaults."""
    return {key: value for key, value in read_json(path, schema).items() if value is not None}


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a `.pt` file, read without running the code a pickle may hold."""
    if not path.is_file():
        raise missing_file(path)
    try:
        if zipfile.is_zipfile(path):
            _unpacked(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        if "unsupported global" in str(error).lower():  # a class or function that is no tensor
            raise UserError(
                f"{path} holds Python objects beside tensors, which could run any code when opened: save its plain "
                "state dict with torch.save(model.state_dict(), path) where it comes from, and load that"
            ) from None
        reason = (str(error).strip().splitlines() or [""])[0].partition(".")[0] or type(error).__name__
        raise UserError(f"{path} is not a file of torch.save, or not all of one: {reason}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: looked for a dictionary of tensors, found a {type(loaded).__name__}")
    for name, value in loaded.items():
        if isinstance(value, Tensor) and value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{path}: tensor {name!r} has shape {list(value.shape)}, the file holds less than that")
    return loaded


def read_npz(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The arrays of an npz file as tensors; `names` are those that it may hold."""
    if not path.is_file():
        raise missing_file(path)
    try:
        _unpacked(path)
        with np.load(path, allow_pickle=False) as arrays:
            if surplus := sorted(set(arrays.files) - set(names)):
                raise UserError(f"{path}: looked for {', '.join(names)}; no use known for {', '.join(surplus)}")
            for name in arrays.files:
                _check_header(path, arrays.zip, f"{name}.npy")
            return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
    except UserError:
        raise
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        raise UserError(f"{path} is not an npz file of plain arrays: {error}") from None


def _unpacked(path: Path) -> None:
    """Refuse an archive that is far larger unpacked than it is on disk."""
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > max(FREE_BYTES, MOST_UNPACKED * path.stat().st_size):
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes and would unpack to {size:,}: it is no file of weights"
        )


def _check_header(path: Path, archive: zipfile.ZipFile, name: str) -> None:
    """Refuse an array whose header claims more or less than is there."""
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        there = archive.getinfo(name).file_size - file.tell()
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize != there:
        raise UserError(f"{path}: {name} claims shape {list(shape)} of {dtype}, and the file has {there:,} bytes of it")


def pick(
    tensors: Mapping[str, Any], names: Mapping[str, str], *, source: Path, what: str, ignored: Iterable[str] = ()
) -> dict[str, Tensor]:
    """The tensors by our names, in float32. `names` maps ours to the file's; `ignored` change neither x̂ nor f."""
    missing = [name for name in names.values() if name not in tensors]
    surplus = sorted(set(tensors) - set(names.values()) - set(ignored))
    if missing or surplus:
        raise UserError(
            f"{source}: looked for the tensors of {what}: {', '.join(names.values())}; found {', '.join(tensors)}"
            + (f"; missing {', '.join(missing)}" if missing else "")
            + (f"; no use known for {', '.join(surplus)}" if surplus else "")
        )
    _check_shapes(tensors, names, source)
    return {ours: tensors[theirs].float() for ours, theirs in names.items()}


def _check_shapes(tensors: Mapping[str, Any], names: Mapping[str, str], source: Path) -> None:
    """Refuse tensors that do not fit each other; matrices may lie either way."""
    for theirs in names.values():
        if not isinstance(tensors[theirs], Tensor):
            raise UserError(f"{source}: {theirs!r} is a {type(tensors[theirs]).__name__}, expected a tensor")
    vectors = {names[ours]: TensorSpec((size,)) for ours, size in (("b_enc", "F"), ("b_dec", "d"))}
    check_tensors(tensors, vectors, source)
    sizes = {"F": len(tensors[names["b_enc"]]), "d": len(tensors[names["b_dec"]])}
    for ours, theirs in names.items():
        tensor = tensors[theirs]
        if ours in ("W_enc", "W_dec"):
            shape: tuple[str, ...] = ("d", "F") if tensor.shape == (sizes["d"], sizes["F"]) else ("F", "d")
        elif ours == "threshold" and tensor.numel() == 1:
            shape = ("one",) * tensor.ndim
        else:
            shape = {"b_dec": ("d",), "centre": ("d",), SKIP: ("d", "d")}.get(ours, ("F",))
        check_tensors({theirs: tensor}, {theirs: TensorSpec(shape)}, source, one=1, **sizes)


def entry(config: Mapping[str, Any], key: str, *, source: Path) -> Any:
    """config[key], or an error that lists what there is."""
    if key not in config:
        raise UserError(f"{source}: looked for the entry {key!r}, found {', '.join(map(repr, config)) or 'none'}")
    return config[key]


def positive(config: Mapping[str, Any], key: str, *, source: Path) -> float:
    """config[key], a positive number."""
    value = entry(config, key, source=source)
    if not 0 < value < math.inf:
        raise UserError(f"{source}: key {key!r} is {value}: expected a positive number")
    return value


def whole_number(value: Any, key: str, *, source: Path) -> int:
    """A positive integer, given as such, as a float of that value or as a tensor of one number."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(number, bool) or not isinstance(number, int | float) or number != number // 1 or number < 1:
        raise UserError(f"{source}: {key} is {value!r}: expected a positive integer")
    return int(number)


def build(
    tensors: Mapping[str, Tensor],
    *,
    source: Path,
    file_format: str,
    architecture: str,
    subtract_b_dec: bool,
    k: int | None = None,
    ranked: bool = False,
    site: str = "",
    model: str = "",
    read: ReadKind | Literal[""] = "",
    notes: Mapping[str, Any] | None = None,
) -> SparseAutoencoder:
    """Our autoencoder from tensors W_enc [F, d], W_dec [F, d], b_dec [d], ...: unit rows, shapes checked.

    `read`: the place at which a transcoder reads; it may have W_skip [d, d] (x̂ has x W_skipᵀ).
    `ranked`: a top-k selection went by activations before the decoder was normalised.
    """
    per_feature = tensors["gate_bias"] if "gate_bias" in tensors else tensors["b_enc"]
    config = SAEConfig(
        architecture=architecture,
        d_model=len(tensors["b_dec"]),
        n_features=len(per_feature),
        site=site,
        model=model,
        subtract_b_dec=subtract_b_dec,
        read=read,
        k=k,
        extra={"format": file_format, "source": str(source), **(notes or {})},
    )
    try:
        _check_matrices(tensors, config)
        return SparseAutoencoder(config, fold_norms(tensors, ranked=ranked))
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _check_matrices(tensors: Mapping[str, Tensor], config: SAEConfig) -> None:
    """Before norms are folded, so that a transposed matrix is named as such."""
    shape = (config.n_features, config.d_model)
    for name in ("W_enc", "W_dec"):
        if tuple(tensors[name].shape) != shape:
            hint = " (it is transposed)" if tuple(tensors[name].shape) == shape[::-1] else ""
            raise UserError(
                f"{name} read as [features, width] has shape {list(tensors[name].shape)}, but the biases say "
                f"{list(shape)}{hint}"
            )


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, whose files go there when the block ends without an error, else nowhere."""
    make_folder(folder.parent)
    temporary = temporary_name(folder)
    try:
        yield make_folder(temporary)
        make_folder(folder)
        for path in sorted(temporary.iterdir()):
            path.replace(folder / path.name)
    except OSError as error:
        raise UserError(f"cannot write {str(folder)!r}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@torch.no_grad()
def check_same(sae: SparseAutoencoder, written: SparseAutoencoder, file_format: str) -> None:
    """`UserError` unless what was written gives the same x̂ as the autoencoder, on rows of all sizes."""
    x = _trial_rows(sae)
    x_hat, again = sae(x), written(x)
    size = x.norm(dim=-1) + x_hat.norm(dim=-1)  # [n]
    differ = ~((x_hat - again).norm(dim=-1) <= TOLERANCE * size.clamp(min=torch.finfo(x.dtype).tiny))
    if int(differ.sum()) > OTHERWISE_ACTIVE * len(x):
        raise UserError(
            f"the autoencoder of site {sae.config.site!r} cannot be written as {file_format}: read back it gives other "
            f"reconstructions on {int(differ.sum())} of {len(x)} rows; nothing was left of it"
        )


def _trial_rows(sae: SparseAutoencoder) -> Tensor:
    """[n, d] activations that make features active, from small to large, the same every time."""
    generator = torch.Generator().manual_seed(0)
    width, rows = (
        sae.config.read_width,
        torch.nn.functional.normalize(sae.W_enc, dim=-1) if sae.config.read else sae.W_dec,
    )
    pairs = torch.randint(len(rows), (TRIED_ROWS, 2), generator=generator).to(sae.device)
    noise = torch.randn(TRIED_ROWS, width, generator=generator).to(sae.device)
    directions = rows[pairs].sum(1) + noise / width**0.5
    centre = torch.zeros_like(rows[0]) if sae.config.read else sae.b_dec
    return centre + torch.logspace(-1, 2, TRIED_ROWS, device=sae.device)[:, None] * directions


def transcoder_hook(sae: SparseAutoencoder, file_format: str) -> str:
    """TransformerLens' name of the place that a transcoder reads; UserError for one that a format has no name for."""
    site = Site.parse(sae.config.site) if sae.config.site else None
    if site is None or sae.config.read not in READ_HOOKS:
        raise UserError(
            f"the transcoder of site {sae.config.site!r} reads {sae.config.read}, for which {file_format} has no name: "
            "save it in our own format"
        )
    return f"blocks.{site.layer}.{READ_HOOKS[sae.config.read]}"


def unsupported(sae: SparseAutoencoder, file_format: str) -> UserError:
    """The format has no such architecture."""
    kind = "transcoder" if sae.config.read else "autoencoder"
    return UserError(f"{file_format} has no class for a {sae.config.architecture!r} {kind}: save it in our own format")
