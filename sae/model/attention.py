"""The heads of a model's attention modules in one run: queries, keys, what each head writes, and its weights.

Attention modules of transformers compute queries and keys, norms and rotary positions included, and call a function
that the model's config names. While `attention_heads` lasts the name is one of ours: it keeps what it is called with,
with the graph that leads there, and computes the same by the architecture's own written-out attention, which says the
weights. Weights may be given instead, such as those of another run of the same text.

An edit of a model whose attention is frozen acts through what heads copy, not through where they look: of the two ways
in which an earlier feature reaches a later one, the straight one alone (`freeze_attention` of circuit-tracer).

1. The text is run without edits; every head's weights [B, H, S, S] are kept while the batch runs.
2. The edited run multiplies these with its own values. Norms and MLPs see what they see.
3. In generation the prompt's tokens attend as in the unedited model, the tokens generated after them as they do.

Legend: B examples, S positions, H heads of queries, G heads of keys (H is a multiple of G), d_h width of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from sae.errors import UserError
from sae.model.forward import is_exact

NAME = "sfc_attention_heads"
LARGE_WEIGHT = 1e-4
"""Attention weights above this are compared with the scores."""
AGREE_WITHIN, AGREE_WITHIN_16_BIT = 1e-3, 0.2
"""How far logarithms of weights and scores may be apart."""
FROZEN_WITHIN, FROZEN_WITHIN_16_BIT = 1e-4, 5e-2
"""How far logits may move, of their largest, when every head is given the weights it has anyway."""
_CAN_FREEZE: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True)
class AttentionHeads:
    """The heads of one attention module in one run."""

    query: Tensor
    """[B, H, S, d_h] as keys are multiplied with it: after norms and rotary positions."""
    key: Tensor
    """[B, G, S, d_h] of the same kind."""
    output: Tensor
    """[B, S, H, d_v] what each head gives to the output projection: its weights times its values."""
    weights: Tensor
    """[B, H, S, S] attention of each query position to each key position."""
    scale: float
    """What a query times a key is multiplied by to be a score."""
    softcap: float | None
    """Where scores are capped, c tanh(score / c); None where they are not."""

    @property
    def n_heads(self) -> int:
        """Number of query heads H."""
        return self.query.shape[1]

    def to(self, device: torch.device) -> AttentionHeads:
        """The same on a device, with the graph that leads there."""
        tensors = {name: getattr(self, name).to(device) for name in ("query", "key", "output", "weights")}
        return replace(self, **tensors)

    def key_of(self, head: int) -> Tensor:
        """[B, S, d_h] the keys that a query head meets; grouped heads share one."""
        return self.key[:, head * self.key.shape[1] // self.n_heads]

    def scores(self, head: int, rows: Tensor) -> Tensor:
        """[B, S] score of every key for the query at column `rows` [B] of each example, before a soft cap: scale * (q .
        k); float64 on the CPU.
        """
        example = torch.arange(len(rows), device=rows.device)
        query, keys = (x.detach().cpu().double() for x in (self.query[example, head, rows], self.key_of(head)))
        return self.scale * torch.einsum("bd,bsd->bs", query, keys)

    def weights_at(self, head: int, rows: Tensor) -> Tensor:
        """[B, S] attention of the query at column `rows` [B] of each example; float64 on the CPU."""
        example = torch.arange(len(rows), device=rows.device)
        return self.weights[example, head, rows].detach().cpu().double()

    def capped(self, scores: Tensor) -> Tensor:
        """The scores that enter the softmax."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def check(self, head: int, rows: Tensor, name: str) -> None:
        """`UserError` unless the model's weights at these query columns are the softmax of the scores: something else
        is added to the scores then, such as a bias that depends on the distance.
        """
        weights = self.weights_at(head, rows)
        large = weights > LARGE_WEIGHT
        gap = torch.where(large, weights.clamp(min=LARGE_WEIGHT).log() - self.capped(self.scores(head, rows)), 0.0)
        mean = gap.sum(-1, keepdim=True) / large.sum(-1, keepdim=True).clamp(min=1)
        worst = torch.where(large, (gap - mean).abs(), 0.0).max()
        if worst > (AGREE_WITHIN if is_exact(self.query.dtype) else AGREE_WITHIN_16_BIT):
            raise UserError(
                f"attention scores of {name} are more than queries times keys (a bias of positions is added, for "
                "example): they cannot be split over pairs of features"
            )


HeadEdit = Callable[[int, Tensor], Tensor]
"""Number of a layer and what its heads give to the output projection [B, S, H, d_v] -> what is given instead."""
Watched = tuple[dict[int, AttentionHeads], HeadEdit | None, Mapping[int, Tensor]]
_HEADS: WeakKeyDictionary[nn.Module, Watched] = WeakKeyDictionary()
"""Attention modules of a model whose heads are kept, with where, how they are edited, and weights that are given."""


@contextmanager
def attention_heads(
    hf: nn.Module, edit: HeadEdit | None = None, *, weights: Mapping[int, Tensor] | None = None
) -> Iterator[dict[int, AttentionHeads]]:
    """Yields a mapping that every run of the model in this context fills: number of the layer -> its heads, after the
    edit, if there is one. `weights` [B, H, S, S] by layer take the place of those the first S tokens would have.
    """
    heads: dict[int, AttentionHeads] = {}
    modules = [module for module in hf.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    configs: list[Any] = []
    for module in hf.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation") and not any(config is other for other in configs):
            configs.append(config)
    names = [config._attn_implementation for config in configs]
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    try:
        for config in configs:
            config._attn_implementation = NAME
        _HEADS.update(dict.fromkeys(modules, (heads, edit, weights or {})))
        yield heads
    finally:
        for module in modules:
            _HEADS.pop(module, None)
        for config, name in zip(configs, names, strict=True):  # a config sets those inside it, which come later
            config._attn_implementation = name


def heads_of(heads: dict[int, AttentionHeads], layer: int, name: str) -> AttentionHeads:
    """The heads of a layer after a run; UserError for a model whose attention modules work another way."""
    if layer not in heads:
        raise UserError(
            f"the heads of attn_{layer} of model {name!r} cannot be seen: its attention does not call one of "
            "transformers' attention functions"
        )
    return heads[layer]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute attention as the architecture's written-out function does; the heads are stored where somebody waits for
    them.
    """
    output, weights = _written_out(module)(module, query, key, value, attention_mask, scaling=scaling, **options)
    if module in _HEADS:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        heads, edit, given = _HEADS[module]
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        output, weights = (output, weights) if layer not in given else _given(given[layer], weights, value, output)
        output = output if edit is None else edit(layer, output)
        heads[layer] = AttentionHeads(query, key, output, weights, float(scale), options.get("softcap"))
    return output, weights


def _given(given: Tensor, weights: Tensor, value: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, n, H, d_v] and weights [B, H, n, n] of heads where the first S of n tokens attend as in `given`
    [B, H, S, S]. Tokens that come one by one after those have their own weights.
    """
    n_given, n = given.shape[-1], output.shape[1]
    if n < n_given or value.shape[2] != n:
        return output, weights
    values = value[:, :, :n_given].repeat_interleave(given.shape[1] // value.shape[1], 1)  # [B, H, S, d_v]
    first = (given.to(value.dtype) @ values).transpose(1, 2)
    later = torch.nn.functional.pad(given.to(weights.dtype), (0, n - n_given))
    return torch.cat([first, output[:, n_given:]], 1), torch.cat([later, weights[:, :, n_given:]], 2)


def _written_out(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of the module's own file that computes attention step by step."""
    for cls in type(module).__mro__:
        if function := getattr(sys.modules[cls.__module__], "eager_attention_forward", None):
            return function
    raise UserError(
        f"{type(module).__name__} has no attention that is written out step by step: its heads are not seen"
    )


# --- attention that stays where it is ---------------------------------------------------------------------------------


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
    if moved > (FROZEN_WITHIN if is_exact(model.dtype) else FROZEN_WITHIN_16_BIT):
        raise UserError(
            f"the attention of model {model.name!r} cannot be frozen: it is more than weights times values (logits "
            f"move by {moved:.2g} of their size); leave out freeze"
        )
    _CAN_FREEZE.add(model.hf)


def _weights(heads: dict[int, AttentionHeads]) -> dict[int, Tensor]:
    return {layer: of_layer.weights for layer, of_layer in heads.items()}
