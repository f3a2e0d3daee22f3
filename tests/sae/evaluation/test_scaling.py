"""Scaling laws recover what was planted, and say no more than the grid can tell."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from sae.evaluation.scaling import fit_law, fit_laws
from sae.evaluation.sweep_plots import plot_laws

AXES = [256, 512, 1024, 4096], [8, 16, 64], [1e6, 16e6]
PLANTED = {"alpha": 2.0, "beta_n": -0.3, "beta_k": -0.5, "gamma": 0.02, "beta_T": -0.05, "zeta": -2.5, "eta": -0.3}


def grid(widths, sparsities, tokens):
    return [x.ravel() for x in np.meshgrid(widths, sparsities, tokens, indexing="ij")]


@pytest.mark.slow
def test_planted_exponents_are_recovered():
    """Within three standard errors, the irreducible part too; and a plain law predicts where nothing was measured."""
    n, k, T = grid(*AXES)
    noise = np.exp(0.002 * np.random.default_rng(0).normal(size=len(n)))
    p = PLANTED
    power = np.exp(p["alpha"] + p["beta_n"] * np.log(n) + p["beta_k"] * np.log(k) + p["gamma"] * np.log(n) * np.log(k)
                   + p["beta_T"] * np.log(T))  # fmt: skip
    law = fit_law((power + np.exp(p["zeta"] + p["eta"] * np.log(k))) * noise, n, k, T)
    assert set(law.parameters) == set(PLANTED) and law.r_squared > 0.999
    for name, value in PLANTED.items():
        assert law.parameters[name] == pytest.approx(value, abs=3 * law.errors[name] + 1e-3), name
    assert law.parameters["beta_n"] == pytest.approx(-0.3, abs=0.03) and law.errors["beta_n"] < 0.02
    assert 0.001 < law.error < 0.003 and law.predicted < 0.02
    plain = fit_law(n**-0.3 * k**-0.5 * noise, n, k, T)
    assert plain.parameters["beta_n"] == pytest.approx(-0.3, abs=3 * plain.errors["beta_n"] + 1e-3)
    assert plain(2048.0, 32.0, 4e6) == pytest.approx(2048**-0.3 * 32**-0.5, rel=0.005)


@pytest.mark.slow
def test_what_the_grid_cannot_tell_is_left_out(tmp_path):
    n, k, T = grid([256, 1024], [8, 16, 32], [1e6])
    odds = np.exp(-6 + 0.8 * np.log(n) - 0.5 * np.log(k))
    frame = pd.DataFrame(
        {"architecture": "topk", "site": "resid_1", "features": n, "k": k, "tokens": T, "explained_variance": 1 - 1 / n,
         "ce_recovered": np.nan, "dead_fraction": odds / (1 + odds)}
    )  # fmt: skip
    laws = {law.metric: law for law in fit_laws(frame)}
    assert set(laws) == {"unexplained_variance", "dead_fraction"}
    assert set(laws["unexplained_variance"].parameters) == {"alpha", "beta_n", "beta_k"}
    assert laws["dead_fraction"].parameters["beta_n"] == pytest.approx(0.8, abs=1e-3)
    assert laws["dead_fraction"](1024.0, 8.0, 1.0) == pytest.approx(odds[3] / (1 + odds[3]), abs=1e-4)
    assert plot_laws(frame, list(laws.values()), "topk", tmp_path / "scaling.png").stat().st_size > 10_000
    assert fit_law(1 / n[:3], n[:3], k[:3], T[:3]) is None and fit_law(np.ones(6), n, k, T) is not None
    assert fit_laws(frame[:2]) == () and fit_law(np.full(6, np.nan), n, k, T) is None
