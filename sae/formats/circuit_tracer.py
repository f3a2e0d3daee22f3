"""circuit-tracer's transcoders, recognised so that they can be refused with a sentence.

`config.yaml` with a `model_kind`, `layer_3.safetensors` (a transcoder of one layer), or `W_enc_3.safetensors` and
`W_dec_3.safetensors` (a cross-layer transcoder).
"""

from __future__ import annotations

from pathlib import Path

from sae.autoencoder import SparseAutoencoder
from sae.formats.reading import transcoder_refusal

NAME = "circuit_tracer"


def recognises(path: Path) -> bool:
    """Whether the file or folder is one of theirs."""
    if path.is_file():
        return path.suffix == ".safetensors" and path.name.startswith(("layer_", "W_enc_", "W_dec_"))
    config = path / "config.yaml"
    if config.is_file() and "model_kind" in config.read_text(encoding="utf-8", errors="replace"):
        return True
    return any(path.glob("layer_*.safetensors")) or any(path.glob("W_enc_*.safetensors"))


def read(path: Path) -> SparseAutoencoder:
    """Refuse."""
    raise transcoder_refusal(path)
