"""Attention that stays where it is while a model is edited: every head looks where it looks in the unedited run.

An edit then acts through what heads copy, not through where they look: of the two ways in which an earlier feature
reaches a later one, the straight one alone (`freeze_attention` of circuit-tracer).

1. The text is run without edits; every head's weights [B, H, S, S] are kept.
2. The edited run multiplies these with its own values. Norms and MLPs see what they see.
3. In generation the prompt's tokens attend as in the unedited model, the tokens generated after them as they do.

Memory: B H S^2 numbers a layer while a batch runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from sae.errors import UserError
from sae.model.attention import AttentionHeads, attention_heads
from sae.model.site_search import is_exact

AGREE_WITHIN, AGREE_WITHIN_16_BIT = 1e-4, 5e-2
"""How far logits may move, of their largest, when every head is given the weights it has anyway."""
_CAN_FREEZE: WeakSet[nn.Module] = WeakSet()


@contextmanager
def as_unedited(hf: nn.Module, run_unedited: Callable[[], object]) -> Iterator[None]:
    """Runs of a text in this context attend as `run_unedited()`, a run of the same text, does."""
    with torch.no_grad(), attention_heads(hf) as heads:
        run_unedited()
    with attention_heads(hf, weights=_weights(heads)):
        yield


@torch.no_grad()
def check_can_freeze(model: Any) -> None:
    """`UserError` unless all attention of a `LanguageModel` is weights times values. Tried once for each model."""
    if model.hf in _CAN_FREEZE:
        return
    tokens = model.probe_tokens()
    logits = model.run(tokens).logits
    with attention_heads(model.hf) as heads:
        model.run(tokens)
    unseen = [str(site) for site in model.sites if site.kind == "attn" and site.layer not in heads]
    if not heads or unseen:
        raise UserError(
            f"the attention of model {model.name!r} cannot be frozen: {unseen[0] if unseen else 'it'} does not call "
            "one of transformers' attention functions; leave out freeze"
        )
    with attention_heads(model.hf, weights=_weights(heads)):
        moved = (model.run(tokens).logits - logits).abs().max() / logits.abs().max()
    if moved > (AGREE_WITHIN if is_exact(model.dtype) else AGREE_WITHIN_16_BIT):
        raise UserError(
            f"the attention of model {model.name!r} cannot be frozen: it is more than weights times values (logits "
            f"move by {moved:.2g} of their size); leave out freeze"
        )
    _CAN_FREEZE.add(model.hf)


def _weights(heads: dict[int, AttentionHeads]) -> dict[int, Tensor]:
    return {layer: of_layer.weights for layer, of_layer in heads.items()}
