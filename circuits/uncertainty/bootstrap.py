"""95 % intervals of means and ratios over prompts that come in groups.

Legend: B prompts, G groups, R resamples, n quantities.

1. What is drawn anew is the *group*: prompts of one template share whatever is particular to the template, so that a
   hundred prompts of five templates are closer to five observations than to a hundred. Where prompts share no template,
   or all have the same one, each prompt is a group with those that repeat it (`PromptSet.groups`).
2. Every quantity is a ratio r = sum_g x_g / sum_g y_g of sums over groups: a mean effect with y the number of prompts,
   faithfulness with x = m(C) - m(0) and y = m(M) - m(0). Numerator and denominator are drawn together.
3. The interval is the wider one, end by end, of two that agree where effects are normal and many:
   - the studentised bootstrap (Efron 1982; Hall 1988): of each resample t = (r* - r) / se*, with se the standard error
     of a ratio; from r - t_(.975) se to r - t_(.025) se. It follows the skewness that percentiles of r* miss.
   - Student's interval r -+ t_(G-1) se, for the few groups and the rare activity where se* is itself a guess.
4. With fewer than `MIN_GROUPS` groups, for a node that has an effect in fewer than `MIN_ACTIVE` of them, or where the
   groups that differ are so few that many resamples have none of them, no interval means what it says: there is none
   (NaN).

`python -m tests.benchmarks.bench_coverage` measures how often intervals hold the truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

from sae.errors import UserError

MIN_GROUPS = 5
"""Fewest groups (prompts, or templates of prompts) for an interval."""
COVERAGE = "in simulations .95 to .99 of them hold the truth, .90 for under 30 prompts with very skewed effects"
"""What `tests.benchmarks.bench_coverage` measures."""
MIN_ACTIVE = 5
"""Fewest groups in which a node must have an effect for an interval."""
FAR = 1e6
"""t of a resample that is shifted and has no spread."""


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made."""

    resamples: int = 1000
    """Times the groups are drawn anew."""
    level: float = 0.95
    """Share of intervals that are to hold the truth."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise UserError(f"resamples is {self.resamples}: intervals need at least 1")
        if not 0 < self.level < 1:
            raise UserError(f"level is {self.level}: it must be between 0 and 1")

    def counts(self, n_groups: int) -> Tensor:
        """[R, G] how often each group is in each resample; rows add up to G."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randint(n_groups, (self.resamples, n_groups), generator=generator)
        counts = torch.zeros(self.resamples, n_groups)
        return counts.scatter_add_(1, drawn, torch.ones_like(counts))

    def intervals(self, x: Tensor, y: Tensor, *, min_active: int = 0) -> Tensor:
        """[n, 2] intervals of sum_g x / sum_g y, for x [G, n] and y [G]; NaN where `MIN_GROUPS`, `min_active` (the
        fewest groups in which x must differ from zero) or resamples without spread say that there is none.
        """
        n_groups = len(x)
        if n_groups < MIN_GROUPS or not x.shape[1]:
            return x.new_full((x.shape[1], 2), torch.nan)
        counts, total = self.counts(n_groups).to(x), y.sum()
        ratio = x.sum(0) / total  # [n]
        apart = x - ratio * y[:, None]  # [G, n], adds up to 0
        correction = n_groups / (n_groups - 1)
        error = (correction * apart.square().sum(0)).sqrt() / total.abs()  # [n] standard error
        drawn = counts @ y  # [R]
        shift = (counts @ apart) / drawn[:, None]  # [R, n] r* - r
        square = counts @ apart.square() - 2 * shift * (counts @ (apart * y[:, None]))
        square += shift.square() * (counts @ y.square())[:, None]
        error_drawn = (correction * square.clamp_(min=0)).sqrt_() / drawn[:, None].abs()
        t = _studentised(shift, error_drawn, error)
        tail = (1 - self.level) / 2
        low, high = torch.quantile(t, torch.tensor([tail, 1 - tail], dtype=t.dtype, device=t.device), dim=0)
        student = float(stdtrit(n_groups - 1, 1 - tail))
        bounds = [ratio - high.clamp(min=student) * error, ratio - low.clamp(max=-student) * error]
        is_told = ((x != 0).sum(0) >= min_active) & (low > -FAR / 1000) & (high < FAR / 1000)
        return torch.where(is_told[:, None], torch.stack(bounds, dim=1), torch.nan)


def _studentised(shift: Tensor, error: Tensor, plain: Tensor) -> Tensor:
    """shift / error [R, n]; where a resample has no spread, 0 for no shift and as far as can be for any other.

    plain: [n] the error without resampling, to tell rounding from spread.
    """
    flat = error <= 1e-6 * plain
    far = torch.where(shift.abs() <= 1e-6 * plain, 0.0, shift.sign() * FAR).to(shift)
    return torch.where(flat, far, shift / error.masked_fill(flat, 1.0))


# ------------------------------------------------------------------------------------------ groups


def group_sums(values: Tensor, groups: Tensor) -> Tensor:
    """[G, ...] sums over the prompts of each group, of values [B, ...]."""
    n_groups = int(groups.max()) + 1 if len(groups) else 0
    return values.new_zeros(n_groups, *values.shape[1:]).index_add_(0, groups.to(values.device), values)


def what_is_drawn(groups: Tensor) -> str:
    """`100 prompts`, or `100 prompts drawn by their 17 templates`."""
    n_prompts, n_groups = len(groups), len(groups.unique())
    text = f"{n_prompts} {'prompt' if n_prompts == 1 else 'prompts'}"
    return text if n_groups == n_prompts else f"{text} drawn by their {n_groups} templates"


def too_few(groups: Tensor) -> str | None:
    """Why there can be no intervals, where there are too few groups."""
    n_groups = len(groups.unique())
    if n_groups >= MIN_GROUPS:
        return None
    kind = "prompts" if n_groups == len(groups) else "templates"
    return f"{n_groups} {kind if n_groups != 1 else kind[:-1]} are too few to tell: intervals need {MIN_GROUPS}"
