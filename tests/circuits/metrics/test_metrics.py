"""Metrics against loops written from their definitions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from circuits.metrics import metrics as behaviour
from sae.errors import UserError


@pytest.fixture
def logits(tiny_model, tiny_prompts):
    return torch.randn(len(tiny_prompts), tiny_model.vocab_size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def several(tiny_prompts):
    """The same prompts with one or two answers each."""
    second = (tiny_prompts.clean_answers + 1) % 5
    second[::2] = -1
    return replace(
        tiny_prompts,
        clean_answers=torch.stack([tiny_prompts.clean_answers, second], 1),
        patch_answers=torch.stack([tiny_prompts.patch_answers, torch.full_like(second, -1)], 1),
    )


def answers_of(tensor, row) -> list[int]:
    return [answer for answer in tensor[row].reshape(-1).tolist() if answer >= 0]


@pytest.mark.parametrize("which", ["tiny_prompts", "several"])
def test_logit_difference(request, logits, which):
    prompts = request.getfixturevalue(which)
    values = behaviour.logit_difference(logits, prompts)
    for row, value in enumerate(values.tolist()):
        good, bad = answers_of(prompts.clean_answers, row), answers_of(prompts.patch_answers, row)
        expected = sum(logits[row, i].item() for i in bad) / len(bad) - sum(logits[row, i].item() for i in good) / len(
            good
        )
        assert value == pytest.approx(expected, abs=1e-5)


def test_logit_difference_without_patch_answers(logits, tiny_prompts):
    alone = replace(tiny_prompts, patch=None, patch_answers=None)
    values = behaviour.logit_difference(logits, alone)
    assert torch.equal(values, -logits[torch.arange(len(alone)), alone.clean_answers])


@pytest.mark.parametrize("which", ["tiny_prompts", "several"])
def test_log_probability(request, logits, which):
    prompts = request.getfixturevalue(which)
    for row, value in enumerate(behaviour.log_probability(logits, prompts).tolist()):
        p = logits[row].exp() / logits[row].exp().sum()
        assert value == pytest.approx(-math.log(sum(p[i] for i in answers_of(prompts.clean_answers, row))), abs=1e-5)


def test_kl_is_zero_at_the_clean_run_and_the_divergence_elsewhere(tiny_model, tiny_prompts, logits):
    with pytest.raises(UserError, match="prepare"):
        behaviour.kl(logits, tiny_prompts)
    prompts = behaviour.prepare(tiny_prompts, tiny_model, "kl", batch_size=3)
    clean = behaviour.last_logits(tiny_model, prompts)
    assert behaviour.kl(clean, prompts).abs().max() < 1e-6
    p, q = clean.softmax(-1), logits.softmax(-1)
    assert torch.allclose(behaviour.kl(logits, prompts), (p * (p / q).log()).sum(-1), atol=1e-5)
    assert torch.equal(prompts[2:4].reference, prompts.reference[2:4])
    assert behaviour.prepare(tiny_prompts, tiny_model, "logit_difference") is tiny_prompts


def test_last_logits_do_not_depend_on_batching(tiny_model, tiny_prompts):
    together = behaviour.last_logits(tiny_model, tiny_prompts)
    assert torch.allclose(behaviour.last_logits(tiny_model, tiny_prompts, batch_size=1), together, atol=1e-5)


def test_accuracy(tiny_prompts, logits):
    clean = logits.gather(1, tiny_prompts.clean_answers[:, None])
    patch = logits.gather(1, tiny_prompts.patch_answers[:, None])
    assert behaviour.correct(logits, tiny_prompts).float().mean().item() == pytest.approx(
        (clean > patch).float().mean().item()
    )
    alone = replace(tiny_prompts, patch_answers=None)
    best = logits.clone()
    best[torch.arange(3), alone.clean_answers[:3]] = 100.0
    best[torch.arange(3, 8), (alone.clean_answers[3:] + 1) % logits.shape[1]] = 100.0
    assert behaviour.correct(best, alone).float().mean() == pytest.approx(3 / 8)


def test_metrics_by_name_and_from_users_files(tmp_path, logits, tiny_prompts):
    assert behaviour.get_metric("kl") is behaviour.kl
    assert behaviour.get_metric(behaviour.kl) is behaviour.kl
    assert behaviour.get_metric("circuits.metrics.metrics:log_probability") is behaviour.log_probability
    (tmp_path / "mine.py").write_text("def first(logits, prompts):\n    return logits[:, 0]\n")
    assert torch.equal(behaviour.get_metric(f"{tmp_path}/mine.py:first")(logits, tiny_prompts), logits[:, 0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("logit_diference", "did you mean 'logit_difference'"),
        ("no_such_module_x:f", "cannot import the metric"),
        ("nowhere.py:f", "no file nowhere.py"),
        ("circuits.metrics.metrics:nothing", "has no function 'nothing'"),
        ("circuits.metrics.metrics:METRICS", "is not a function"),
    ],
)
def test_unknown_metrics(name, message):
    with pytest.raises(UserError, match=message):
        behaviour.get_metric(name)


@pytest.mark.parametrize("metric", [behaviour.logit_difference, behaviour.log_probability])
def test_differences_of_16_bit_logits_are_not_rounded_again(logits, tiny_prompts, metric):
    rounded = (logits + 40).bfloat16()
    m = metric(rounded, tiny_prompts)
    assert m.dtype == torch.float32
    torch.testing.assert_close(m, metric(rounded.float(), tiny_prompts))
    assert metric(logits.double(), tiny_prompts).dtype == torch.float64


@pytest.mark.parametrize(
    ("delta", "warned"), [([3.0, 2.5], False), ([3.0, -2.9], True), ([0.0, 0.0], False), ([3.0, -1.0], False)]
)
def test_a_metric_that_cancels_over_prompts_is_told(caplog, delta, warned):
    behaviour.warn_if_cancelling(behaviour.logit_difference, torch.tensor(delta))
    assert bool(caplog.records) == warned
