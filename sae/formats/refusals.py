"""Refusals of what other projects make that is no autoencoder of one site, by name and with the reason."""

from __future__ import annotations

import json
import re
from pathlib import Path

from sae.errors import UserError

_REASONS = {
    "molt": "a mixture of linear transforms (MOLT), whose parts are no single directions: only dictionaries of "
    "features with one direction each can be used here",
    "crosscoder": "a crosscoder, which reads and writes several layers at once: only dictionaries of one site can be "
    "used here",
    "clt": "a cross-layer transcoder, which reads one layer and writes all that follow: only dictionaries that write "
    "at one site can be used here",
    "lorsa": "a low-rank sparse attention layer (Lorsa), which moves information between tokens: only autoencoders, "
    "which take each token alone, can be used here",
    "temporal": "a temporal autoencoder, whose features depend on earlier tokens: only autoencoders that take each "
    "token alone can be used here",
    "matchingpursuit": "a matching pursuit autoencoder, which picks features one after another from what the ones "
    "before left: its features are no function of one linear map, as those used here are",
    "groupmax": "an autoencoder with groupmax, which keeps the largest feature of each group: there is no such "
    "activation here",
    "tanhrelu": "an autoencoder with tanh-relu, whose features saturate: they are not linear in the activations where "
    "they are active, as those used here are",
}
_ALSO = {"crosslayertranscoder": "clt", "lowranksparseattention": "lorsa"}
_CONTAINED = ("crosslayertranscoder", "crosscoder", "temporal", "matchingpursuit", "lorsa")


def refusal(source: Path, name: str) -> UserError | None:
    """The error for an architecture, class or activation of this name; None where it is not one of those refused."""
    plain = re.sub(r"[^a-z]", "", name.lower())
    kind = next((name_part for name_part in _CONTAINED if name_part in plain), plain)
    kind = _ALSO.get(kind, kind)
    return UserError(f"{source} holds {_REASONS[kind]}") if kind in _REASONS else None


def refuse_no_autoencoder(path: Path) -> None:
    """`UserError` for a file or folder of circuit-tracer or Language-Model-SAEs that holds no autoencoder of one site.

    circuit-tracer has `W_enc_3.safetensors` and `W_dec_3.safetensors` (a cross-layer transcoder), Gemma Scope 2
    `params_layer_3.safetensors` of the same and of crosscoders, with a `type` in `config.json`. Language-Model-SAEs
    writes `config.json` with a `sae_type`, such as crosscoder, clt, lorsa, molt.
    """
    files = path.iterdir() if path.is_dir() else [path]
    names = [file.name for file in files if file.suffix == ".safetensors"]
    cross_layer = any(name.startswith(("W_enc_", "W_dec_")) for name in names)
    kind = "clt" if cross_layer or "cross_layer" in _head(path / "config.yaml") else _sae_type(path)
    if kind and (error := refusal(path, kind)):
        raise error


def _head(path: Path) -> str:
    """The beginning of a config, "" where there is none."""
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(2**16)


def _sae_type(path: Path) -> str:
    """The kind of model that a `config.json` names, "" for an autoencoder or none."""
    try:
        config = json.loads(_head(path / "config.json") or "{}")
    except ValueError:
        return ""
    names = (config.get("sae_type"), config.get("type")) if isinstance(config, dict) else ()
    return next((name for name in names if isinstance(name, str) and name != "sae"), "")
