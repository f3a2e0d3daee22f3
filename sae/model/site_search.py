"""Finding the sites of any decoder by measurement: what is called in which order, and what adds up to what.

Plain torch hooks watch one forward pass of a few random tokens; nothing of the model is changed. From the inputs and
outputs of its modules:

1. Blocks: the longest list of modules that are each called once, each on the output of the one before, and turn
   [B, S, d] into [B, S, d]. `resid_l` is the output of block l.
2. `embed`: the last module before the first block whose output is that block's input; else the block's input itself.
3. In each block the contributions to the residual stream: the one or two modules inside it whose outputs, each times a
   positive constant, add up to the block's output minus its input. Outputs may be flattened ([B * S, d]) or the first
   of a tuple. Of several modules with the same output the outermost is taken. The one that is called first is `attn`
   and the other `mlp`, unless their names say the contrary; a lone one is what its name says.

Where blocks differ (attention here, a state space there) each has its own modules.

`fit_scales` finds the constants with which a model multiplies what its sublayers add to the residual stream (Granite,
Cohere): for each block, stream before + Σ c_i x_i = stream after. Where the plain sum does not explain the stream, the
factors c_i come from least squares; where one is near a number of the model's config, it is that number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sae.model.device_map import home_device
from sae.model.forward import is_exact
from sae.model.hook_points import first
from sae.model.sites import Site, SitePath

ATTENTION = re.compile(r"att|mixer|mamba|ssm|recurrent|temporal|rnn|conv|lru|retention|lstm", re.IGNORECASE)
FEED_FORWARD = re.compile(r"mlp|feed_?forward|ffn?\b|ffn|moe|expert|fc\d|channel", re.IGNORECASE)
TOLERANCE, TOLERANCE_16_BIT = 1e-4, 3e-2  # of the contribution's largest value
ROUNDING, ROUNDING_16_BIT = 1e-5, 1e-2  # of the stream's largest value
SMALLEST_SCALE = 1e-3


@dataclass(frozen=True)
class Search:
    """The sites that were found."""

    paths: dict[Site, SitePath]
    """Every site with its path."""
    blocks: list[str] = field(default_factory=list)
    """Paths of the blocks."""
    incomplete: dict[int, str] = field(default_factory=dict)
    """Layers without attn and mlp sites, by what was tried there."""


NOTHING = torch.empty(0)


@dataclass(eq=False)
class Call:
    """The calls of a module."""

    module: str
    """Its path."""
    class_name: str
    start: int
    """When the first call began, counted in calls."""
    count: int = 0
    """How often it was called."""
    end: int = 0
    """When the last call ended."""
    entered: Tensor = NOTHING
    """Its input [B, S, d] or [B * S, d]; empty where it is anything else."""
    left: Tensor = NOTHING
    """Its output [B, S, d] or [B * S, d]; empty where it is anything else."""


def search_sites(hf: nn.Module, forward: Callable[[], Any], *, rows: int, positions: int) -> Search:
    """The sites of `hf`; `forward` runs it on a batch of so many rows and positions. Empty paths: no blocks found."""
    calls = module_calls(hf, forward, rows=rows, positions=positions)
    blocks = _find_blocks(hf, calls)
    if not blocks:
        return Search({})
    once = [call for call in calls.values() if call.count == 1]
    paths = {Site("embed"): _find_embed(once, calls[blocks[0]])}
    incomplete: dict[int, str] = {}
    for layer, name in enumerate(blocks):
        inside = [call for call in once if call.module.startswith(f"{name}.")]
        kinds, tried = explain(calls[name], inside)
        paths |= {Site(kind, layer): SitePath(module) for kind, module in kinds.items()}
        paths[Site("resid", layer)] = SitePath(name)
        incomplete |= {} if kinds else {layer: tried}
    return Search(dict(sorted(paths.items())), blocks, incomplete)


def module_calls(hf: nn.Module, forward: Callable[[], Any], *, rows: int, positions: int) -> dict[str, Call]:
    """Every module that was called in one forward pass, by name."""
    calls: dict[str, Call] = {}
    home = home_device(hf)
    clock = iter(range(10**9))
    shapes: list[tuple[int, ...]] = [(rows, positions), (rows * positions,)]

    def watch(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = calls.setdefault(name, Call(name, type(module).__name__, next(clock)))
            call.entered = _copy(args[0] if args else next(iter(kwargs.values()), None), shapes, home)
            call.count += 1

        def after(module: nn.Module, args: Any, output: Any) -> None:
            calls[name].left, calls[name].end = _copy(first(output), shapes, home), next(clock)

        return before, after

    with torch.no_grad(), ExitStack() as hooks:
        for name, module in hf.named_modules():
            if name:
                before, after = watch(name)
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(after).remove)
        forward()
    return calls


def _copy(value: Any, shapes: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """A copy of a tensor of numbers with a fraction, if it has one of the shapes before its last dimension."""
    fits = isinstance(value, Tensor) and value.is_floating_point() and value.shape[:-1] in shapes
    return value.detach().to(device, copy=True) if fits else NOTHING


def _find_blocks(hf: nn.Module, calls: Mapping[str, Call]) -> list[str]:
    """Paths of the blocks, in the order in which they are called; empty where there are none."""
    best: list[str] = []
    for name, module in hf.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > len(best):
            names = [f"{name}.{child}" for child in range(len(module))]
            chain = [calls[child] for child in names if child in calls and _keeps_shape(calls[child])]
            if len(chain) == len(names) and all(_linked(one, other) for one, other in pairwise(chain)):
                best = names
    return best


def _keeps_shape(call: Call) -> bool:
    """Whether the module was called once and turned [B, S, d] into [B, S, d]."""
    return call.count == 1 and call.entered.ndim == 3 and call.entered.shape == call.left.shape


def _linked(one: Call, other: Call) -> bool:
    """Whether a module's output is the other's input."""
    return torch.equal(one.left.nan_to_num(), other.entered.nan_to_num())


def _find_embed(calls: Sequence[Call], block: Call) -> SitePath:
    """The last module before the first block whose output is the block's input; else that input."""
    earlier = sorted((call for call in calls if call.end < block.start), key=lambda call: call.end)
    same = [call.module for call in earlier if torch.equal(call.left, block.entered)]
    return SitePath(same[-1]) if same else SitePath(block.module, "input")


# ---- contributions


def explain(block: Call, inside: Sequence[Call]) -> tuple[dict[str, str], str]:
    """Kind of site -> module for one block, and a sentence on what was tried.

    Pairs come before single modules, unless both of the pair are inside the single one.
    """
    y, change = block.left, _flat(block.left) - _flat(block.entered)
    rounding = ROUNDING if is_exact(y) else ROUNDING_16_BIT
    allowed = tolerance(y) * float(change.abs().max()) + rounding * float(y.abs().max())
    outputs = _distinct([call for call in inside if call.left.shape[-1] == y.shape[-1]])
    single = _best([(output,) for output in outputs.items()], change, allowed)
    pairs = [
        pair
        for pair in combinations(sorted(outputs.items(), key=lambda output: output[0].start), 2)
        if single is None or not all(call.module.startswith(f"{single[0].module}.") for call, _ in pair)
    ]
    adding_up = _best(pairs, change, allowed) or single
    tried = f"none of {len(outputs)} modules inside, and no two of them, add up to what the block adds to its input"
    return ({}, tried) if adding_up is None else (_kinds(block, adding_up), "")


def _flat(x: Tensor) -> Tensor:
    """[B * S, d] float64, on the CPU."""
    return exactly(x).flatten(0, -2)


def _distinct(calls: Sequence[Call]) -> dict[Call, Tensor]:
    """Modules with their outputs [B * S, d], one of each group with equal ones: the outermost, of equally deep ones the
    first.
    """
    outermost: dict[Call, Tensor] = {}
    for call in sorted(calls, key=lambda call: (call.module.count("."), call.start)):
        output = _flat(call.left)
        if not any(torch.equal(output, other) for other in outermost.values()):
            outermost[call] = output
    return outermost


def _best(groups: Sequence[Sequence[tuple[Call, Tensor]]], change: Tensor, allowed: float) -> list[Call] | None:
    """The modules whose sum is nearest to the change, if within what is allowed; sums with factors where none is."""
    for scaled in (False, True):
        errors = [_error([output for _, output in group], change, scaled) for group in groups]
        if errors and min(errors) <= allowed:
            return [call for call, _ in groups[errors.index(min(errors))]]
    return None


def _error(values: Sequence[Tensor], change: Tensor, scaled: bool) -> float:
    """Largest difference between the change and the sum of values; infinite where a factor is not positive."""
    if scaled:
        factors = fit_factors(values, change)
        if min(factors) < SMALLEST_SCALE:
            return float("inf")
        values = [factor * value for factor, value in zip(factors, values, strict=True)]
    return float((change - torch.stack([*values]).sum(0)).abs().max())


def fit_factors(values: Sequence[Tensor], change: Tensor) -> list[float]:
    """The factors with which the values come nearest to the change, by least squares."""
    columns = torch.stack([value.flatten() for value in values], 1)
    gram = columns.T @ columns
    if not bool(gram.isfinite().all()):
        return [0.0] * len(values)
    return [float(x) for x in torch.linalg.pinv(gram) @ (columns.T @ change.flatten())]


def _kinds(block: Call, calls: Sequence[Call]) -> dict[str, str]:
    """attn and mlp for modules inside a block, in the order of their calls."""
    texts = [f"{call.module.removeprefix(block.module)} {call.class_name}" for call in calls]
    is_mlp = [bool(FEED_FORWARD.search(text)) for text in texts]
    is_attn = [bool(ATTENTION.search(text)) for text in texts]
    if len(calls) == 1:
        return {"mlp" if is_mlp[0] and not is_attn[0] else "attn": calls[0].module}
    reversed_names = is_mlp[0] and not is_attn[0] and is_attn[1] and not is_mlp[1]
    kinds = ("mlp", "attn") if reversed_names else ("attn", "mlp")
    return {kind: call.module for kind, call in zip(kinds, calls, strict=True)}


# ---- constants on the way to the residual stream


def block_sums(sites: Sequence[Site]) -> list[tuple[Site, list[Site], Site]]:
    """For each block whose sites are there: the stream before it, what is added, the stream after it."""
    sums = []
    for resid in (site for site in sites if site.kind == "resid" and site.layer is not None):
        stream_before = Site("resid", resid.layer - 1) if resid.layer else Site("embed")
        added = [site for site in (Site("attn", resid.layer), Site("mlp", resid.layer)) if site in sites]
        if stream_before in sites and added:
            sums.append((stream_before, added, resid))
    return sums


def fit_scales(activations: Mapping[Site, Tensor], constants: Sequence[float]) -> dict[Site, float]:
    """The factors with which attn and mlp are added to the residual stream, where they are not 1 and explain it; one
    of the config's constants where one is near.
    """
    scales: dict[Site, float] = {}
    for stream_before, added, stream_after in block_sums(list(activations)):
        outputs = [exactly(activations[site]) for site in added]
        if len({activations[site].shape for site in (stream_before, *added, stream_after)}) > 1:
            continue
        change = exactly(activations[stream_after]) - exactly(activations[stream_before])
        allowed = _allowed(activations[stream_after], change)
        if float((change - torch.stack(outputs).sum(0)).abs().max()) <= allowed:
            continue
        factors = [_nearest(x, constants, activations[stream_after]) for x in fit_factors(outputs, change)]
        explained = torch.stack([x * output for x, output in zip(factors, outputs, strict=True)]).sum(0)
        if min(factors) >= SMALLEST_SCALE and float((change - explained).abs().max()) <= allowed:
            scales |= dict(zip(added, factors, strict=True))
    return scales


def exactly(x: Tensor) -> Tensor:
    """In float64, on the CPU: Apple's GPUs have none."""
    return x.detach().cpu().double()


def _allowed(after: Tensor, change: Tensor) -> float:
    """The largest difference that rounding of the stream, and a little of the change itself, explains."""
    return tolerance(after) * (float(change.abs().max()) + 0.1 * float(after.abs().max()))


def _nearest(factor: float, constants: Sequence[float], x: Tensor) -> float:
    best = min(constants, key=lambda constant: abs(constant - factor), default=factor)
    return best if abs(best - factor) <= tolerance(x) * abs(factor) else float(f"{factor:.6g}")


def tolerance(x: Tensor | torch.dtype) -> float:
    """Largest difference that rounding explains, relative to the largest value."""
    return TOLERANCE if is_exact(x) else TOLERANCE_16_BIT
