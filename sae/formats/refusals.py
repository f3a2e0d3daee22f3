"""Refusals of what other projects make that is no autoencoder of one site, by name and with the reason."""

from __future__ import annotations

import json
import re
from pathlib import Path

from sae.errors import UserError

_REASONS = {
    "transcoder": "a transcoder, which reads at one site and writes at another: only autoencoders, which "
    "rebuild what they read, can be used here",
    "crosscoder": "a crosscoder, which reads and writes several layers at once: only autoencoders of one site can be "
    "used here",
    "clt": "a cross-layer transcoder, which reads one layer and writes all that follow: only autoencoders, which "
    "rebuild what they read, can be used here",
    "lorsa": "a low-rank sparse attention layer (Lorsa), which moves information between tokens: only autoencoders, "
    "which take each token alone, can be used here",
    "temporal": "a temporal autoencoder, whose features depend on earlier tokens: only autoencoders that take each "
    "token alone can be used here",
    "matchingpursuit": "a matching pursuit autoencoder, which picks features one after another from what the ones "
    "before left: its features are no function of one linear map, as those used here are",
    "abstopk": "an AbsTopK autoencoder, whose features are the k largest in size and may be negative: only features "
    "that are zero or positive can be used here",
    "groupmax": "an autoencoder with groupmax, which keeps the largest feature of each group: there is no such "
    "activation here",
    "tanhrelu": "an autoencoder with tanh-relu, whose features saturate: they are not linear in the activations where "
    "they are active, as those used here are",
    "skip": "an autoencoder with a skip connection: what it writes is not made of features alone, so that their "
    "effects would not add up",
}
_ALSO = {"crosslayertranscoder": "clt", "lowranksparseattention": "lorsa", "molt": "transcoder"}
_CONTAINED = ("crosslayertranscoder", "transcoder", "crosscoder", "temporal", "matchingpursuit", "lorsa")


def refusal(source: Path, name: str) -> UserError | None:
    """The error for an architecture, class or activation of this name; None where it is not one of those refused."""
    plain = re.sub(r"[^a-z]", "", name.lower())
    kind = next((name_part for name_part in _CONTAINED if name_part in plain), plain)
    kind = _ALSO.get(kind, kind)
    return UserError(f"{source} holds {_REASONS[kind]}") if kind in _REASONS else None


def transcoder_refusal(source: Path) -> UserError:
    """The error for a transcoder; raise what this returns."""
    return UserError(f"{source} holds {_REASONS['transcoder']}")


def refuse_no_autoencoder(path: Path) -> None:
    """`UserError` for a file or folder of circuit-tracer or Language-Model-SAEs that holds no autoencoder of one site.

    circuit-tracer has `config.yaml` with a `model_kind`, `layer_3.safetensors` (a transcoder of one layer), or
    `W_enc_3.safetensors` and `W_dec_3.safetensors` (a cross-layer transcoder). Language-Model-SAEs writes `config.json`
    with a `sae_type`, such as crosscoder, clt, lorsa, molt.
    """
    files = path.iterdir() if path.is_dir() else [path]
    names = [file.name for file in files if file.suffix == ".safetensors"]
    cross_layer = any(name.startswith(("W_enc_", "W_dec_")) for name in names)
    one_layer = any(name.startswith("layer_") for name in names)
    kind = "clt" if cross_layer else _sae_type(path)
    if kind or one_layer or "model_kind" in _head(path / "config.yaml"):
        raise refusal(path, kind) or transcoder_refusal(path)


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
