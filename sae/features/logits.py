"""The direct effect of features on the logits: what one unit of a feature adds to each, the final norm's scale aside.

    L_iv = Σ_d W_U[v, d] · g_d · (W_dec[i] − mean W_dec[i])_d

with W_U the unembedding and g the gain of the final norm; the mean is taken away where that norm does so. This is the
logit lens (nostalgebraist 2020) of a decoder row. At early sites it says little: later layers rewrite the direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sae.model.device_map import weight_of
from sae.model.forward import forward_inputs
from sae.model.language_model import LanguageModel
from sae.model.lrp import norm_gain, norm_rule

CHUNK_BYTES = 64 * 2**20
LOGIT_BINS = 40


@torch.no_grad()
def final_gain(model: LanguageModel) -> tuple[Tensor, bool]:
    """The gain [d] of the norm before the unembedding, and whether it takes the mean away; ones where there is none.

    It is the last norm that runs in a forward pass, unless that is inside the last block.
    """
    called: list[tuple[str, torch.device]] = []
    hooks = [
        module.register_forward_hook(lambda *of_call, name=name: called.append((name, of_call[-1].device)))
        for name, module in model.hf.named_modules()
        if norm_rule(module)
    ]
    try:
        model.hf(**forward_inputs(model.hf, model.probe_tokens()))
    finally:
        for hook in hooks:
            hook.remove()
    ones = torch.ones(model.d_model, device=model.device, dtype=model.hf.get_output_embeddings().weight.dtype)
    last_block = str(model.site_paths[model.sites[-1]].module)
    if not called or called[-1][0].startswith(f"{last_block}."):
        return ones.float(), False
    name, device = called[-1]
    gain, centred = norm_gain(model.hf.get_submodule(name), ones.to(device))
    return gain.to(model.device).float(), centred


def unembedding(model: LanguageModel) -> Tensor | None:
    """W_U [V, d], on the device it is used on; None where the model has none or is elsewhere."""
    module = None if model.server else model.hf.get_output_embeddings()
    return None if module is None else weight_of(module)


def logit_rows(model: LanguageModel, W_dec: Tensor) -> Iterator[Tensor]:
    """L of decoder rows [n, d] in blocks [rows, V]; nothing where there is no unembedding of that width."""
    W_U = unembedding(model)
    if W_U is None or W_U.shape[-1] != W_dec.shape[-1]:
        return
    gain, centred = final_gain(model)
    weight = W_U.to(model.device).float()  # [V, d]
    for rows in W_dec.to(weight).split(max(1, CHUNK_BYTES // (4 * len(weight)))):
        rows = rows - rows.mean(-1, keepdim=True) if centred else rows
        yield (rows * gain) @ weight.T


def direct_effects(model: LanguageModel, W_dec: Tensor, *, k: int) -> list[dict[str, Any]]:
    """For each decoder row [n, d]: the k tokens whose logits it raises and lowers most, and a histogram of all.

    Returns:
        `top_logits` and `bottom_logits`, lists of (token, logit), and `logit_histogram` with `edges` and `counts`; no
        entries where the model has no unembedding of that width.
    """
    described: list[dict[str, Any]] = []
    for logits in logit_rows(model, W_dec):
        k = min(k, logits.shape[-1])
        lists = {}
        for name, largest in (("top_logits", True), ("bottom_logits", False)):
            values, ids = logits.topk(k, dim=-1, largest=largest)
            tokens = model.token_strings(ids.flatten())
            rows = [tokens[start : start + k] for start in range(0, len(tokens), k)]
            lists[name] = [
                list(zip(row, of_row, strict=True)) for row, of_row in zip(rows, values.tolist(), strict=True)
            ]
        for row, of_row in enumerate(logits.cpu()):
            described.append({name: rows[row] for name, rows in lists.items()} | {"logit_histogram": histogram(of_row)})
    return described or [{} for _ in W_dec]


def histogram(values: Tensor, bins: int = LOGIT_BINS) -> dict[str, Any]:
    """Counts of values [V] in equal bins from the smallest to the largest."""
    counts, edges = torch.histogram(values.double(), bins)
    return {"edges": edges.tolist(), "counts": counts.long().tolist()}
