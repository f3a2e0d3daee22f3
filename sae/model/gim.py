"""GIM: a backward pass in which attention that has made up its mind still passes gradients, while a context lasts.

Edin et al. 2025 (arXiv 2505.17630). Where a softmax is saturated its derivative is next to nothing, although a change
of several scores at once would move attention: heads that could stand in for one another hide each other. The forward
pass stays as it is, bit by bit; the backward pass follows four rules, with activation functions left alone:

1. Softmax of attention: with p = softmax(s / T), T = 2, the gradient at the scores is p * (g - sum(g p)), without the
   factor 1 / T that the derivative of softmax(s / T) would have.
2. A product shares its gradient among its factors, so that it is not counted twice: queries and keys take a quarter
   (half of their product, which takes half of attention times values), values a half.
3. Gate and value of a gated MLP take a half each.
4. Norms keep their scale (`sae.model.lrp`, LN rule), those of queries and keys as well.

With T = 1, factors of 1 and free norms this is the plain gradient. Routing weights of experts keep theirs.

Torch hooks on the model's own modules do it. Inside an attention module softmaxes are caught by a torch function mode,
whichever way they are called; a fused attention kernel runs forward as it is, and its gradient is taken of the same
attention written out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sae.errors import UserError
from sae.model.forward import with_gradients
from sae.model.language_model import LanguageModel
from sae.model.lrp import QUERIES_AND_KEYS, fused_columns, gated_product, linearise, norm_rule


@dataclass(frozen=True)
class GimRules:
    """Rules of the backward pass; the paper's settings by default."""

    temperature: float = 2.0
    """T of the softmax's backward pass."""
    query_key: float = 0.25
    """Factor of the gradient at queries and at keys."""
    value: float = 0.5
    """Factor of the gradient at values."""
    gate: float = 0.5
    """Factor of the gradient at gate and value of a gated MLP."""
    freeze_norms: bool = True
    """Whether norms keep their scale."""


PLAIN = GimRules(temperature=1.0, query_key=1.0, value=1.0, gate=1.0, freeze_norms=False)
"""The plain gradient."""


@contextmanager
def gim_rules(hf: nn.Module, rules: GimRules | None = None) -> Iterator[list[str]]:
    """Gradients taken of runs of `hf` in this context follow the rules. Yields the names of attention modules in which
    no softmax was seen, as runs go through them. `UserError` where a model's parts are not recognised.
    """
    rules = rules or GimRules()
    attention: dict[str, nn.Module] = {}
    unseen: list[str] = []
    with ExitStack() as stack:
        n_norms = 0
        for name, module in hf.named_modules():
            if (factor := _attention_factor(hf, name, rules)) is not None:
                parent = name.rpartition(".")[0]
                attention[parent] = hf.get_submodule(parent)
                stack.callback(module.register_forward_hook(partial(_scale_output, factor)).remove)
            elif rule := norm_rule(module):
                n_norms += 1
                if rules.freeze_norms:
                    linearise(stack, module, rule(module))
            if (product := gated_product(module)) is not None:
                scale = partial(_scale_input, rules.gate)
                stack.callback(product.register_forward_pre_hook(scale).remove)
        if not attention or not n_norms:
            kind = "attention" if not attention else "norm"
            raise UserError(f"gim does not know the {kind} modules of {type(hf).__name__}: use ig or attrib")
        for name, module in attention.items():
            _catch_softmax(stack, module, rules.temperature, partial(unseen.append, name))
        yield unseen


# ---- products


Factor = Callable[[Tensor], Tensor | float]
"""What the gradient of a module's output is multiplied with."""


def _attention_factor(hf: nn.Module, name: str, rules: GimRules) -> Factor | None:
    """For a module that computes queries, keys or values; None for others. In latent attention what keys and values
    are made of together passes as it is.
    """
    child = name.rpartition(".")[2]
    if child in QUERIES_AND_KEYS:
        return lambda out: rules.query_key
    if child == "v_proj":
        return lambda out: rules.value
    columns = fused_columns(hf, name)
    if columns is None:
        return None
    groups, values = columns
    of_values = 1.0 if child == "kv_a_proj_with_mqa" else rules.value

    def factor(out: Tensor) -> Tensor:
        width = out.shape[-1] // groups
        row = out.new_full((width,), rules.query_key)
        row[values(width)] = of_values
        return row.repeat(groups)

    return factor


def _scale_output(factor: Factor, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
    if out.requires_grad:
        scale = factor(out.detach())
        out.register_hook(lambda gradient: gradient * scale)


def _scale_input(factor: float, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x = args[0]
    if not (torch.is_grad_enabled() and x.requires_grad):
        return args
    x = x.view_as(x)  # the hook is of this use of x alone
    x.register_hook(lambda gradient: gradient * factor)
    return (x, *args[1:])


# ---- softmax


def softmax_gradient(scores: Tensor, gradient: Tensor, dim: int, temperature: float) -> Tensor:
    """p * (g - sum(g p)) with p = softmax(scores / temperature), in at least 32 bits; 0 where everything is masked."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    p = torch.softmax(scores.to(wide) / temperature, dim).nan_to_num(0.0)
    g = gradient.to(wide)
    return p * (g - (g * p).sum(dim, keepdim=True))


class _Softmax(torch.autograd.Function):
    """A softmax as it was called, with the gradient of the rule."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, call: Callable[[], Tensor], dim: int, temperature: float) -> Tensor:
        ctx.save_for_backward(scores)
        ctx.options = dim, temperature
        return call()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (scores,) = ctx.saved_tensors
        return softmax_gradient(scores, gradients[0], *ctx.options).to(scores.dtype), None, None, None


class _FusedAttention(torch.autograd.Function):
    """A fused kernel as it was called, with the gradient of the same attention written out."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Callable[[], Tensor], written_out: Callable[..., Tensor]
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.written_out = written_out
        return call()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.written_out(*leaves)
        return (*torch.autograd.grad(out, leaves, gradients[0].to(out)), None, None)


def written_out_attention(
    q: Tensor, k: Tensor, v: Tensor, *, temperature: float, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Compute `torch.nn.functional.scaled_dot_product_attention` without dropout as products and a softmax of the rule;
    q [..., H, L, d], k and v [..., H, S, d], or fewer heads with `enable_gqa`.
    """
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = _Softmax.apply(scores, lambda: torch.softmax(scores, -1).nan_to_num(0.0), -1, temperature)
    return weights @ v


SOFTMAXES = (functional.softmax, torch.softmax, torch.Tensor.softmax)
FUSED_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class _Softmaxes(TorchFunctionMode):
    """Gives the softmaxes that are computed while it is active, and fused attention, the gradient of the rule."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature, self.n_seen = temperature, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        call = partial(func, *args, **kwargs)
        if func in SOFTMAXES:
            self.n_seen += 1
            scores = args[0] if args else kwargs["input"]
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            return _Softmax.apply(scores, call, dim, self.temperature)
        if func is functional.scaled_dot_product_attention:
            self.n_seen += 1
            given = dict(zip(FUSED_ARGUMENTS, args, strict=False)) | kwargs
            q, k, v = (given.pop(name) for name in FUSED_ARGUMENTS[:3])
            written_out = partial(written_out_attention, temperature=self.temperature, **given)
            return _FusedAttention.apply(q, k, v, call, written_out)
        return call()


def _catch_softmax(stack: ExitStack, module: nn.Module, temperature: float, not_seen: Callable[[], None]) -> None:
    """Softmaxes inside the module have the gradient of the rule; `not_seen` is called where it computes none."""
    active: list[_Softmaxes] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            active.append(_Softmaxes(temperature))
            active[-1].__enter__()

    def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if active:
            mode = active.pop()
            mode.__exit__(None, None, None)
            if not mode.n_seen:
                not_seen()

    stack.callback(module.register_forward_pre_hook(before).remove)
    stack.callback(module.register_forward_hook(after, always_call=True).remove)


# ---- what is not covered

_COVERED: WeakSet[nn.Module] = WeakSet()


@with_gradients
def check_covered(model: LanguageModel) -> None:
    """`UserError` unless every attention module computes a softmax that the rules reach. Tried once for each model."""
    if model.hf in _COVERED:
        return
    with gim_rules(model.hf) as unseen:
        LanguageModel.run(model, model.probe_tokens(), capture=[model.sites[0]], grad=True)
    if unseen:
        raise UserError(
            f"gim does not cover all parts of model {model.name!r}: no softmax is seen in {unseen[0]}: use ig or attrib"
        )
    _COVERED.add(model.hf)
