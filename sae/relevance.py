"""Relevance propagation: a backward pass made linear while a context manager lasts, and an unchanged forward pass.

Layer-wise relevance propagation asks what each input contributed, not what a small change of it would do. Four rules
(Achtibat et al. 2024, AttnLRP; Jafari et al. 2025, arXiv 2508.21258) replace every nonlinear step y(x) by a
map that is linear in x and has the same value at x:

1. LN rule: a norm's scale is a constant. LayerNorm y = gain (x - mean x) / sigma + bias with sigma fixed, RMSNorm
   y = gain x / rms with rms fixed.
2. Identity rule: an activation function is a constant factor, y = x (f(x) / x); f'(0) stands for 0 / 0.
3. AH rule: attention probabilities are constants; relevance goes through the values alone.
4. Half rule: in a gated MLP the product of gate and value gives each factor half of the gradient.

The logits are then multilinear in the inputs and biases, so that input x gradient, summed over all inputs and biases,
is conserved from layer to layer. What comes after the last norm is left alone (a final soft cap keeps its gradient).

Torch hooks on the model's own modules do it, so no model is forked or wrapped: a module that a rule concerns computes
its output from a detached input, and the linear map is added as a zero that only the backward pass sees. They do
nothing where gradients are not recorded. Because what is added bypasses the module, runs in this context may read
sites but not edit or skip them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS

from sae.errors import UserError

Linear = Callable[[Tensor, Tensor], Tensor]  # (x, y = module(x)) -> a tensor linear in x, with constants read off both


@contextmanager
def relevance_rules(hf: nn.Module) -> Iterator[None]:
    """Gradients taken of runs of `hf` in this context follow the four rules. `UserError` where a model's parts are
    not recognised.
    """
    with ExitStack() as stack:
        found = {"norm": 0, "activation": 0, "attention": 0}
        for name, module in hf.named_modules():
            if linear := _norm_rule(module):
                found["norm"] += 1
                _linearise(stack, module, linear)
            elif isinstance(module, ACTIVATIONS):
                found["activation"] += 1
                _linearise(stack, module, constant_factor)
            elif constant := _constant_part(hf, name, module):
                found["attention"] += 1
                stack.callback(module.register_forward_hook(constant).remove)
            if _is_gated_mlp(module):
                stack.callback(module.down_proj.register_forward_pre_hook(_halve_gradient).remove)
        if missing := [kind for kind, n in found.items() if not n]:
            raise UserError(
                f"relp does not know the {' and '.join(missing)} modules of {type(hf).__name__}: use ig or attrib"
            )
        yield


def _linearise(stack: ExitStack, module: nn.Module, linear: Linear) -> None:
    """y keeps its value; its gradient goes to x through `linear` alone."""
    inputs: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = args[0]
        if not (torch.is_grad_enabled() and x.requires_grad):
            return None
        inputs.append(x)
        return (x.detach().requires_grad_(), *args[1:])

    def after(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        if not inputs:
            return y
        line = linear(inputs.pop(), y.detach())
        return y + (line - line.detach()).to(y.dtype)

    stack.callback(module.register_forward_pre_hook(before).remove)
    stack.callback(module.register_forward_hook(after).remove)


# ---- LN rule


def _norm_rule(module: nn.Module) -> Linear | None:
    """The rule of a norm, by its class; None for anything else."""
    name = type(module).__name__
    if isinstance(module, nn.LayerNorm):
        return _layer_norm(module)
    if "RMSNorm" in name:
        return _rms_norm(module)
    return None


def _layer_norm(module: nn.LayerNorm) -> Linear:
    dims = tuple(range(-len(module.normalized_shape), 0))

    def linear(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            scale = torch.rsqrt(x.float().var(dims, keepdim=True, unbiased=False) + module.eps)
            scale = scale if module.weight is None else scale * module.weight
        return (x - x.mean(dims, keepdim=True)) * scale

    return linear


def _rms_norm(module: nn.Module) -> Linear:
    """The gain is what the norm itself makes of a vector of ones (some families store it minus one)."""
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if getattr(module, name, None)), 0.0)

    def linear(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            gain = type(module).forward(module, x.new_ones(x.shape[-1])) * (1 + eps) ** 0.5
            scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps) * gain
        return x * scale

    return linear


# ---- identity rule

ACTIVATIONS: tuple[type[nn.Module], ...] = tuple(
    {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}
    | {nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU}
)
"""Classes of activation functions that Hugging Face models are built from."""


def constant_factor(x: Tensor, y: Tensor) -> Tensor:
    """x (y / x) with the ratio held constant; where |x| is below the number type's resolution the ratio is 1/2, the
    slope at 0 of GELU and SiLU.
    """
    with torch.no_grad():
        near_zero = x.abs() < torch.finfo(x.dtype).eps
        ratio = torch.where(near_zero, 0.5, y / x.masked_fill(near_zero, 1.0))
    return x * ratio


# ---- AH rule


def _constant_part(hf: nn.Module, name: str, module: nn.Module) -> Callable[..., Tensor] | None:
    """A hook under which queries and keys are constants, for the module that computes them; None for others."""
    parent_name, _, own = name.rpartition(".")
    if own in ("q_proj", "k_proj"):
        return lambda module, args, out: out.detach()
    if own == "c_attn":
        return _first_of_three(groups=1)
    if own == "query_key_value":
        heads = hf.get_submodule(parent_name).config.num_attention_heads
        return _first_of_three(groups=heads)
    return None


def _first_of_three(*, groups: int) -> Callable[..., Tensor]:
    """For outputs [..., groups * (q, k, v)]: q and k constant, v as it is."""

    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        q, k, v = out.unflatten(-1, (groups, -1)).chunk(3, dim=-1)
        return torch.cat([q.detach(), k.detach(), v], -1).flatten(-2)

    return hook


# ---- half rule


def _is_gated_mlp(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj"))


def _halve_gradient(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Half the gradient for the product is half the gradient for each of its factors."""
    h = args[0]
    return (h.detach() + 0.5 * (h - h.detach()), *args[1:])
