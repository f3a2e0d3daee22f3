"""sparsify (EleutherAI): a folder per module of the model, `layers.5.mlp`, with `cfg.json` and `sae.safetensors`.

Tensors: encoder.weight [F, d], encoder.bias [F], W_dec [F, d] (not transposed), b_dec [d].
f = the k largest of relu(W (x − b_dec) + b); x̂ = f W_dec + b_dec. `num_latents` 0 means d_in · expansion_factor.
The decoder is at unit norm where `normalize_decoder`; elsewhere the selection goes by activations as they are.
"""

from __future__ import annotations

from pathlib import Path

from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError
from sae.files import read_json, read_tensors
from sae.formats.places import site_named
from sae.formats.reading import build, entry, pick, transcoder_refusal

NAME = "sparsify"
WEIGHTS, CONFIG = "sae.safetensors", "cfg.json"
_TENSORS = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}


def recognises(folder: Path) -> bool:
    """Whether the folder has the files of this format."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(folder: Path) -> SparseAutoencoder:
    """The autoencoder in a folder with `cfg.json` and `sae.safetensors`."""
    path = folder / CONFIG
    config = read_json(path)
    if config.get("transcode") or config.get("skip_connection"):
        raise transcoder_refusal(folder)
    if config.get("activation", "topk") != "topk":
        raise UserError(f"{path} has activation {config['activation']!r}: allowed is topk")
    tensors = pick(read_tensors(folder / WEIGHTS), _TENSORS, source=folder / WEIGHTS, what="a sparse coder")
    n_features = config.get("num_latents") or entry(config, "d_in", source=path) * config.get("expansion_factor", 32)
    if n_features != len(tensors["b_enc"]):
        raise UserError(f"{path} says {n_features} latents, the tensors of {WEIGHTS} say {len(tensors['b_enc'])}")
    return build(
        tensors,
        source=folder,
        file_format=NAME,
        architecture="topk",
        subtract_b_dec=True,
        k=entry(config, "k", source=path),
        ranked=True,
        site=site_named(folder.name),
        notes={"module": folder.name},
    )
