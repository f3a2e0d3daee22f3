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
class _Call:
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
    """Its input [B, S, d]; empty where it is anything else."""
    left: Tensor = NOTHING
    """Its output [B, S, d] or [B * S, d]; empty where it is anything else."""


def search_sites(hf: nn.Module, forward: Callable[[], Any], *, rows: int, positions: int) -> Search:
    """The sites of `hf`; `forward` runs it on a batch of so many rows and positions. Empty paths: no blocks found."""
    calls = _calls(hf, forward, rows, positions)
    blocks = _find_blocks(hf, calls)
    if not blocks:
        return Search({})
    once = [call for call in calls.values() if call.count == 1]
    paths, incomplete = {Site("embed"): _find_embed(once, calls[blocks[0]])}, {}
    for layer, name in enumerate(blocks):
        inside = [call for call in once if call.module.startswith(f"{name}.")]
        kinds, tried = explain(calls[name], inside)
        paths |= {Site(kind, layer): SitePath(module) for kind, module in kinds.items()}
        paths[Site("resid", layer)] = SitePath(name)
        incomplete |= {} if kinds else {layer: tried}
    return Search(dict(sorted(paths.items())), blocks, incomplete)


def _calls(hf: nn.Module, forward: Callable[[], Any], rows: int, positions: int) -> dict[str, _Call]:
    """Every module that was called in one forward pass, by name."""
    calls: dict[str, _Call] = {}
    clock = iter(range(10**9))
    shapes: list[tuple[int, ...]] = [(rows, positions), (rows * positions,)]

    def watch(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = calls.setdefault(name, _Call(name, type(module).__name__, next(clock)))
            call.entered = _copy(args[0] if args else next(iter(kwargs.values()), None), shapes[:1])
            call.count += 1

        def after(module: nn.Module, args: Any, output: Any) -> None:
            calls[name].left, calls[name].end = _copy(first(output), shapes), next(clock)

        return before, after

    with torch.no_grad(), ExitStack() as hooks:
        for name, module in hf.named_modules():
            if name:
                before, after = watch(name)
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(after).remove)
        forward()
    return calls


def _copy(value: Any, shapes: Sequence[tuple[int, ...]]) -> Tensor:
    """A copy of a tensor of numbers with a fraction, if it has one of the shapes before its last dimension."""
    fits = isinstance(value, Tensor) and value.is_floating_point() and value.shape[:-1] in shapes
    return value.detach().clone() if fits else NOTHING


def _find_blocks(hf: nn.Module, calls: Mapping[str, _Call]) -> list[str]:
    """Paths of the blocks, in the order in which they are called; empty where there are none."""
    best: list[str] = []
    for name, module in hf.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > len(best):
            names = [f"{name}.{child}" for child in range(len(module))]
            chain = [calls[child] for child in names if child in calls and _keeps_shape(calls[child])]
            if len(chain) == len(names) and all(_linked(one, other) for one, other in pairwise(chain)):
                best = names
    return best


def _keeps_shape(call: _Call) -> bool:
    """Whether the module was called once and turned [B, S, d] into [B, S, d]."""
    return call.count == 1 and call.entered is not NOTHING and call.entered.shape == call.left.shape


def _linked(one: _Call, other: _Call) -> bool:
    """Whether a module's output is the other's input."""
    return torch.equal(one.left.nan_to_num(), other.entered.nan_to_num())


def _find_embed(calls: Sequence[_Call], block: _Call) -> SitePath:
    """The last module before the first block whose output is the block's input; else that input."""
    earlier = sorted((call for call in calls if call.end < block.start), key=lambda call: call.end)
    same = [call.module for call in earlier if torch.equal(call.left, block.entered)]
    return SitePath(same[-1]) if same else SitePath(block.module, "input")


# ---- contributions


def explain(block: _Call, inside: Sequence[_Call]) -> tuple[dict[str, str], str]:
    """Kind of site -> module for one block, and a sentence on what was tried.

    Pairs come before single modules, unless both of the pair are inside the single one.
    """
    y, change = block.left, _flat(block.left) - _flat(block.entered)
    exact = y.dtype in (torch.float32, torch.float64)
    allowed = (TOLERANCE if exact else TOLERANCE_16_BIT) * float(change.abs().max())
    allowed += (ROUNDING if exact else ROUNDING_16_BIT) * float(y.abs().max())
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
    return x.cpu().double().flatten(0, -2)


def _distinct(calls: Sequence[_Call]) -> dict[_Call, Tensor]:
    """Modules with their outputs [B * S, d], one of each group with equal ones: the outermost, of equally deep ones the
    first.
    """
    outermost: dict[_Call, Tensor] = {}
    for call in sorted(calls, key=lambda call: (call.module.count("."), call.start)):
        output = _flat(call.left)
        if not any(torch.equal(output, other) for other in outermost.values()):
            outermost[call] = output
    return outermost


def _best(groups: Sequence[Sequence[tuple[_Call, Tensor]]], change: Tensor, allowed: float) -> list[_Call] | None:
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


def _kinds(block: _Call, calls: Sequence[_Call]) -> dict[str, str]:
    """attn and mlp for modules inside a block, in the order of their calls."""
    texts = [f"{call.module.removeprefix(block.module)} {call.class_name}" for call in calls]
    is_mlp = [bool(FEED_FORWARD.search(text)) for text in texts]
    is_attn = [bool(ATTENTION.search(text)) for text in texts]
    if len(calls) == 1:
        return {"mlp" if is_mlp[0] and not is_attn[0] else "attn": calls[0].module}
    reversed_names = is_mlp[0] and not is_attn[0] and is_attn[1] and not is_mlp[1]
    kinds = ("mlp", "attn") if reversed_names else ("attn", "mlp")
    return {kind: call.module for kind, call in zip(kinds, calls, strict=True)}
