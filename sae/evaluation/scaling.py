"""Scaling laws of dictionaries: how what is left unexplained depends on width, sparsity and tokens.

Fitted to the dictionaries of a sweep, for each architecture and site, as in Gao et al. 2024 (arXiv 2406.04093, section
3 and appendix), with n features, k active ones a token and T tokens of training:

    L(n, k, T) = exp(α + β_n ln n + β_k ln k + γ ln n ln k + β_T ln T) + exp(ζ + η ln k)

1. L is the unexplained variance 1 − EV and what is lost of the model's predictions, 1 − CE recovered; both are fitted
   as ln L, so that errors are relative. For the share D of dead features L is the odds D / (1 − D), without an
   irreducible part, and D, which may be 0, is fitted as it is.
2. A term is left out where the grid cannot tell it: that of n, k or T with a single value; γ without two values of n
   and of k; the irreducible part exp(ζ + η ln k) with fewer than three widths and fewer than three T.
3. Of what is left, the form with the smallest AICc is taken (Hurvich & Tsai 1989): on a small grid a plain power law.
4. Standard errors come from the Jacobian at the minimum; beside them the error of the fit, in all and at its worst, and
   that of predicting each width, sparsity and token count from the others (`predicted`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
DEAD = "dead_fraction"
METRICS = {"unexplained_variance": "explained_variance", "ce_lost": "ce_recovered", DEAD: DEAD}
"""What is fitted, and the column that it comes from: 1 − that, but for dead features."""
POWER = ("beta_n", "beta_k", "gamma", "beta_T")
IRREDUCIBLE = ("zeta", "eta")
STARTS = (0.3, 0.7, 0.95)
"""Shares of the smallest L that the irreducible part may start at."""
MIN_POINTS = 4
"""Fewest dictionaries."""


@dataclass(frozen=True)
class ScalingLaw:
    """A fit of one number at one site."""

    architecture: str
    """Architecture."""
    site: str
    """Site."""
    metric: str
    """The quantity that is fitted: unexplained_variance, ce_lost or dead_fraction."""
    parameters: dict[str, float]
    """By name: alpha, beta_n, beta_k, gamma, beta_T, zeta, eta, as far as the form has them."""
    errors: dict[str, float]
    """Standard error of each."""
    error: float
    """Root mean square of the residuals of ln L, a relative error; of the share itself for dead features."""
    worst: float
    """The largest residual."""
    predicted: float
    """Root mean square error of predicting each value of n, k and T from the others; nan where too few are left."""
    r_squared: float
    """Share of the variance of ln L (or the share) over dictionaries that the law explains."""
    points: int
    """Dictionaries it is fitted to."""

    def __call__(self, n: float | Array, k: float | Array, tokens: float | Array) -> Array:
        """The fitted value for n features, k active ones and T tokens."""
        grid = _Grid(*np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (n, k, tokens))))
        value = _value(tuple(self.parameters), np.array(list(self.parameters.values())), grid)
        return value / (1 + value) if self.metric == DEAD else value

    def text(self) -> str:
        """The law in a line, each parameter with its standard error."""
        given = [f"{NAMES[name]} {value:.3g}±{self.errors[name]:.2g}" for name, value in self.parameters.items()]
        return f"{', '.join(given)}; error {self.error:.2g}, worst {self.worst:.2g}, R² {self.r_squared:.3f}"


NAMES = {
    "alpha": "α", "beta_n": "β_n", "beta_k": "β_k", "gamma": "γ", "beta_T": "β_T", "zeta": "ζ", "eta": "η",
}  # fmt: skip


@dataclass(frozen=True)
class _Grid:
    """The grid of dictionaries that a law is fitted to."""

    n: Array
    k: Array
    T: Array

    def __getitem__(self, rows: Array) -> _Grid:
        return _Grid(self.n[rows], self.k[rows], self.T[rows])


def _value(names: Sequence[str], theta: Array, grid: _Grid) -> Array:
    """L [points] of parameters by name."""
    given = dict(zip(names, theta.tolist(), strict=True))
    n, k, T = np.log(grid.n), np.log(grid.k), np.log(grid.T)
    terms = {"alpha": np.ones_like(n), "beta_n": n, "beta_k": k, "gamma": n * k, "beta_T": T}
    power = sum((given[name] * term for name, term in terms.items() if name in given), np.zeros_like(n))
    value = np.exp(np.clip(power, -50, 50))
    if "zeta" in given:
        value = value + np.exp(np.clip(given["zeta"] + given.get("eta", 0.0) * k, -50, 50))
    return value


def fit_laws(frame: pd.DataFrame) -> tuple[ScalingLaw, ...]:
    """The laws of each architecture and site, from a row a dictionary with the columns of `SweepRow`."""
    laws = []
    for (name, site), rows in frame.groupby(["architecture", "site"], sort=False):
        for metric, column in METRICS.items():
            values = rows[column].to_numpy(float)
            values = values if metric == column else 1 - values
            grid = _Grid(*(rows[c].to_numpy(float) for c in ("features", "k", "tokens")))
            if (law := fit_law(values, grid.n, grid.k, grid.T, metric=metric)) is not None:
                laws.append(replace(law, architecture=str(name), site=str(site)))
    return tuple(laws)


def fit_law(
    values: Array, n: Array, k: Array, tokens: Array, *, metric: str = "unexplained_variance"
) -> ScalingLaw | None:
    """The law of some dictionaries, whose L, widths, sparsities and tokens are given; None where they are too few."""
    grid, relative = _Grid(n, k, np.maximum(tokens, 1)), metric != DEAD
    usable = np.isfinite(values) & ((values > 0) if relative else (values >= 0))
    values, grid = values[usable], grid[usable]
    if len(values) < MIN_POINTS or not (values > 0).any():
        return None
    forms = [form for form in _forms(grid, relative) if len(form) + 2 <= len(values)]
    if not forms or not any(len(np.unique(x)) > 1 for x in (grid.n, grid.k, grid.T)):
        return None
    fits = {form: _fit(form, values, grid, relative) for form in forms}
    best = min(fits, key=lambda form: _aicc(fits[form][1], len(form)))
    theta, residual, jacobian = fits[best]
    target = np.log(values) if relative else values
    spread = float(((target - target.mean()) ** 2).sum())
    return ScalingLaw(
        "", "", metric,
        dict(zip(best, theta.tolist(), strict=True)),
        dict(zip(best, _standard_errors(residual, jacobian), strict=True)),
        float(np.sqrt((residual**2).mean())), float(np.abs(residual).max()),
        _predicted(best, values, grid, relative, theta),
        1 - float((residual**2).sum()) / spread if spread > 0 else math.nan, len(values),
    )  # fmt: skip


def _forms(grid: _Grid, relative: bool) -> list[tuple[str, ...]]:
    """The forms that the grid may tell apart, the plain ones first."""
    several = {name: len(np.unique(x)) for name, x in (("beta_n", grid.n), ("beta_k", grid.k), ("beta_T", grid.T))}
    plain = ("alpha", *(name for name in ("beta_n", "beta_k", "beta_T") if several[name] > 1))
    forms = [plain]
    if several["beta_n"] > 1 and several["beta_k"] > 1:
        forms.append((*plain, "gamma"))
    if relative and max(several["beta_n"], several["beta_T"]) > 2:
        more = IRREDUCIBLE if several["beta_k"] > 1 else IRREDUCIBLE[:1]
        forms += [(*form, *more) for form in tuple(forms)]
    return forms


def _fit(
    form: tuple[str, ...], values: Array, grid: _Grid, relative: bool, begin: Array | None = None
) -> tuple[Array, Array, Array]:
    """Parameters, residuals and Jacobian of the best of some least-squares fits, or of that from `begin`."""
    from scipy.optimize import least_squares

    def residuals(theta: Array) -> Array:
        return _apart(_value(form, theta, grid), values, relative)

    starts = _starts(form, values, grid, relative) if begin is None else [begin]
    best = min((least_squares(residuals, start, x_scale="jac", max_nfev=300) for start in starts), key=lambda f: f.cost)
    return best.x, best.fun, best.jac


def _starts(form: tuple[str, ...], values: Array, grid: _Grid, relative: bool) -> list[Array]:
    """Linear fits of the logarithm of what is left when an irreducible part is taken away."""
    power = [name for name in form if name not in IRREDUCIBLE]
    columns = np.log(np.stack([_value((name,), np.ones(1), grid) for name in power], axis=1))
    L = values if relative else values / np.maximum(1 - values, 1e-3)
    least = L[L > 0].min()
    starts = []
    for share in STARTS if "zeta" in form else (0.0,):
        above = np.log(np.maximum(L - share * least, 1e-3 * least))
        more = [math.log(share * least), 0.0][: len(form) - len(power)] if share else []
        starts.append(np.concatenate([np.linalg.lstsq(columns, above, rcond=None)[0], more]))
    return starts


def _apart(L: Array, values: Array, relative: bool) -> Array:
    """Residuals of ln L, or of a share whose odds are L."""
    return np.log(L / values) if relative else L / (1 + L) - values


def _aicc(residual: Array, n_parameters: int) -> float:
    """Akaike's criterion for small samples, for normal residuals of unknown variance."""
    n, k = len(residual), n_parameters + 1
    likelihood = n * math.log(max(float((residual**2).mean()), 1e-30))
    return likelihood + 2 * k + (2 * k * (k + 1) / (n - k - 1) if n > k + 1 else math.inf)


def _standard_errors(residual: Array, jacobian: Array) -> list[float]:
    n, k = jacobian.shape
    variance = float((residual**2).sum()) / (n - k)
    covariance = variance * np.linalg.pinv(jacobian.T @ jacobian)
    return np.sqrt(np.maximum(np.diag(covariance), 0)).tolist()


def _predicted(form: tuple[str, ...], values: Array, grid: _Grid, relative: bool, begin: Array) -> float:
    """Error of predicting all dictionaries of a width, a sparsity or a token count from those of the others."""
    errors: list[float] = []
    for column in (grid.n, grid.k, grid.T):
        for value in np.unique(column) if len(np.unique(column)) > 2 else ():
            rest = column != value
            if rest.sum() < len(form) + 2 or not (values[rest] > 0).any():
                continue
            theta, _, _ = _fit(form, values[rest], grid[rest], relative, begin)
            errors += _apart(_value(form, theta, grid[~rest]), values[~rest], relative).tolist()
    return float(np.sqrt(np.mean(np.square(errors)))) if errors else math.nan


def law_of(laws: Sequence[ScalingLaw], row: Mapping[str, str]) -> ScalingLaw | None:
    """The law of an architecture, site and metric."""
    return next((law for law in laws if all(getattr(law, key) == value for key, value in row.items())), None)
