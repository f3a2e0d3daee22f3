"""A planted circle is found to be one thing; lines, and features that are independent, are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae.autoencoder import SAEConfig, SparseAutoencoder, SparseFeatures
from sae.features.group_plots import plot_groups
from sae.features.groups import FeatureGroups, find_groups, groups_of
from sae.features.reducibility import mixture, reducibility, separability, whitened
from sae.model.sites import Site
from tests.circuits.conftest import random_sae

N, D = 6_000, 24


def directions(angles, first):
    W = torch.zeros(len(angles), D)
    W[:, first], W[:, first + 1] = torch.tensor(angles).cos(), torch.tensor(angles).sin()
    return W


CIRCLE, FAN, PAIR = list(range(8)), list(range(8, 12)), [12, 13]
W_DEC = torch.cat([
    directions([2 * np.pi * i / 8 for i in range(8)], 0), directions([0.8 * i for i in range(4)], 2),
    directions([0, 0.9], 4), torch.eye(D)[8:18],
])  # fmt: skip
"""A circle tiled by eight features, four lines, two that are not at right angles, and ten others."""


@pytest.fixture(scope="module")
def synthetic():
    """A dictionary and activations x [N, d]: each of the three is there on a twelfth of the tokens."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    def there():
        return (rand(N) < 1 / 12).float()[:, None]

    angle = 2 * np.pi * rand(N)
    circle = torch.stack([angle.cos(), angle.sin()], 1) * (1 + 0.1 * (rand(N, 1) - 0.5)) * there()
    line = torch.nn.functional.one_hot(torch.randint(4, (N,), generator=generator), 4) * (0.6 + rand(N, 1)) * there()
    pair = (rand(N, 2) < 0.8) * (0.6 + rand(N, 2)) * there()
    others = (rand(N, 10) < 0.03) * (0.6 + rand(N, 10))
    tensors = {"W_enc": W_DEC, "b_enc": torch.full((24,), -0.5), "W_dec": W_DEC, "b_dec": torch.zeros(D)}
    sae = SparseAutoencoder(SAEConfig("relu", D, 24, subtract_b_dec=False), tensors)
    f = torch.cat([sae.encode(circle @ W_DEC[[0, 2], :])[:, :8], line, pair, others], dim=1)
    return sae, f


@pytest.mark.slow
def test_a_planted_circle_is_found_and_lines_are_not(synthetic, tmp_path):
    sae, f = synthetic
    token, feature = f.nonzero(as_tuple=True)
    active = SparseFeatures(token, feature, f[token, feature])
    groups, untested = groups_of(active, N, sae.W_dec, site="resid_1", token_ids=torch.arange(N) % 50)
    found = {tuple(sorted(group.features)): group for group in groups}
    assert set(found) == {tuple(CIRCLE), tuple(FAN), tuple(PAIR)} and untested == 0
    verdicts = {name: group.verdict for name, group in found.items()}
    assert verdicts == {
        tuple(CIRCLE): "irreducible", tuple(FAN): "one feature at a time", tuple(PAIR): "independent"
    }  # fmt: skip
    circle = found[tuple(CIRCLE)]
    firing = (f[:, CIRCLE] != 0).sum(1)
    assert circle.tokens == (firing > 0).sum() and circle.alone == pytest.approx(
        (firing == 1).sum() / (firing > 0).sum()
    )
    assert circle.best.components == (1, 2) and circle.best.share == pytest.approx(1, abs=1e-6)
    low, high = circle.best.test.separability_interval
    assert circle.best.test.chance + 0.2 < low <= circle.best.test.separability <= high
    result = FeatureGroups(groups, N, {}, {i: f" word{i}" for i in range(50)})
    assert "1 of them irreducible" in result.text() and result.to_dict()["groups"][0]["verdict"]
    assert plot_groups(result, tmp_path / "groups.png").stat().st_size > 20_000


def test_indices_are_those_of_brute_force():
    """Mutual information summed cell by cell, and points near a line counted one by one."""
    draw = np.random.default_rng(0)
    angle = draw.uniform(0, 2 * np.pi, 400)
    points = whitened(np.stack([2 * np.cos(angle), np.sin(angle)], 1) @ np.array([[1, 0.4], [0, 1]]))
    assert np.cov(points.T) == pytest.approx(np.eye(2), abs=1e-9)
    value, rotated = separability(points)
    cells = np.zeros((10, 10))
    low, high = rotated.min(0), rotated.max(0)
    for point in rotated:
        i, j = np.minimum((10 * (point - low) / (high - low)).astype(int), 9)
        cells[i, j] += 1 / len(points)
    expected = sum(
        cells[i, j] * np.log2(cells[i, j] / (cells[i].sum() * cells[:, j].sum()))
        for i in range(10) for j in range(10) if cells[i, j]
    )  # fmt: skip
    assert value == pytest.approx(expected, abs=0.02)
    best = 0.0
    for theta in np.linspace(0, np.pi, 60):
        projection = points @ [np.cos(theta), np.sin(theta)]
        for offset in np.linspace(-2, 2, 60):
            near = np.abs(projection + offset) < 0.1 * np.sqrt(np.mean((projection + offset) ** 2))
            best = max(best, near.mean())
    share, inside = mixture(points)
    assert share == inside.mean() and best - 0.01 <= share <= best + 0.03


@pytest.mark.parametrize(
    ("kind", "product", "mixed"), [("circle", False, False), ("normal", True, False), ("sheared", True, False),
                                   ("cross", False, True), ("rays", False, True)],
)  # fmt: skip
def test_what_is_one_thing_and_what_is_two(kind, product, mixed):
    draw = np.random.default_rng(1)
    angle, size = draw.uniform(0, 2 * np.pi, 2000), draw.uniform(0.3, 1.5, (2000, 1))
    circle, normal = np.stack([np.cos(angle), np.sin(angle)], 1), draw.normal(size=(2000, 2))
    turns = {"cross": draw.integers(0, 4, 2000) * np.pi / 2, "rays": draw.integers(0, 3, 2000) * 2 * np.pi / 3}
    points = {
        "circle": circle + 0.05 * normal,
        "normal": normal,
        "sheared": draw.uniform(size=(2000, 2)) @ np.array([[1, 0.8], [0, 0.6]]),
    }
    points |= {name: np.stack([np.cos(turn), np.sin(turn)], 1) * size for name, turn in turns.items()}
    test = reducibility(points[kind])
    assert (test.is_product, test.is_mixture) == (product, mixed) and test.is_irreducible == (kind == "circle")
    assert test.mixture_interval[0] <= test.mixture <= test.mixture_interval[1]


def test_groups_of_a_model(tiny_model):
    """Features that are the same but for noise are a group, wherever they fire; it is too rare to test here."""
    site = Site.parse("resid_1")
    sae = random_sae(site, tiny_model.d_model)
    sae.W_dec[1] = torch.nn.functional.normalize(sae.W_dec[0] + 0.02 * sae.W_dec[5], dim=-1)
    text = ["the man near the dogs sees a king", "boys walk and girls sing with the queen"] * 40
    groups = find_groups(tiny_model, {site: sae}, text)
    assert groups.n_tokens == 40 * (8 + 8) and "groups of features tested" in groups.text()
