"""sparsify (EleutherAI): a folder per module of the model, `layers.5.mlp`, with `cfg.json` and `sae.safetensors`.

Tensors: encoder.weight [F, d], encoder.bias [F], W_dec [F, d] (not transposed), b_dec [d].
f = the k largest of relu(W (x − b_dec) + b); x̂ = f W_dec + b_dec. `num_latents` 0 means d_in · expansion_factor.
The decoder is at unit norm where `normalize_decoder`; elsewhere the selection goes by activations as they are.
Transcoders of before February 2025 say so in the `config.json` of the run, in the folder around.
"""

from __future__ import annotations

from pathlib import Path

from typing_extensions import TypedDict

from sae._files import read_json, read_tensors
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError
from sae.formats.common import build, entry, pick, read_entries
from sae.formats.refusals import refusal, transcoder_refusal
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


def read(folder: Path) -> SparseAutoencoder:
    """The autoencoder in a folder with `cfg.json` and `sae.safetensors`."""
    path = folder / CONFIG
    config = read_entries(path, _Config)
    if config.get("transcode") or _run_transcodes(folder):
        raise transcoder_refusal(folder)
    if config.get("skip_connection"):
        raise refusal(folder, "skip") or transcoder_refusal(folder)
    if (activation := config.get("activation", "topk")) != "topk":
        raise refusal(folder, activation) or UserError(f"{path} has activation {activation!r}: allowed is topk")
    tensors = pick(read_tensors(folder / WEIGHTS), _TENSORS, source=folder / WEIGHTS, what="a sparse coder")
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
        subtract_b_dec=True,
        k=k,
        ranked=True,
        site=site_named(folder.name),
        notes={"module": folder.name},
    )
