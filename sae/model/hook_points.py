"""A site inside one wrapped model: how its tensor is read, written, skipped and hooked, whatever its module returns.

Modules return a tensor, or a tuple or list whose first entry is the tensor (attention returns its weights too). Writing
a bare tensor where a tuple is expected can run silently and be wrong (a batch of two is unpacked as the pair), so all
access goes through `HookPoint`. It also undoes what stands between a module and the residual stream:

1. A module that works on tokens without rows returns [B * S, d]; the site's x is [B, S, d].
2. A module whose output is multiplied before it is added: the site's x is what is added, `scale` times the output.
3. An output that is changed in place later: x is not the tensor that the model goes on with, but what it copies.

4. A module on another device than the model's home (`sae.model.device_map`): x is at home.

In these four cases the model must go on with what was read, or no gradient would reach x: see `detour`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae.errors import UserError
from sae.model.sites import Site, SitePath
from sae.model.tokens import Tokens

SiteEdit = Callable[[Tensor], Tensor]
"""x [B, S, d] -> what stands in its place."""


@dataclass(frozen=True)
class Columns:
    """Which tokens the n columns of a site's x [B, n, d] are: `tokens` [B, S], and behind them the generated ones."""

    tokens: Tokens
    """The batch that the model was given, [B, S]."""
    first: int
    """Where the first column stands; the first generated token stands at S."""
    n: int
    """Number of columns."""

    @property
    def steps(self) -> range:
        """Which generated token each column is, from 0; below 0 for those of the batch."""
        start = self.first - self.tokens.n_positions
        return range(start, start + self.n)

    @property
    def positions(self) -> Tensor:
        """[B, n] int64 index of each token in its text, counted without padding; -1 at padding."""
        mask = self.tokens.attention_mask
        given = (mask.cumsum(-1) - 1).masked_fill(mask == 0, -1)  # [B, S]
        inside = given[:, self.first : self.first + self.n]
        later = torch.tensor([step for step in self.steps if step >= 0], dtype=torch.int64, device=mask.device)
        return torch.cat([inside, self.tokens.lengths[:, None] + later], 1)


StandingEdit = Callable[[Tensor, Columns], Tensor]
"""x [B, n, d] and which tokens its columns are -> what stands in its place."""


def chained(contexts: Iterable[Mapping[Site, StandingEdit]]) -> dict[Site, StandingEdit]:
    """Standing edits one after the other, each of what those before left."""
    chained: dict[Site, StandingEdit] = {}
    for edits in contexts:
        for site, edit in edits.items():
            chained[site] = _then(chained[site], edit) if site in chained else edit
    return chained


def after_standing(
    standing: Mapping[Site, StandingEdit], edits: Mapping[Site, SiteEdit], columns: Columns
) -> dict[Site, SiteEdit]:
    """The edits of a run whose x [B, n, d] has these columns, each after the standing one of its site."""
    return {**edits, **{site: _before(edit, edits.get(site), columns) for site, edit in standing.items()}}


def _before(standing: StandingEdit, edit: SiteEdit | None, columns: Columns) -> SiteEdit:
    return lambda x: standing(x, columns) if edit is None else edit(standing(x, columns))


def _then(first: StandingEdit, second: StandingEdit) -> StandingEdit:
    return lambda x, columns: second(first(x, columns), columns)


def with_read(site: Site, read: Site, edit: Callable[..., Tensor]) -> dict[Site, Callable[..., Tensor]]:
    """The edits of a run that put edit(x, x_read) in place of a site's x, x_read being what is at `read` in that run.

    They serve as `SiteEdit` or, passing the columns on as the last argument, as `StandingEdit`. A pass may show them
    several parts of a tensor (of copies of a batch, of a prompt and what follows it), the site's in the same order.
    """
    if read == site:
        return {site: lambda x, *columns: edit(x, x, *columns)}
    shown: list[Tensor] = []

    def show(x: Tensor, *columns: Columns) -> Tensor:
        if shown and shown[0].untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
            shown.clear()  # of an earlier pass, in which the site was skipped
        shown.append(x)
        return x

    return {read: show, site: lambda x, *columns: edit(x, shown.pop(0), *columns)}


@dataclass(frozen=True)
class HookPoint:
    """Module and side of a site in one wrapped model."""

    site: Site
    """The site."""
    path: SitePath
    """Its module and side."""
    envoy: Any
    """nnsight's handle of the module; read and written inside a trace only."""
    body: Any = None
    """Handle of the sublayer that this module alone reads (Gemma's attention before its norm): skipped with it."""
    outputs: Any = None
    """The tuple or list that the module returns, with None for its entries; None for a plain tensor."""
    body_outputs: Any = None
    """The same for the body."""
    token_wise: bool = False
    """Whether the module, with its body, takes each token alone: an MLP where its architecture has it."""
    flat: bool = False
    """Whether the module's tensor is [B * S, d]."""
    scale: float = 1.0
    """What the tensor is multiplied by before it is added to the residual stream."""
    in_place: bool = False
    """Whether the model changes the tensor after the module has returned it."""
    read_only: bool = False
    """Whether it is no site but a place that a transcoder reads: an edit there sees x and leaves it as it is."""
    seen: SiteEdit | None = None
    """What such a place makes of the module's tensor [B, S, d], such as its norm; None for nothing."""
    home: torch.device | None = None
    """The device of x; None for that of the module's tensor."""
    away: torch.device | None = None
    """The device of the module's tensor, where x is on another."""

    @property
    def detour(self) -> bool:
        """Whether x is another tensor than the module's: it must be written where its gradient is wanted."""
        return not self.read_only and (self.flat or self.scale != 1.0 or self.in_place or self.away is not None)

    def read(self, rows: int) -> Tensor:
        """The site's x [B, S, d] in a batch of `rows`."""
        return self._outward(first(self.envoy.input if self.path.side == "input" else self.envoy.output), rows)

    def write(self, x: Tensor) -> None:
        """Replace the tensor and keep whatever else the module returns."""
        if self.path.side == "input":
            self.envoy.input = self._inward(x)
        else:
            self.envoy.output = _replaced(self.envoy.output, self._inward(x))

    def skip(self, x: Tensor) -> None:
        """Do not run the module and its body: its output is x, with None for attention weights and the like.

        A site at a module's input has nothing to skip: the input is replaced.
        """
        if self.path.side == "input":
            self.write(x)
            return
        if self.body is not None:
            self.body.skip(_replaced(self.body_outputs, torch.zeros_like(x, device=self.away)))
        self.envoy.skip(_replaced(self.outputs, self._inward(x)))

    def pass_through(self) -> None:
        """Do not run the block: its output is its input."""
        self.envoy.skip(_replaced(self.outputs, self.envoy.input))

    def at_last_position(self) -> None:
        """Run a module that takes each token alone at the last position; its output is zero elsewhere."""
        module = self.body or self.envoy
        x = first(module.input)
        module.input = x[:, -1:]
        module.output = torch.nn.functional.pad(module.output, (0, 0, x.shape[1] - 1, 0))

    @contextmanager
    def hooked(self, edit: SiteEdit, *, rows: int) -> Iterator[None]:
        """Apply the edit at every call of the module with a torch hook, outside of any trace."""
        module = self.envoy._module

        def changed(value: Tensor) -> Tensor:
            return self._inward(edited(self._outward(value, rows), edit, self.site))

        def before(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
            if self.read_only:
                edit(self._outward(inputs[0] if inputs else next(iter(named.values())), rows))
                return inputs, named
            if inputs:
                return (changed(inputs[0]), *inputs[1:]), named
            name = next(iter(named))
            return inputs, named | {name: changed(named[name])}

        def after(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
            return _replaced(output, changed(first(output)))

        if self.path.side == "input":
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = module.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()

    def _outward(self, value: Tensor, rows: int) -> Tensor:
        """The module's own tensor -> x [B, S, d]."""
        x = value.unflatten(0, (rows, -1)) if self.flat else value
        if self.read_only:  # a copy: the model may change the residual stream in place
            x = self.seen(x) if self.seen is not None else x.clone()
        elif self.scale != 1.0:
            x = x * self.scale
        return x if self.home is None else x.to(self.home)

    def _inward(self, x: Tensor) -> Tensor:
        """x [B, S, d] -> the module's own tensor."""
        value = x if self.scale == 1.0 else x / self.scale
        value = value.flatten(0, 1) if self.flat else value
        value = value if self.away is None else value.to(self.away)
        return value.clone() if self.in_place and self.away is None else value


def edited(x: Tensor, edit: SiteEdit, site: Site) -> Tensor:
    """edit(x) in the number type of x; a result of another shape is the caller's mistake."""
    new = edit(x)
    if new.shape != x.shape:
        raise UserError(f"edit at site {str(site)!r} gave shape {list(new.shape)}: allowed is {list(x.shape)}")
    return new.to(x.dtype)


def first(value: Any) -> Any:
    """The tensor itself, or the first entry of a tuple or list."""
    return value[0] if isinstance(value, (tuple, list)) and len(value) else value


def empty_outputs(value: Any) -> Any:
    """A tuple or list with None for its entries; None for anything else."""
    return _like(value, [None] * len(value)) if isinstance(value, (tuple, list)) and len(value) else None


def _replaced(value: Any, x: Tensor) -> Any:
    """A tuple or list with x for its first entry; x in place of anything else."""
    return _like(value, [x, *value[1:]]) if isinstance(value, (tuple, list)) and len(value) else x


def _like(value: Any, entries: list[Any]) -> Any:
    return entries if isinstance(value, list) else tuple(entries)
