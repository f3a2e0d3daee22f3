"""The places of a block at which a transcoder of its MLP may read, found by measurement, whatever modules are called.

From the inputs and outputs of the modules in one forward pass of a few random tokens (`sae.model.site_search`):

1. the MLP is the module of the site `mlp_l`, or the one that this module (a norm after the MLP) takes its input from,
   or two matrices in a block without a module around them; `mlp_in` is its input;
2. the norm is the last module whose output is that input: `mlp_resid` is what it takes, `mlp_norm` the same normalised.
   RMS and layer norm are told apart by which of them times a gain, plus a bias, gives the norm's output; where no norm
   stands before the MLP, `mlp_resid` is `mlp_in`;
3. the down projection is the last matrix whose output is the MLP's: `mlp_hidden` is what it takes, h. Where a norm
   stands after the MLP, its scale s belongs to the neurons: h / s, so that what the site adds is linear in them.

Shapes: N tokens, d model width, H hidden neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sae.model.device_map import QUANTISED, home_device, weight_of
from sae.model.site_search import NOTHING, Call, exactly, tolerance
from sae.model.sites import SitePath

EPSILONS = ("eps", "variance_epsilon", "norm_eps", "epsilon")
"""What modules call the number that their norm adds to the variance."""


@dataclass(frozen=True)
class Norm:
    """A norm without its gain and bias."""

    centred: bool
    """Whether the mean is subtracted (layer norm) or not (RMS norm)."""
    epsilon: float
    """Added to the mean square."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., d] normalised."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide - wide.mean(-1, keepdim=True) if self.centred else wide
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)).to(x.dtype)


@dataclass(frozen=True)
class LayerReads:
    """The read places of one block, as far as they were found."""

    paths: dict[str, SitePath] = field(default_factory=dict)
    """Kind of place to its path."""
    flat: frozenset[str] = frozenset()
    """Kinds whose tensor is [B * S, d]."""
    early: bool = False
    """Whether the norm is called before the attention, with which the MLP shares it."""
    norm: Norm | None = None
    """The norm before the MLP."""
    down: str = ""
    """Path of the down projection."""
    post: str = ""
    """Path of a norm after it; "" for none."""
    post_norm: Norm | None = None
    """That norm; None also where it could not be told."""
    scale: float = 1.0
    """What the MLP's output is multiplied by before it is added to the residual stream."""


def layer_reads(
    hf: nn.Module, calls: Mapping[str, Call], block: str, mlp: SitePath, attn: SitePath | None
) -> LayerReads:
    """The read places of a block whose sites are at these paths."""
    inside = [call for call in calls.values() if call.module.startswith(f"{block}.") and call.count == 1]
    out = calls.get(mlp.module)
    if mlp.side != "output" or out is None or out.count != 1 or out.left is NOTHING:
        return LayerReads()
    attention = calls.get(attn.module) if attn is not None else None
    matrices = [call for call in inside if _weight(hf, call) is not None]
    body: Call | None = out
    post = ""
    if not _has_matrix(hf, out):  # a norm after the MLP
        body, post = _outermost(inside, out), out.module
    if body is None:
        return LayerReads()
    within = [call for call in matrices if call is body or call.module.startswith(f"{body.module}.")]
    down = next((call for call in sorted(within, key=lambda call: -call.start) if _equal(call.left, body.left)), None)
    entry = body
    if body is down:  # two matrices without a module around them
        after = attention.end if attention is not None and attention.start < body.start else -1
        entry = min((call for call in matrices if call.start > after), key=lambda call: call.start, default=body)
    if entry.entered is NOTHING:
        return LayerReads()
    entered = {"mlp_in": entry}
    norms = [c for c in inside if c.end <= entry.start and _equal(c.left, entry.entered) and c.entered is not NOTHING]
    norm = max(norms, key=lambda call: call.end, default=None)
    fitted = None if norm is None else fit_norm(hf, norm)
    entered |= {"mlp_resid": norm or entry} | ({"mlp_norm": norm} if norm is not None and fitted is not None else {})
    if down is not None and down is not entry:
        entered["mlp_hidden"] = down
    return LayerReads(
        paths={kind: SitePath(call.module, "input") for kind, call in entered.items()},
        flat=frozenset(kind for kind, call in entered.items() if call.entered.ndim == 2),
        early=norm is not None and attention is not None and norm.start < attention.start,
        norm=fitted,
        down=down.module if down is not None else "",
        post=post,
        post_norm=fit_norm(hf, out) if post else None,
    )


def _weight(hf: nn.Module, call: Call) -> Tensor | None:
    """The matrix of a module that has one and takes and gives tokens."""
    weight = getattr(hf.get_submodule(call.module), "weight", None)
    if not isinstance(weight, Tensor) or not (weight.is_floating_point() or type(weight).__name__ in QUANTISED):
        return None
    return weight if weight.ndim == 2 and call.entered is not NOTHING and call.left is not NOTHING else None


def _has_matrix(hf: nn.Module, call: Call) -> bool:
    return any(parameter.ndim >= 2 for parameter in hf.get_submodule(call.module).parameters())


def _outermost(inside: Iterable[Call], out: Call) -> Call | None:
    """The outermost module whose output is the input of `out`."""
    same = [call for call in inside if call.end <= out.start and _equal(call.left, out.entered)]
    return min(same, key=lambda call: (call.module.count("."), call.start), default=None)


def _equal(x: Tensor, y: Tensor) -> bool:
    return x is not NOTHING and y is not NOTHING and x.numel() == y.numel() and torch.equal(x.flatten(), y.flatten())


def fit_norm(hf: nn.Module, call: Call) -> Norm | None:
    """The norm that, times a gain and plus a bias, gives the module's output; None for neither kind."""
    module = hf.get_submodule(call.module)
    epsilon = next((float(x) for name in EPSILONS if isinstance(x := getattr(module, name, None), float)), 1e-6)
    x, y = (exactly(value).flatten(0, -2) for value in (call.entered, call.left))  # [N, d]
    if x.shape != y.shape:
        return None
    misfits = {}
    for norm in (Norm(False, epsilon), Norm(True, epsilon)):
        z = norm(x)
        columns = torch.stack([z, torch.ones_like(z)], -1).movedim(1, 0)  # [d, N, 2] gain and bias
        solution = torch.linalg.pinv(columns) @ y.T[..., None]
        misfits[norm] = float(((columns @ solution)[..., 0].T - y).abs().max())
    best = min(misfits, key=lambda norm: misfits[norm])
    return best if misfits[best] <= tolerance(call.left) * float(y.abs().max()) else None


# ---- in a running model


@dataclass(frozen=True)
class DownProjection:
    """The matrix that MLP hidden neurons are written by, as a site's x is made of them: x = n W + b."""

    W: Tensor
    """[H, d] a row for each neuron."""
    b: Tensor
    """[d]"""


def seen_at(kind: str, reads: LayerReads, hf: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The transform from a module's input [B, S, d] to what is read at a place; None where there is none."""
    if kind == "mlp_norm":
        return reads.norm
    if kind == "mlp_hidden" and reads.post_norm is not None:
        return partial(_normalised_neurons, hf.get_submodule(reads.down), reads.post_norm)
    return None


def _normalised_neurons(down: Any, norm: Norm, h: Tensor) -> Tensor:
    """h [..., H] over the scale by which the norm after the MLP divides what they write.

    The module itself is not called: this runs inside a trace, where it would count as its call.
    """
    weight, bias = weight_of(down), weight_of(down, "bias")
    assert weight is not None
    u = (h @ (weight.T if isinstance(down, nn.Linear) else weight).to(h.device)).to(torch.float32)
    u = u if bias is None else u + bias.to(h.device)
    return (h * torch.rsqrt(u.square().mean(-1, keepdim=True) + norm.epsilon)).to(h.dtype)


@torch.no_grad()
def down_projection(reads: LayerReads, hf: nn.Module) -> DownProjection | None:
    """The down projection with the gain of a norm after it and the model's factor; None where it is not linear."""
    if "mlp_hidden" not in reads.paths or (reads.post and (reads.post_norm is None or reads.post_norm.centred)):
        return None
    module: Any = hf.get_submodule(reads.down)
    home = home_device(hf)
    weight, bias = weight_of(module), weight_of(module, "bias")
    assert weight is not None
    dtype, weight = weight.dtype, weight.detach().to(home).float()
    W = weight.T if isinstance(module, nn.Linear) else weight  # transformers' Conv1D is [H, d] already
    b = W.new_zeros(W.shape[1]) if bias is None else bias.detach().to(home).float()
    if reads.post_norm is not None:
        if bool(b.any()):
            return None
        post = hf.get_submodule(reads.post)
        ones = torch.ones(1, 1, W.shape[1], dtype=dtype, device=home_device(post))
        W = W * post(ones)[0, 0].to(home).float() * (1 + reads.post_norm.epsilon) ** 0.5
    return DownProjection(W * reads.scale, b * reads.scale)
