"""What all readers share: opening files that hold plain tensors, naming what is missing, folding into our contract.

1. Open: safetensors, npz without pickled objects, or a `.pt` with `weights_only=True`, which runs no code.
2. Pick: every tensor of the file is either wanted or known to be without effect; anything else is an error, because a
   tensor that is silently left out (a skip connection, a scale) makes every number wrong without a sign.
3. Fold: in float32, whatever the file's precision, the decoder is brought to unit rows without changing x̂.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.autoencoder import SAEConfig, SparseAutoencoder
from sae.errors import UserError
from sae.files import missing_file
from sae.nonlinearities import fold_norms


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a `.pt` file, read without running the code a pickle may hold."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise missing_file(path) from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds Python objects beside tensors, which could run any code when opened: save its plain state "
            "dict with torch.save(model.state_dict(), path) where it comes from, and load that"
        ) from None
    except (RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a file of torch.save: {str(error).splitlines()[0]}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: looked for a dictionary of tensors, found a {type(loaded).__name__}")
    return loaded


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an npz file as tensors."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
    except FileNotFoundError:
        raise missing_file(path) from None
    except (ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not an npz file of plain arrays: {error}") from None


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
    return {ours: tensors[theirs].float() for ours, theirs in names.items()}


def entry(config: Mapping[str, Any], key: str, *, source: Path) -> Any:
    """config[key], or an error that lists what there is."""
    if key not in config:
        raise UserError(f"{source}: looked for the entry {key!r}, found {', '.join(map(repr, config)) or 'none'}")
    return config[key]


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
    notes: Mapping[str, Any] | None = None,
) -> SparseAutoencoder:
    """Our autoencoder from tensors W_enc [F, d], W_dec [F, d], b_dec [d], ...: unit rows, shapes checked.

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


def transcoder_refusal(source: Path) -> UserError:
    """Transcoders read one place and write another: they are no autoencoder of a site."""
    return UserError(
        f"{source} holds a transcoder, which reads one place of the model and writes another: only autoencoders, "
        "which rebuild what they read, can be used here"
    )
