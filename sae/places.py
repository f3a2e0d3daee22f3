"""A site inside one wrapped model: how its tensor is read, written, skipped and hooked, whatever its module returns.

Modules return a tensor or a tuple whose first entry is the tensor (attention returns its weights too). Writing a bare
tensor where a tuple is expected can run silently and be wrong (a batch of two is unpacked as the pair), so all access
goes through `Place`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae.errors import UserError
from sae.sites import Site, SitePath

Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Place:
    """Where a site is in one wrapped model."""

    site: Site
    """The site."""
    path: SitePath
    """Its module and side."""
    envoy: Any
    """nnsight's handle of the module; read and written inside a trace only."""
    body: Any = None
    """Handle of the sublayer that this module alone reads (Gemma's attention before its norm): skipped with it."""
    n_outputs: int = 0
    """Length of the tuple the module returns; 0 for a plain tensor."""
    n_body_outputs: int = 0
    """The same for the body."""
    token_wise: bool = False
    """Whether the module, with its body, takes each token alone: an MLP where its architecture has it."""

    def read(self) -> Tensor:
        """The site's tensor."""
        return first(self.envoy.input if self.path.side == "input" else self.envoy.output)

    def write(self, x: Tensor) -> None:
        """Replace the tensor and keep whatever else the module returns."""
        if self.path.side == "input":
            self.envoy.input = x
        else:
            self.envoy.output = _replaced(self.envoy.output, x)

    def skip(self, x: Tensor) -> None:
        """Do not run the module and its body: its output is x, with None for attention weights and the like.

        A site at a module's input has nothing to skip: the input is replaced.
        """
        if self.path.side == "input":
            self.write(x)
            return
        if self.body is not None:
            self.body.skip(_packed(torch.zeros_like(x), self.n_body_outputs))
        self.envoy.skip(_packed(x, self.n_outputs))

    def pass_through(self) -> None:
        """Do not run the block: its output is its input."""
        self.envoy.skip(_packed(self.envoy.input, self.n_outputs))

    def at_last_position(self) -> None:
        """Run a module that takes each token alone at the last position; its output is zero elsewhere."""
        module = self.body or self.envoy
        x = first(module.input)
        module.input = x[:, -1:]
        module.output = torch.nn.functional.pad(module.output, (0, 0, x.shape[1] - 1, 0))

    @contextmanager
    def hooked(self, edit: Edit) -> Iterator[None]:
        """Apply the edit at every call of the module with a torch hook, outside of any trace."""
        module = self.envoy._module

        def before(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (edited(inputs[0], edit, self.site), *inputs[1:])

        def after(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
            return _replaced(output, edited(first(output), edit, self.site))

        input_side = self.path.side == "input"
        handle = module.register_forward_pre_hook(before) if input_side else module.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()


def edited(x: Tensor, edit: Edit, site: Site) -> Tensor:
    """edit(x) in the number type of x; a result of another shape is the caller's mistake."""
    new = edit(x)
    if new.shape != x.shape:
        raise UserError(f"edit at site {str(site)!r} gave shape {list(new.shape)}: allowed is {list(x.shape)}")
    return new.to(x.dtype)


def first(value: Any) -> Tensor:
    """The tensor itself, or the first entry of a tuple."""
    return value[0] if isinstance(value, tuple) else value


def tuple_length(value: Any) -> int:
    """Length of a tuple, 0 for anything else."""
    return len(value) if isinstance(value, tuple) else 0


def _replaced(value: Any, x: Tensor) -> Any:
    return (x, *value[1:]) if isinstance(value, tuple) else x


def _packed(x: Tensor, n_outputs: int) -> Any:
    return (x, *[None] * (n_outputs - 1)) if n_outputs else x
