"""Gemma Scope 1 and 2 (Lieberum et al. 2024, arXiv 2408.05147): JumpReLU autoencoders for Gemma 2 and 3.

Files: `layer_12/width_16k/average_l0_82/params.npz`, or in Gemma Scope 2 `resid_post/layer_12_width_16k_l0_medium/`
`params.safetensors`. Tensors W_enc [d, F], W_dec [F, d], b_enc, b_dec, threshold, with w_ in some releases.
f = relu(z) 1[z > threshold], z = x W_enc + b_enc, nothing is subtracted.

The sites are the output of the block (res), of the norm after the MLP (mlp: what it adds to the residual stream), and
for attention the heads before the output projection (att): that is not where our `attn` sites are, so
`config.extra["site_path"]` says how to load the model for it. Embedding autoencoders were trained on embeddings before
Gemma multiplies them by √d, and are folded to read and write them after.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sae._files import read_tensors
from sae.autoencoder import SITE_PATH, SparseAutoencoder
from sae.folding import fold_scale
from sae.formats.common import build, pick, read_npz
from sae.formats.refusals import transcoder_refusal
from sae.formats.site_names import site_named
from sae.model.sites import Site, SitePath

NAME = "gemma_scope"
WEIGHTS, WEIGHTS_2 = "params.npz", "params.safetensors"
ATTENTION_PATH = "model.layers.{layer}.self_attn.o_proj:input"
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_SKIP = ("affine_skip_connection",)


def read(folder: Path) -> SparseAutoencoder:
    """The autoencoder in a folder with `params.npz` or `params.safetensors`."""
    path = folder / WEIGHTS if (folder / WEIGHTS).is_file() else folder / WEIGHTS_2
    names = [*_TENSORS, "w_enc", "w_dec", *_SKIP]
    state = read_npz(path, names) if path.name == WEIGHTS else read_tensors(path)
    state = {re.sub("^w_", "W_", name): tensor for name, tensor in state.items()}
    where = folder.as_posix()
    if "transcoder" in where or set(_SKIP) & set(state):
        raise transcoder_refusal(folder)
    tensors = pick(state, {name: name for name in _TENSORS}, source=path, what="a Gemma Scope autoencoder")
    tensors["W_enc"] = tensors["W_enc"].T
    site, width = site_named(where), len(tensors["b_dec"])
    if site == "embed":
        tensors = fold_scale(tensors, width**0.5)
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
        model=_model(where),
        notes=notes,
    )


def _model(where: str) -> str:
    """google/gemma-2-2b in a path with `gemma-scope-2b-pt-res`, google/gemma-3-1b-it with `gemma-scope-2-1b-it`."""
    if match := re.search(r"gemma-scope-2-(\w+)-(pt|it)\b", where):
        return f"google/gemma-3-{match[1]}-{match[2]}"
    if match := re.search(r"gemma-scope-(\w+)-(pt|it)-", where):
        return f"google/gemma-2-{match[1]}" + ("-it" if match[2] == "it" else "")
    return ""
