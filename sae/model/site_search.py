"""Finding the sites of any decoder by measurement: what is called in which order, and what adds up to what.

1. Blocks: the longest list of modules that are each called once, each on the output of the one before, and turn
   [B, S, d] into [B, S, d].
   `resid_l` is the output of block l.
2. `embed`: the last module before the first block whose output is that block's input; else the block's input itself.
3. In each block the contributions to the residual stream: the one or two modules inside it whose outputs, each times a
   positive constant, add up to the block's output minus its input. Outputs may be flattened ([B * S, d]) or the first
   of a tuple. Of several modules with the same output the outermost is taken. The one that is called first is `attn`
   and the other `mlp`, unless their names say the contrary; a lone one is what its name says.

Plain torch hooks on two forward passes of a few random tokens; nothing of the model is changed. Where blocks differ
(attention here, a state space there) each has its own modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sae.model.sites import Site, SitePath

ATTENTION = re.compile(r"att|mixer|mamba|ssm|recurrent|temporal|rnn|conv|lru|retention|lstm", re.IGNORECASE)
FEED_FORWARD = re.compile(r"mlp|feed_?forward|ffn?\b|ffn|moe|expert|fc\d|channel", re.IGNORECASE)
TOLERANCE, TOLERANCE_16_BIT = 1e-4, 3e-2  # of the contribution's largest value
ROUNDING, ROUNDING_16_BIT = 1e-5, 1e-2  # of the stream's largest value
SMALLEST_SCALE = 1e-3

Forward = Callable[[], Any]


@dataclass(frozen=True)
class Search:
    """The sites that were found."""

    paths: dict[Site, SitePath]
    """Every site with its path."""
    blocks: list[str] = field(default_factory=list)
    """Paths of the blocks."""
    incomplete: dict[int, str] = field(default_factory=dict)
    """Layers without attn and mlp sites, by what was tried there."""


def search_sites(hf: nn.Module, forward: Forward, *, rows: int, positions: int) -> Search:
    """The sites of `hf`; `forward` runs it on a batch of so many rows and positions. Empty paths: no blocks found."""
    calls = _count_calls(hf, forward, (rows, positions))
    blocks = _find_blocks(hf, calls)
    if not blocks:
        return Search({})
    once = {name for name, call in calls.items() if call.count == 1}
    contributions = _Contributions(hf, blocks, once, (rows, positions))
    with torch.no_grad(), contributions.watching():
        forward()
    paths = {Site("embed"): contributions.embed}
    for layer, name in enumerate(blocks):
        paths |= {Site(kind, layer): SitePath(module) for kind, module in contributions.by_layer[layer].items()}
        paths[Site("resid", layer)] = SitePath(name)
    lacking = {layer: contributions.tried[layer] for layer in range(len(blocks)) if not contributions.by_layer[layer]}
    return Search(dict(sorted(paths.items())), blocks, lacking)


# ---- blocks


@dataclass
class _Call:
    """Calls of a module: how many, when the first, and its input and output where both are [B, S, d]."""

    count: int = 0
    start: int = 0
    entered: Tensor | None = None
    left: Tensor | None = None


def _count_calls(hf: nn.Module, forward: Forward, shape: tuple[int, int]) -> dict[str, _Call]:
    """Every module that was called, by name."""
    calls: dict[str, _Call] = {}
    members = {f"{name}.{child}" for name, module in _lists(hf) for child in range(len(module))}
    clock = iter(range(10**9))

    def watch(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = calls.setdefault(name, _Call(start=next(clock)))
            call.count += 1
            x = stream(args, kwargs)
            call.entered = x.clone() if name in members and x is not None and x.shape[:-1] == shape else None

        def after(module: nn.Module, args: Any, output: Any) -> None:
            y, call = first_tensor(output), calls[name]
            alike = y is not None and call.entered is not None and y.shape == call.entered.shape
            call.left = y.clone() if y is not None and alike else None

        return before, after

    with torch.no_grad(), ExitStack() as hooks:
        for name, module in hf.named_modules():
            if name:
                before, after = watch(name)
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(after).remove)
        forward()
    return calls


def _find_blocks(hf: nn.Module, calls: Mapping[str, _Call]) -> list[str]:
    """Paths of the blocks, in the order in which they are called; empty where there are none."""
    best: list[str] = []
    for name, module in _lists(hf):
        names = [f"{name}.{child}" for child in range(len(module))]
        chain = [calls.get(child, _Call()) for child in names]
        linked = all(_linked(a, b) for a, b in pairwise(chain))
        if linked and all(call.count == 1 and call.left is not None for call in chain):
            best = names if len(names) > len(best) else best
    return best


def _lists(hf: nn.Module) -> list[tuple[str, nn.ModuleList | nn.Sequential]]:
    named = hf.named_modules()
    return [(name, module) for name, module in named if isinstance(module, (nn.ModuleList, nn.Sequential)) and module]


def _linked(one: _Call, other: _Call) -> bool:
    """Whether a module's output is the other's input."""
    if one.left is None or other.entered is None:
        return False
    return torch.equal(one.left.nan_to_num(), other.entered.nan_to_num())


def stream(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """A module's first input, if it is a tensor of numbers with a fraction."""
    value = args[0] if args else next(iter(kwargs.values()), None)
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


def first_tensor(output: Any) -> Tensor | None:
    """A module's output or the first of several, if it is a tensor of numbers with a fraction."""
    value = output[0] if isinstance(output, (tuple, list)) and output else output
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


# ---- contributions


@dataclass(frozen=True)
class _Output:
    """One module's output in a forward pass."""

    module: str
    class_name: str
    depth: int
    """Levels below the block."""
    start: int
    """When it was called."""
    value: Tensor
    """[B * S, d] float64."""


class _Contributions:
    """Watches one forward pass and explains each block as it ends: only one block's outputs are held."""

    def __init__(self, hf: nn.Module, blocks: list[str], once: set[str], shape: tuple[int, int]) -> None:
        self.hf, self.blocks, self.shape = hf, blocks, shape
        self.modules = {name: module for name, module in hf.named_modules() if name in once and name}
        self.by_layer: dict[int, dict[str, str]] = {layer: {} for layer in range(len(blocks))}
        self.tried: dict[int, str] = {}
        self.embed = SitePath(blocks[0], "input")
        self._before: dict[str, Tensor] | None = {}
        """Outputs of the modules that were called before the first block; None from then on."""
        self._inside: list[_Output] = []
        self._entered: Tensor | None = None
        self._starts: dict[str, int] = {}

    def watching(self) -> ExitStack:
        """Hooks on the model while the stack lasts."""
        hooks = ExitStack()
        layers = {name: layer for layer, name in enumerate(self.blocks)}
        for name, module in self.modules.items():
            layer = layers.get(name)
            before, after = self._watch_block(layer) if layer is not None else self._watch_module(name)
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        return hooks

    def _watch_block(self, layer: int) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = stream(args, kwargs)
            assert x is not None
            if layer == 0:
                self._find_embed(x)
            self._entered, self._inside = _flat(x), []

        def after(module: nn.Module, args: Any, output: Any) -> None:
            y = first_tensor(output)
            assert y is not None and self._entered is not None
            error = _allowed(y, self._entered)
            self.by_layer[layer], self.tried[layer] = explain(self._inside, self._entered, _flat(y), error)
            self._entered, self._inside = None, []

        return before, after

    def _watch_module(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        block = next((block for block in self.blocks if name.startswith(f"{block}.")), None)

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._starts[name] = len(self._starts)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            y = first_tensor(output)
            if y is None:
                return
            if block is None and self._before is not None:
                self._before[name] = y.detach().clone()
            elif block is not None and self._entered is not None and self._fits(y):
                depth = name.removeprefix(f"{block}.").count(".") + 1
                kind = type(module).__name__
                self._inside.append(_Output(name, kind, depth, self._starts[name], _flat(y)))

        return before, after

    def _fits(self, y: Tensor) -> bool:
        """Whether it has the shape of the stream, or that of its rows and positions laid out in one."""
        assert self._entered is not None
        rows, positions = self.shape
        return y.shape[-1] == self._entered.shape[-1] and y.shape[:-1] in ((rows, positions), (rows * positions,))

    def _find_embed(self, x: Tensor) -> None:
        outputs = self._before or {}
        same = [name for name, y in outputs.items() if y.shape == x.shape and torch.equal(y, x)]
        if same:
            self.embed = SitePath(same[-1])
        self._before = None


def _flat(x: Tensor) -> Tensor:
    return x.detach().cpu().double().flatten(0, -2).clone()


def _allowed(y: Tensor, stream_before: Tensor) -> float:
    """The largest difference that rounding explains."""
    exact = y.dtype in (torch.float32, torch.float64)
    change = float((_flat(y) - stream_before).abs().max())
    size = float(y.abs().max())
    return (TOLERANCE if exact else TOLERANCE_16_BIT) * change + (ROUNDING if exact else ROUNDING_16_BIT) * size


def explain(outputs: list[_Output], before: Tensor, after: Tensor, allowed: float) -> tuple[dict[str, str], str]:
    """Kind of site -> module for one block, and a sentence on what was tried.

    Pairs come before single modules, unless both of the pair are inside the single one.
    """
    change = after - before
    distinct = _distinct(outputs)
    single = _best([(one,) for one in distinct], change, allowed)
    pairs = [
        pair
        for pair in combinations(sorted(distinct, key=lambda one: one.start), 2)
        if single is None or not all(one.module.startswith(f"{single[0].module}.") for one in pair)
    ]
    adding_up = _best(pairs, change, allowed) or single
    tried = f"none of {len(distinct)} modules inside, and no two of them, add up to what the block adds to its input"
    return ({}, tried) if adding_up is None else (_kinds(adding_up), "")


def _distinct(outputs: list[_Output]) -> list[_Output]:
    """One of each group of modules with equal outputs: the outermost, of equally deep ones the first."""
    outermost: list[_Output] = []
    for output in sorted(outputs, key=lambda one: (one.depth, one.start)):
        if not any(torch.equal(output.value, other.value) for other in outermost):
            outermost.append(output)
    return outermost


def _best(groups: Iterator[Any] | list[Any], change: Tensor, allowed: float) -> Any:
    """The group whose sum is nearest to the change, if within what is allowed; sums with factors where none is."""
    groups = list(groups)
    for scaled in (False, True):
        errors = [_error(group, change, scaled) for group in groups]
        if errors and min(errors) <= allowed:
            return groups[errors.index(min(errors))]
    return None


def _error(group: tuple[_Output, ...], change: Tensor, scaled: bool) -> float:
    """Largest difference between the change and the sum of the group; infinite where a factor is not positive."""
    values = [one.value for one in group]
    if scaled:
        factors = fit_factors(values, change)
        if min(factors) < SMALLEST_SCALE:
            return float("inf")
        values = [factor * value for factor, value in zip(factors, values, strict=True)]
    return float((change - torch.stack(values).sum(0)).abs().max())


def fit_factors(values: list[Tensor], change: Tensor) -> list[float]:
    """The factors with which the values come nearest to the change, by least squares."""
    columns = torch.stack([value.flatten() for value in values], 1)
    gram = columns.T @ columns
    if not bool(gram.isfinite().all()):
        return [0.0] * len(values)
    return [float(x) for x in torch.linalg.pinv(gram) @ (columns.T @ change.flatten())]


def _kinds(group: tuple[_Output, ...]) -> dict[str, str]:
    """attn and mlp for the modules of a group, in the order of their calls."""
    texts = [f"{one.module.rsplit('.', one.depth)[1:]} {one.class_name}" for one in group]
    is_mlp = [bool(FEED_FORWARD.search(text)) for text in texts]
    is_attn = [bool(ATTENTION.search(text)) for text in texts]
    if len(group) == 1:
        return {"mlp" if is_mlp[0] and not is_attn[0] else "attn": group[0].module}
    reversed_names = is_mlp[0] and not is_attn[0] and is_attn[1] and not is_mlp[1]
    kinds = ("mlp", "attn") if reversed_names else ("attn", "mlp")
    return {kind: one.module for kind, one in zip(kinds, group, strict=True)}
