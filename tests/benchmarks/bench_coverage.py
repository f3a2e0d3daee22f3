"""How often 95 % intervals of a mean effect hold the truth: those of `circuits.uncertainty.bootstrap`, and percentiles
as before.

    python -m tests.benchmarks.bench_coverage [--draws 3000]

Effects are drawn from distributions whose mean is known, for n prompts or n templates of 20 prompts. An interval misses
where it leaves the mean out; where there are too few prompts with an effect there is none, and nothing is missed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.uncertainty.bootstrap import MIN_ACTIVE, Bootstrap, group_sums

SIZES = (1, 3, 5, 8, 10, 30, 100)
PER_TEMPLATE = 20
CHUNK = 500


@dataclass(frozen=True)
class Effects:
    """A distribution of effects over prompts."""

    draw: Callable[[int, int], Tensor]
    """(prompts, nodes) -> effects."""
    mean: float
    """The truth."""
    per_template: int = 1
    """Prompts that share a template."""


def active(share: float, mean: float, spread: float) -> Callable[[int, int], Tensor]:
    """Effects that are zero on all but a share of the prompts."""
    return lambda n, nodes: (torch.rand(n, nodes) < share) * (mean + spread * torch.randn(n, nodes))


def by_template(n: int, nodes: int) -> Tensor:
    """Half of the variance lies between templates."""
    return 1 + torch.randn(n, nodes).repeat_interleave(PER_TEMPLATE, 0) + torch.randn(n * PER_TEMPLATE, nodes)


KINDS = {
    "normal": Effects(lambda n, nodes: 1 + torch.randn(n, nodes), 1.0),
    "lognormal": Effects(lambda n, nodes: torch.randn(n, nodes).exp(), float(torch.tensor(0.5).exp())),
    "active on 50 %": Effects(active(0.5, 1.0, 0.5), 0.5),
    "active on 20 %": Effects(active(0.2, 1.0, 0.5), 0.2),
    "active on 6 %": Effects(active(0.06, 1.0, 0.5), 0.06),
    "no effect, on 20 %": Effects(active(0.2, 0.0, 1.0), 0.0),
    "n templates of 20": Effects(by_template, 1.0, PER_TEMPLATE),
}


def percentiles(values: Tensor) -> Tensor:
    """Percentiles of the means of resampled prompts [n, 2], whatever templates they share."""
    bootstrap = Bootstrap()
    means = bootstrap.counts(len(values)) @ values / len(values)
    return torch.quantile(means, torch.tensor([0.025, 0.975]), dim=0).T


def measure(effects: Effects, n: int, draws: int) -> tuple[float, float | None, float]:
    """Coverage of percentiles; of intervals, where there are any; and the share of nodes that have one."""
    groups = torch.arange(n).repeat_interleave(effects.per_template)
    plain, held, known = 0, 0, 0
    for start in range(0, draws, CHUNK):
        values = effects.draw(n, min(CHUNK, draws - start))
        low, high = percentiles(values).T
        plain += int(((low <= effects.mean) & (effects.mean <= high)).sum())
        sizes = group_sums(torch.ones(len(groups)), groups)
        low, high = Bootstrap().intervals(group_sums(values, groups), sizes, min_active=MIN_ACTIVE).T
        held += int(((low <= effects.mean) & (effects.mean <= high)).sum())
        known += int((~low.isnan()).sum())
    return plain / draws, held / known if known >= draws / 20 else None, known / draws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=3000)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(
        "coverage of nominal .95: percentiles of prompts -> studentised, by template (share of nodes with an interval)"
    )
    print(f"{'':<20}" + "".join(f"{f'n = {n}':>20}" for n in SIZES))
    for name, effects in KINDS.items():
        cells = []
        for n in SIZES:
            plain, held, share = measure(effects, n, options.draws)
            cells.append(f"{plain:.2f} -> {'none' if held is None else f'{held:.2f} ({share:.2f})'}")
        print(f"{name:<20}" + "".join(f"{cell:>20}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
