"""The first run of a model, on a few random tokens: what its modules return, and how wide its sites are.

1. At every site the module's output is read: a tensor or a tuple, with rows or flat, changed in place later or not.
2. Where sublayers are multiplied by a constant before they are added, the constant goes into the hook point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from sae.errors import UserError
from sae.model.forward import cannot_run, config_constants
from sae.model.hook_points import HookPoint, empty_outputs
from sae.model.site_search import fit_scales
from sae.model.sites import Site

Trace = Callable[[Sequence[Callable[[], None]]], Tensor]
"""Makes visits in forward order in one run and gives its logits [B, S, V]."""


@dataclass(frozen=True)
class FirstPass:
    """Structure and sizes that the first run showed."""

    hook_points: dict[Site, HookPoint]
    """Each site with the structure of what its module returns."""
    widths: dict[Site, int]
    """Width of each site, in forward order."""
    vocab_size: int
    """Number of logits V at a position."""
    d_model: int
    """Width of the residual stream."""


def first_pass(name: str, hf: Any, hook_points: Mapping[Site, HookPoint], trace: Trace, *, rows: int) -> FirstPass:
    """Read every site once; `UserError` for a model that cannot run, or whose sites are not reached in this order."""
    described: dict[Site, HookPoint] = {}
    values: dict[Site, Tensor] = {}
    raw: dict[Site, tuple[Tensor, int]] = {}  # the module's own tensor, and how often it had been written to

    def visit(point: HookPoint) -> None:
        body = point.body.output if point.body is not None else None
        outputs = empty_outputs(point.envoy.output) if point.path.side == "output" else None
        x = replace(point, flat=False).read(rows)
        raw[point.site] = x, x._version
        point = replace(point, outputs=outputs, body_outputs=empty_outputs(body), flat=x.ndim == 2)
        described[point.site] = point
        values[point.site] = point.read(rows).detach().clone()

    try:
        logits = trace([partial(visit, point) for point in hook_points.values()])
    except Exception as error:
        if type(error).__name__ == "OutOfOrderError":  # nnsight's own, which only language_model.py imports from
            raise UserError(
                f"the sites {', '.join(map(str, hook_points))} are not reached in this order in every run, each once: "
                f"give other site_paths ({str(error).strip().splitlines()[0]})"
            ) from None
        raise cannot_run(name, error) from error
    scales = fit_scales(values, config_constants(hf))
    for site, (x, version) in raw.items():
        described[site] = replace(described[site], in_place=x._version != version, scale=scales.get(site, 1.0))
    widths = {site: x.shape[-1] for site, x in values.items()}
    d_model = getattr(getattr(hf, "config", None), "hidden_size", None) or max(widths.values())
    return FirstPass(described, widths, logits.shape[-1], d_model)
