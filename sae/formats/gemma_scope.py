"""Gemma Scope 1 and 2 (Lieberum et al. 2024, arXiv 2408.05147): JumpReLU autoencoders and transcoders of Gemma 2 and 3.

Files: `layer_12/width_16k/average_l0_82/params.npz`, or in Gemma Scope 2 `resid_post/layer_12_width_16k_l0_medium/`
with `params.safetensors` and `config.json`, which says what it is wherever the folder has gone. Tensors W_enc [d, F],
W_dec [F, d], b_enc, b_dec, threshold, with w_ in some releases. f = relu(z) 1[z > threshold], z = x W_enc + b_enc,
nothing is subtracted.

The sites are the output of the block (res), of the norm after the MLP (mlp: what it adds to the residual stream), and
for attention the heads before the output projection (att): that is not where our `attn` sites are, so
`config.extra["site_path"]` says how to load the model for it. Embedding autoencoders were trained on embeddings before
Gemma multiplies them by √d, and are folded to read and write them after.

Transcoders write what the MLP adds to the residual stream. Those of Gemma Scope 1 read the normalised stream before the
norm's gain, those of Gemma Scope 2 behind it; some of the latter have `affine_skip_connection` A [d, d], y += x A.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict

from sae._files import read_tensors
from sae.autoencoder import SITE_PATH, SKIP, ReadKind, SparseAutoencoder
from sae.errors import UserError
from sae.folding import fold_scale
from sae.formats.common import build, pick, read_entries, read_npz
from sae.formats.refusals import refusal
from sae.formats.site_names import dictionary_site, read_place
from sae.model.sites import Site, SitePath

NAME = "gemma_scope"
WEIGHTS, WEIGHTS_2, CONFIG = "params.npz", "params.safetensors", "config.json"
ATTENTION_PATH = "model.layers.{layer}.self_attn.o_proj:input"
_TENSORS = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
_AFFINE = "affine_skip_connection"
_HOOKS = (
    (r"layers\.(\d+)\.output$", "resid_{}"),
    (r"layers\.(\d+)\.self_attn\.o_proj\.input$", "attn_{}"),
    (r"layers\.(\d+)\.post_feedforward_layernorm\.output$", "mlp_{}"),
)
"""Where a dictionary of Gemma Scope 2 writes, and our sites."""


class _Config(TypedDict, total=False):
    """The entries of Gemma Scope 2's `config.json` that are read; several hooks are those of several layers."""

    type: str | None
    hf_hook_point_in: str | list[str] | None
    hf_hook_point_out: str | list[str] | None
    model_name: str | None
    architecture: str | None
    affine_connection: bool | None


def read(folder: Path) -> SparseAutoencoder:
    """The autoencoder or transcoder in a folder with `params.npz` or `params.safetensors`."""
    path = folder / WEIGHTS if (folder / WEIGHTS).is_file() else folder / WEIGHTS_2
    config = read_entries(folder / CONFIG, _Config) if (folder / CONFIG).is_file() else {}
    _refuse(config, folder)
    state = read_npz(path, [*_TENSORS, "w_enc", "w_dec"]) if path.name == WEIGHTS else read_tensors(path)
    state = {re.sub("^w_", "W_", name): tensor for name, tensor in state.items()}
    where = folder.as_posix()
    site, place = _places(config, where, path)
    names = _TENSORS | ({SKIP: _AFFINE} if place and _AFFINE in state else {})
    tensors = pick(state, names, source=path, what=f"a Gemma Scope {'transcoder' if place else 'autoencoder'}")
    tensors["W_enc"] = tensors["W_enc"].T
    if SKIP in tensors:
        tensors[SKIP] = tensors[SKIP].T
    if site == "embed":
        tensors = fold_scale(tensors, len(tensors["b_dec"]) ** 0.5)
    notes: dict[str, Any] = {}
    if site.startswith("attn"):
        notes[SITE_PATH] = str(SitePath.parse(ATTENTION_PATH).at(Site.parse(site).layer))
    return build(
        tensors,
        source=folder,
        file_format=NAME,
        architecture="jumprelu",
        subtract_b_dec=False,
        site=site,
        model=_model(where, config),
        read=place,
        notes=notes,
    )


def _refuse(config: dict[str, Any], folder: Path) -> None:
    """An error for what reads or writes several layers."""
    kind = config.get("type", "sae")
    if kind not in ("sae", "transcoder"):
        wrong = UserError(f"{folder / CONFIG} has type {kind!r}: allowed are sae and transcoder")
        raise refusal(folder, kind) or wrong
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise UserError(f"{folder / CONFIG} has architecture {config['architecture']!r}: allowed is jump_relu")
    for key in ("hf_hook_point_in", "hf_hook_point_out"):
        if isinstance(config.get(key), list):
            raise refusal(folder, "crosscoder") or UserError(f"{folder} reads or writes several layers")


def _places(config: dict[str, Any], where: str, path: Path) -> tuple[str, ReadKind | Literal[""]]:
    """The site, and the place at which a transcoder reads."""
    if "hf_hook_point_out" not in config:
        site = dictionary_site(where)
        if not _is_transcoder(where):
            return site, ""
        return site, "mlp_norm" if path.name == WEIGHTS else "mlp_in"
    out = str(config["hf_hook_point_out"])
    site = next((name.format(match[1]) for pattern, name in _HOOKS if (match := re.search(pattern, out))), "")
    if not site:
        raise UserError(f"{path.parent / CONFIG} has hf_hook_point_out {out!r}, which is no site here")
    hook = str(config.get("hf_hook_point_in", out))
    if hook == out:
        return site, ""
    if not (place := read_place(hook)):
        raise UserError(f"{path.parent / CONFIG} has hf_hook_point_in {hook!r}: a transcoder reads before the MLP here")
    return site, place  # type: ignore[return-value]


def _is_transcoder(where: str) -> bool:
    """Whether the folders say that it is a transcoder, as the releases call theirs."""
    return re.search(r"gemma-scope-[\w.-]*-transcoders\b|(^|/)transcoder(_all)?/layer_\d+_width_", where) is not None


def _model(where: str, config: dict[str, Any]) -> str:
    """google/gemma-2-2b in a path with `gemma-scope-2b-pt-res`, google/gemma-3-1b-it with `gemma-scope-2-1b-it`."""
    if name := config.get("model_name"):
        return name if "/" in name else f"google/{name}"
    if match := re.search(r"gemma-scope-2-(\w+)-(pt|it)\b", where):
        return f"google/gemma-3-{match[1]}" + ("" if match.groups() == ("270m", "pt") else f"-{match[2]}")
    if match := re.search(r"gemma-scope-(\w+)-(pt|it)-", where):
        return f"google/gemma-2-{match[1]}" + ("-it" if match[2] == "it" else "")
    return ""
