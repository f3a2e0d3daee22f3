"""Every metric against a plain loop over tokens, and against how the tokens are split into batches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.data.predictions import ModelPredictions, PredictionTotals
from sae.evaluation.metrics import (
    FeatureTotals,
    ReconstructionTotals,
    ce_recovered,
    error_alignment,
    explained_variance,
    kl_recovered,
    l0,
)

N, D, F, V = 37, 5, 12, 9
SPLITS = [[37], [1] * 37, [30, 7], [5, 0, 2, 30]]


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator) + 3.0
    f = torch.relu(torch.randn(N, F, generator=generator) - 0.7)
    f[:, 3] = 0.0  # dead
    f[:, 4] = 1.0  # dense
    W_dec = torch.nn.functional.normalize(torch.randn(F, D, generator=generator), dim=-1)
    return x, f, W_dec, f @ W_dec + 2.0


def reconstruction(x, x_hat, split):
    totals = ReconstructionTotals()
    for a, b in zip(x.split(split), x_hat.split(split), strict=True):
        totals.update(a, b)
    return totals


def features(f, error, W_dec, split):
    totals = FeatureTotals(f.shape[1])
    for part, e in zip(f.split(split), error.split(split), strict=True):
        token, feature = part.nonzero(as_tuple=True)
        alignment = error_alignment(e, W_dec, token, feature, chunk_bytes=1)
        totals.update(feature, part[token, feature], len(part), alignment=alignment)
    return totals


@pytest.mark.parametrize("split", SPLITS)
def test_reconstruction_metrics_equal_a_loop_over_tokens(data, split):
    x, _, _, x_hat = data
    totals = reconstruction(x, x_hat, split)
    rows = [(a.double(), b.double()) for a, b in zip(x, x_hat, strict=True)]
    mean = sum(a for a, _ in rows) / N
    error = sum(float(((a - b) ** 2).sum()) for a, b in rows)
    assert totals.explained_variance == pytest.approx(1 - error / sum(float(((a - mean) ** 2).sum()) for a, _ in rows))
    assert totals.mse == pytest.approx(error / (N * D))
    assert totals.cosine == pytest.approx(sum(float(a @ b / (a.norm() * b.norm())) for a, b in rows) / N)
    assert totals.l2_ratio == pytest.approx(sum(float(b.norm() / a.norm()) for a, b in rows) / N)
    assert totals.relative_bias == pytest.approx(
        sum(float(b @ b) for _, b in rows) / sum(float(a @ b) for a, b in rows)
    )


@pytest.mark.parametrize("split", SPLITS)
def test_feature_metrics_equal_a_loop_over_features(data, split):
    x, f, W_dec, x_hat = data
    totals = features(f, x - x_hat, W_dec, split)
    density = [sum(float(value) != 0 for value in f[:, i]) / N for i in range(F)]
    assert totals.density.tolist() == pytest.approx(density)
    assert totals.l0 == pytest.approx(sum(density))
    assert totals.dead_fraction == pytest.approx(1 / F)
    assert totals.dense_fraction == pytest.approx(sum(value > 0.1 for value in density) / F)
    assert totals.maximum.tolist() == pytest.approx(f.max(0).values.tolist())


@pytest.mark.parametrize("split", SPLITS)
def test_shrinkage_is_the_rescaling_with_the_least_error(data, split):
    x, f, W_dec, x_hat = data
    totals = features(f, x - x_hat, W_dec, split)
    for i in range(F):
        shrinkage = float(totals.shrinkage_per_feature[i])
        if i == 3:
            assert math.isnan(shrinkage)
            continue

        def error(scale, i=i):
            return float((x - x_hat - scale * f[:, i : i + 1] * W_dec[i]).double().square().sum())

        assert error(shrinkage) <= min(error(shrinkage + 0.01), error(shrinkage - 0.01))
    numerator = sum(float((f[t] * (W_dec @ (x - x_hat)[t])).sum()) for t in range(N))
    assert totals.shrinkage == pytest.approx(numerator / float(f.square().sum()), rel=1e-5)


def test_explained_variance_is_about_the_mean_and_survives_a_large_one():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(4000, 3, generator=generator)
    x = noise + 10_000.0
    constant = torch.full_like(x, 10_000.0)
    # A constant explains no variance, however large it is (a score about 0 instead of the mean would say .9999).
    assert explained_variance(x, constant) == pytest.approx(0.0, abs=2e-3)
    split = reconstruction(x, constant, [1000] * 4)
    exact = float((x.double() - x.double().mean(0)).square().sum())
    assert split._deviation == pytest.approx(exact, rel=1e-5)
    assert explained_variance(x, x) == 1.0


def test_explained_variance_is_not_the_mean_of_batch_ratios():
    x = torch.tensor([[0.0], [1.0], [100.0], [101.0]])
    x_hat = torch.tensor([[0.5], [0.5], [100.5], [100.5]])
    pooled = 1 - 1.0 / float((x - x.mean()).square().sum())
    assert reconstruction(x, x_hat, [2, 2]).explained_variance == pytest.approx(pooled)
    assert explained_variance(x[:2], x_hat[:2]) == pytest.approx(0.0)  # what each batch alone would say


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), cut=st.integers(0, 20), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_splitting_changes_nothing(seed, cut, scale):
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(20, 4, generator=generator)
    x_hat = x + 0.3 * scale * torch.randn(20, 4, generator=generator)
    whole, parts = reconstruction(x, x_hat, [20]), reconstruction(x, x_hat, [cut, 20 - cut])
    for name in ("explained_variance", "mse", "cosine", "l2_ratio", "relative_bias"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 8, 1000])
def test_prediction_metrics_equal_a_loop_over_tokens(monkeypatch, chunk):
    monkeypatch.setattr("sae.data.predictions.CHUNK_BYTES", 4 * V * chunk)
    generator = torch.Generator().manual_seed(2)
    logits, model_logits = torch.randn(N, V, generator=generator), torch.randn(N, V, generator=generator)
    targets = torch.randint(V, (N,), generator=generator)
    totals = PredictionTotals()
    for part in (slice(0, 20), slice(20, N)):
        totals.update(logits[part], ModelPredictions(model_logits[part], targets[part]))
    ce, kl, same = 0.0, 0.0, 0
    for t in range(N):
        q, p = torch.softmax(logits[t].double(), -1), torch.softmax(model_logits[t].double(), -1)
        ce -= math.log(q[targets[t]])
        kl += sum(float(p[v]) * math.log(p[v] / q[v]) for v in range(V))
        same += int(q.argmax() == p.argmax())
    assert totals.cross_entropy == pytest.approx(ce / N)
    assert totals.kl == pytest.approx(kl / N, rel=1e-5)
    assert totals.top1_consistency == pytest.approx(same / N)


def test_recovered_scores():
    assert ce_recovered(ce_model=2.0, ce_sae=2.5, ce_zero=7.0) == pytest.approx(0.9)
    assert ce_recovered(ce_model=2.0, ce_sae=2.0, ce_zero=7.0) == 1.0
    assert math.isnan(ce_recovered(ce_model=2.0, ce_sae=2.5, ce_zero=2.0))
    assert kl_recovered(kl_sae=0.5, kl_zero=5.0) == pytest.approx(0.9)


def test_density_histogram_holds_every_feature(data):
    x, f, W_dec, x_hat = data
    totals = features(f, x - x_hat, W_dec, [N])
    histogram = totals.density_histogram(low=-2.0, bins_per_decade=2)
    assert histogram.edges == pytest.approx([-2.0, -1.5, -1.0, -0.5, 0.0])
    assert sum(histogram.counts) + histogram.dead == F
    expected = [0, 0, 0, 0]
    for density in totals.density.tolist():
        if density:
            expected[min(max(math.floor((math.log10(density) + 2.0) * 2), 0), 3)] += 1
    assert histogram.counts == expected


def test_densities_on_an_edge_of_the_histogram():
    """Of 1,000 tokens: on 100 (a tenth), on 10, on 1 (below the lowest edge), on all, on none."""
    totals = FeatureTotals(5)
    count = torch.tensor([100, 10, 1, 1000, 0])
    feature = torch.arange(5).repeat_interleave(count)
    totals.update(feature, torch.ones(len(feature)), 1000)
    histogram = totals.density_histogram(low=-2.0, bins_per_decade=1)
    assert (histogram.counts, histogram.dead) == ([2, 2], 1)
    assert totals.dense_fraction == pytest.approx(1 / 5)  # more than a tenth, not a tenth


def test_tokens_that_can_never_come_count_nothing():
    logits = torch.tensor([[0.0, 1.0, -math.inf], [2.0, 0.5, -math.inf]])
    totals = PredictionTotals()
    totals.update(logits, ModelPredictions(logits.flip(0), torch.tensor([0, 1])))
    p, q = logits[:, :2].double().flip(0).softmax(-1), logits[:, :2].double().softmax(-1)
    assert totals.kl == pytest.approx(float((p * (p / q).log()).sum() / 2), rel=1e-5)


def test_predictions_that_are_no_numbers_have_no_divergence():
    predictions = ModelPredictions(torch.zeros(1, 2), torch.tensor([0]))
    for logits, expected in (([math.nan, math.nan], math.isnan), ([0.0, -math.inf], math.isinf)):
        totals = PredictionTotals()
        totals.update(torch.tensor([logits]), predictions)
        assert expected(totals.kl)


def test_zero_vectors_and_no_tokens():
    totals = reconstruction(torch.zeros(2, 3), torch.zeros(2, 3), [2])
    assert math.isnan(totals.cosine)
    assert math.isnan(totals.l2_ratio)
    assert math.isnan(ReconstructionTotals().explained_variance)
    totals.update(torch.ones(1, 3), torch.zeros(1, 3))
    assert totals.cosine == 0.0
    assert math.isnan(FeatureTotals(4).l0)


def test_l0_of_dense_activations(data):
    _, f, _, _ = data
    assert l0(f) == pytest.approx(sum(float(v) != 0 for row in f for v in row) / N)
    assert l0(f.reshape(1, N, F)) == l0(f)
