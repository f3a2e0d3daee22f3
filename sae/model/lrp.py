"""Relevance propagation: a backward pass made linear while a context manager lasts, and an unchanged forward pass.

Layer-wise relevance propagation asks what each input contributed, not what a small change of it would do. Four rules
(Achtibat et al. 2024, AttnLRP; Jafari et al. 2025, arXiv 2508.21258) replace every nonlinear step y(x) by a
map that is linear in x and has the same value at x:

1. LN rule: a norm's scale is a constant. LayerNorm y = gain (x - mean x) / sigma + bias with sigma fixed, RMSNorm
   y = gain x / rms with rms fixed.
2. Identity rule: an activation function is a constant factor, y = x (f(x) / x); f'(0) stands for 0 / 0.
3. AH rule: attention probabilities are constants; relevance goes through the values alone.
4. Half rule: in a gated MLP the product of gate and value gives each factor half of the gradient.

In layers of experts the routing weights are constants. The logits are then multilinear in the inputs and biases, so
that input x gradient, summed over all inputs and biases, is conserved from layer to layer: `check_conserved` tries
that, and refuses a model with parts that no rule covers. What comes after the last norm is left alone (a final soft cap
keeps its gradient).

Torch hooks on the model's own modules do it, so no model is forked or wrapped: a module that a rule concerns computes
its output from a detached input, and the linear map is added as a zero that only the backward pass sees. They do
nothing where gradients are not recorded. Because what is added bypasses the module, runs in this context may read
sites but not edit or skip them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import Parameter, signature
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS

from sae.errors import UserError
from sae.model.device_map import fetched, is_offloaded
from sae.model.forward import is_exact, with_gradients
from sae.model.language_model import LanguageModel

Linear = Callable[[Tensor, Tensor], Tensor]  # (x, y = module(x)) -> a tensor linear in x, with constants read off both


@contextmanager
def relevance_rules(hf: nn.Module) -> Iterator[None]:
    """Gradients taken of runs of `hf` in this context follow the four rules. `UserError` where a model's parts are
    not recognised.
    """
    with ExitStack() as stack:
        replaced = {"norm": 0, "activation": 0, "attention": 0}
        for name, module in hf.named_modules():
            if constant := _constant_part(hf, name, module):
                replaced["attention"] += 1
                stack.callback(module.register_forward_hook(constant).remove)
            elif rule := norm_rule(module):
                replaced["norm"] += 1
                linearise(stack, module, rule(module))
            elif _is_activation(module):
                replaced["activation"] += 1
                linearise(stack, module, constant_factor)
            if (product := gated_product(module)) is not None:
                stack.callback(product.register_forward_pre_hook(_halve_gradient).remove)
            if _has(module, "experts"):
                for router in (child for part, child in module.named_children() if part.endswith(("gate", "router"))):
                    stack.callback(router.register_forward_hook(_constant_outputs).remove)
        if missing := [kind for kind, n in replaced.items() if not n]:
            raise UserError(
                f"relp does not know the {' and '.join(missing)} modules of {type(hf).__name__}: use ig or attrib"
            )
        yield


def linearise(stack: ExitStack, module: nn.Module, linear: Linear) -> None:
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
        line = linear(inputs.pop().to(y.device), y.detach())
        return y + (line - line.detach()).to(y.dtype)

    stack.callback(module.register_forward_pre_hook(before).remove)
    stack.callback(module.register_forward_hook(after).remove)


# ---- LN rule


def norm_rule(module: nn.Module) -> Callable[[nn.Module], Linear] | None:
    """The rule of a norm of the last dimension, by its class; None for anything else, such as a norm with a gate."""
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        return None
    others = list(signature(type(module).forward).parameters.values())[2:]  # after self and x
    if any(other.default is Parameter.empty or "gate" in other.name for other in others):
        return None
    name = type(module).__name__
    if isinstance(module, nn.LayerNorm) or "RMSNorm" in name:
        return _norm
    if name.endswith(("LayerNorm", "L2Norm")) and not list(module.children()):
        return _norm
    return None


@contextmanager
def frozen_norms(hf: nn.Module) -> Iterator[None]:
    """Gradients taken of runs in this context take the scale of every norm for a constant, as that of the run:
    queries and keys are affine in the residual stream that their layer reads.
    """
    with ExitStack() as stack:
        for module in hf.modules():
            if rule := norm_rule(module):
                linearise(stack, module, rule(module))
        yield


def _norm(module: nn.Module) -> Linear:
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if getattr(module, name, None)), 0.0)

    def linear(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            gain, centred = norm_gain(module, x.new_ones(x.shape[-1]), eps)
            wide = x.float()
            square = wide.var(-1, keepdim=True, unbiased=False) if centred else wide.square().mean(-1, keepdim=True)
            scale = torch.rsqrt(square + eps) * gain
        return (x - x.mean(-1, keepdim=True) if centred else x) * scale

    return linear


def norm_gain(module: nn.Module, ones: Tensor, eps: float = 0.0) -> tuple[Tensor, bool]:
    """The gain [d] of a norm and whether it takes the mean away, from what it makes of three known vectors (`ones` [d]
    is one of them): some families store the gain minus one, some have none.
    """
    of_norm = partial(type(module).forward, module)
    with fetched(module):
        bias = of_norm(torch.zeros_like(ones))
        centred = bool(((of_norm(ones) - bias).abs() < 1e-2 * of_norm(_spread(ones)).abs().max()).all())
        probe = _spread(ones) if centred else ones
        return (of_norm(probe) - bias) / probe * (1 + eps) ** 0.5, centred


def _spread(ones: Tensor) -> Tensor:
    """A vector of mean 0 and variance 1 without a zero."""
    x = torch.arange(len(ones), dtype=torch.float64).sqrt()  # on the CPU: MPS has no float64
    return ((x - x.mean()) / x.std(unbiased=False)).to(ones)


# ---- identity rule

ACTIVATIONS: tuple[type[nn.Module], ...] = tuple(
    {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}
    | {nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU}
)
"""Classes of activation functions that Hugging Face models are built from."""
ACTIVATION_NAME = re.compile(r"gelu|silu|relu|swish", re.IGNORECASE)


def _is_activation(module: nn.Module) -> bool:
    """By class, or by the name of a class of its own without parameters."""
    if isinstance(module, ACTIVATIONS):
        return True
    own_class = ACTIVATION_NAME.search(type(module).__name__) and not list(module.children())
    return bool(own_class) and not list(module.parameters())


def constant_factor(x: Tensor, y: Tensor) -> Tensor:
    """x (y / x) with the ratio held constant; where |x| is below the number type's resolution the ratio is 1/2, the
    slope at 0 of GELU and SiLU.
    """
    with torch.no_grad():
        near_zero = x.abs() < torch.finfo(x.dtype).eps
        ratio = torch.where(near_zero, 0.5, y / x.masked_fill(near_zero, 1.0))
    return x * ratio


# ---- AH rule


QUERIES_AND_KEYS = ("q_proj", "k_proj", "q_b_proj")
CONSTANT = (*QUERIES_AND_KEYS, "q_norm", "k_norm", "q_layernorm", "k_layernorm")
"""Modules whose whole output are queries or keys."""
Columns = Callable[[int], slice]
"""The columns of values among so many of queries, keys and values."""


def _constant_part(hf: nn.Module, name: str, module: nn.Module) -> Callable[..., Tensor] | None:
    """A hook under which queries and keys are constants, for the module that computes them; None for others."""
    child_name = name.rpartition(".")[2]
    if child_name in CONSTANT:
        return lambda module, args, out: out.detach()
    columns = fused_columns(hf, name)
    return None if columns is None else _only_values(*columns)


def fused_columns(hf: nn.Module, name: str) -> tuple[int, Columns] | None:
    """The groups of columns of a module that computes values together with queries or keys, and which of a group are
    values; None for any other module.
    """
    parent_name, _, child_name = name.rpartition(".")
    if child_name not in _FUSED:
        return None
    attention = hf.get_submodule(parent_name)
    config: Any = getattr(attention, "config", None) or getattr(hf, "config", None)
    return _FUSED[child_name](attention, config)


def _last_third(width: int) -> slice:
    return slice(width - width // 3, width)


def _joined(attention: Any, config: Any) -> tuple[int, Columns]:
    """(queries, keys, values), each of all heads; GPT-BigCode has one head of keys and values, or joins by heads."""
    if getattr(attention, "multi_query", False):
        return 1, lambda width: slice(width - attention.head_dim, width)
    return config.num_attention_heads if hasattr(attention, "multi_query") else 1, _last_third


def _by_heads(attention: Any, config: Any) -> tuple[int, Columns]:
    """For each head of keys its queries, the key and the value; the key is every query's own but in Falcon."""
    groups = getattr(attention, "num_kv_heads", config.num_attention_heads)
    heads = config.num_attention_heads // groups + 2
    return groups, lambda width: slice(width - width // heads, width)


def _joined_by_sizes(attention: Any, config: Any) -> tuple[int, Columns]:
    """Split as `_joined`, with fewer heads of keys and values than of queries; CodeGen has four groups of (q, v, k)."""
    if not getattr(config, "num_key_value_heads", None):
        return 4, lambda width: slice(width // 3, width - width // 3)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 1, lambda width: slice(width - config.num_key_value_heads * head, width)


_FUSED: dict[str, Callable[[Any, Any], tuple[int, Columns]]] = {
    "c_attn": _joined,
    "Wqkv": _joined,
    "query_key_value": _by_heads,
    "qkv_proj": _joined_by_sizes,
    "kv_a_proj_with_mqa": lambda attention, config: (1, lambda width: slice(0, width - config.qk_rope_head_dim)),
    "kv_b_proj": lambda attention, config: (
        config.num_attention_heads,
        lambda width: slice(width - config.v_head_dim, width),
    ),
}
"""Modules that compute queries, keys and values at once: the groups of their columns, and which of a group are values
(or, in latent attention, what values are made of).
"""


def _only_values(groups: int, values: Columns) -> Callable[..., Tensor]:
    """For outputs [..., groups * columns]: these columns of each group as they are, the rest constant."""

    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        grouped = out.unflatten(-1, (groups, -1))
        is_value = torch.zeros(grouped.shape[-1], dtype=torch.bool, device=out.device)
        is_value[values(len(is_value))] = True
        return torch.where(is_value, grouped, grouped.detach()).flatten(-2)

    return hook


# ---- half rule


def gated_product(module: nn.Module) -> nn.Module | None:
    """The module whose input has half the gradient when each factor of a gated MLP's product has half of its own; None
    where there is no gate. Of experts that are all in one tensor it is the whole, whose input reaches both factors.
    """
    if _is_gated_mlp(module):
        return module.get_submodule("down_proj")
    return module if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter) else None


def _is_gated_mlp(module: nn.Module) -> bool:
    names = {name for name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj") if _has(module, name)}
    return names in ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})


def _has(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Module)


def _halve_gradient(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Half the gradient for the product is half the gradient for each of its factors."""
    h = args[0]
    return (h.detach() + 0.5 * (h - h.detach()), *args[1:])


# ---- experts


def _constant_outputs(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
    """Routing weights are constants."""
    if isinstance(out, tuple):
        return tuple(value.detach() if isinstance(value, Tensor) else value for value in out)
    return out.detach()


# ---- conservation

CONSERVED_WITHIN, CONSERVED_WITHIN_16_BIT = 1e-3, 5e-2
_CONSERVED: WeakSet[nn.Module] = WeakSet()


@with_gradients
def check_conserved(model: LanguageModel) -> None:
    """`UserError` unless, on a few random tokens, the relevance of all inputs and biases adds up to what it is of: the
    squared length of what the head reads. Tried once for each model.
    """
    if model.hf in _CONSERVED:
        return
    head, heard = model.hf.get_output_embeddings(), []
    biases = [x for name, x in model.hf.named_parameters() if name.endswith("bias") and x.is_floating_point()]
    first = model.sites[0]
    if biases and is_offloaded(model.hf):
        raise UserError(
            f"relp needs the gradients of the biases of model {model.name!r}, and weights wait in main memory or on "
            "disk: leave nothing there with --device-map, or use ig or attrib"
        )
    with ExitStack() as stack:
        stack.enter_context(relevance_rules(model.hf))
        stack.callback(head.register_forward_pre_hook(lambda module, args: heard.append(args[0])).remove)
        for x in biases:
            x.requires_grad_(True)
            stack.callback(x.requires_grad_, False)
        x = LanguageModel.run(model, model.probe_tokens(), capture=[first], grad=True).activations[first]
        m = (heard[0] * heard[0].detach()).sum()
        gradients = torch.autograd.grad(m, [x, *biases], allow_unused=True)
    pairs = zip([x, *biases], gradients, strict=True)
    relevance = sum(
        float((part.detach().cpu().double() * g.cpu().double()).sum()) for part, g in pairs if g is not None
    )
    share = relevance / float(m.detach())
    if not abs(share - 1) <= (CONSERVED_WITHIN if is_exact(model.dtype) else CONSERVED_WITHIN_16_BIT):
        raise UserError(
            f"relp does not cover all parts of model {model.name!r}: the relevance of its inputs adds up to "
            f"{share:.3f} times what it is of, and 1 is right: use ig or attrib"
        )
    _CONSERVED.add(model.hf)
