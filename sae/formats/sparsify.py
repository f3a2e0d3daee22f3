"""sparsify (EleutherAI): a folder per module of the model, `layers.5.mlp`, with `cfg.json` and `sae.safetensors`.

Tensors: encoder.weight [F, d], encoder.bias [F], W_dec [F, d] (not transposed), b_dec [d].
f = the k largest of relu(W (x − b_dec) + b); x̂ = f W_dec + b_dec. `num_latents` 0 means d_in · expansion_factor.
The decoder is at unit norm where `normalize_decoder`; elsewhere the selection goes by activations as they are.

A transcoder (`transcode`) reads what the module takes and writes what it gives, nothing is subtracted; with
`skip_connection` x̂ has x W_skipᵀ as well. Those of before February 2025 say so in the `config.json` of the run, in the
folder around; and what has a skip connection is a transcoder, whatever else is said.
"""

from __future__ import annotations

from pathlib import Path

from typing_extensions import TypedDict

from sae._files import read_json, read_tensors
from sae.autoencoder import SKIP, SparseAutoencoder
from sae.errors import UserError
from sae.formats.common import build, entry, pick, read_entries
from sae.formats.refusals import refusal
from sae.formats.site_names import site_named

NAME = "sparsify"
WEIGHTS, CONFIG = "sae.safetensors", "cfg.json"
_TENSORS = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}


class _Config(TypedDict, total=False):
    """The entries of `cfg.json` that are read."""

    d_in: int | None
    k: int | None
    num_latents: int | None
    expansion_factor: int | None
    activation: str | None
    transcode: bool | None
    skip_connection: bool | None


class _RunConfig(TypedDict, total=False):
    """The entry of a run's `config.json` that is read."""

    transcode: bool | None


def _run_transcodes(folder: Path) -> bool:
    """Whether the run that a coder belongs to says that it trained transcoders."""
    path = folder.resolve().parent / "config.json"
    if not path.is_file():
        return False
    try:
        return bool(read_json(path, _RunConfig).get("transcode"))
    except UserError:  # some other file of this name
        return False


def _site(folder: Path, transcodes: bool) -> str:
    """The site that the folder is called by; a transcoder of anything but an MLP is refused."""
    site = site_named(folder.name)
    if transcodes and site and not site.startswith("mlp"):
        raise UserError(f"{folder} holds a transcoder of {folder.name}: only those of an MLP can be used here")
    return site


def read(folder: Path) -> SparseAutoencoder:
    """The autoencoder in a folder with `cfg.json` and `sae.safetensors`."""
    path = folder / CONFIG
    config = read_entries(path, _Config)
    has_skip = bool(config.get("skip_connection"))
    transcodes = bool(config.get("transcode")) or has_skip or _run_transcodes(folder)
    if (activation := config.get("activation", "topk")) != "topk":
        raise refusal(folder, activation) or UserError(f"{path} has activation {activation!r}: allowed is topk")
    names = _TENSORS | ({SKIP: "W_skip"} if has_skip else {})
    tensors = pick(read_tensors(folder / WEIGHTS), names, source=folder / WEIGHTS, what="a sparse coder")
    n_features = config.get("num_latents") or entry(config, "d_in", source=path) * config.get("expansion_factor", 32)
    if n_features != len(tensors["b_enc"]):
        raise UserError(f"{path} says {n_features} latents, the tensors of {WEIGHTS} say {len(tensors['b_enc'])}")
    k = config.get("k", 0)
    if not 1 <= k <= n_features:
        raise UserError(f"{path}: key 'k' is {config.get('k')}: expected 1 to {n_features}, the number of latents")
    return build(
        tensors,
        source=folder,
        file_format=NAME,
        architecture="topk",
        subtract_b_dec=not transcodes,
        k=k,
        ranked=True,
        site=_site(folder, transcodes),
        read="mlp_in" if transcodes else "",
        notes={"module": folder.name},
    )
