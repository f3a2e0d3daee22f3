"""circuit-tracer's transcoders and other models that are no autoencoders, recognised so that they can be refused.

`config.yaml` with a `model_kind`, `layer_3.safetensors` (a transcoder of one layer), or `W_enc_3.safetensors` and
`W_dec_3.safetensors` (a cross-layer transcoder). Language-Model-SAEs writes `config.json` with a `sae_type`, such as
crosscoder, clt, lorsa, molt.
"""

from __future__ import annotations

import json
from pathlib import Path

from sae.autoencoder import SparseAutoencoder
from sae.formats.refusals import refusal, transcoder_refusal

NAME = "circuit_tracer"


def recognises(path: Path) -> bool:
    """Whether the file or folder is one of theirs."""
    if path.is_file():
        return path.suffix == ".safetensors" and path.name.startswith(("layer_", "W_enc_", "W_dec_"))
    if "model_kind" in _head(path / "config.yaml") or _sae_type(path):
        return True
    return any(path.glob("layer_*.safetensors")) or any(path.glob("W_enc_*.safetensors"))


def _head(path: Path) -> str:
    """The beginning of a config, "" where there is none."""
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(2**16)


def _sae_type(path: Path) -> str:
    """The kind of model that a `config.json` of Language-Model-SAEs names, "" for an autoencoder or none."""
    try:
        config = json.loads(_head(path / "config.json") or "{}")
    except ValueError:
        return ""
    name = config.get("sae_type") if isinstance(config, dict) else None
    return name if isinstance(name, str) and name != "sae" else ""


def read(path: Path) -> SparseAutoencoder:
    """Refuse."""
    cross_layer = path.name.startswith("W_enc_") or (path.is_dir() and any(path.glob("W_enc_*.safetensors")))
    name = "clt" if cross_layer else _sae_type(path) if path.is_dir() else ""
    raise refusal(path, name) or transcoder_refusal(path)
