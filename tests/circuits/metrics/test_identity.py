"""A circuit keeps the metric it was found with: it is known by its code, given again, and never run by itself."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch

from circuits.circuit import Circuit
from circuits.discovery.discover import discover
from circuits.faithfulness.edges import edge_faithfulness
from circuits.faithfulness.nodes import FaithfulnessOptions
from circuits.metrics import metrics as behaviour
from circuits.metrics.identity import code_fingerprint
from circuits.options import DiscoverOptions
from circuits.uncertainty.verification import verify
from sae.errors import UserError

OPTIONS = DiscoverOptions(edge_nodes=20, steps=3, sites="resid")


def scaled(factor: float):
    """A metric that closes over a number."""

    def metric(logits, prompts):
        return factor * behaviour.logit_difference(logits, prompts) + logits[:, 3]

    return metric


def column(logits, prompts):
    return behaviour.logit_difference(logits, prompts)[:, None]


def mean(logits, prompts):
    return behaviour.logit_difference(logits, prompts).mean()


def infinite(logits, prompts):
    return behaviour.logit_difference(logits, prompts) / 0


def right(logits, prompts):
    return behaviour.correct(logits, prompts).float()


def whole(logits, prompts):
    return logits.argmax(-1)


class Weighted:
    def __init__(self, weight) -> None:
        self.weight = weight

    def __call__(self, logits, prompts):
        return logits[:, 0] * 2


def loaded(path, source: str):
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.m


def test_a_fingerprint_is_of_what_is_computed(tmp_path):
    assert code_fingerprint(scaled(2.0)) == code_fingerprint(scaled(2.0)) != code_fingerprint(scaled(3.0))
    one, other = Weighted(torch.ones(3)), Weighted(torch.ones(3))
    assert code_fingerprint(one) == code_fingerprint(other) != code_fingerprint(Weighted(torch.zeros(3)))
    halves = [code_fingerprint(functools.partial(torch.mul, other=x)) for x in (1, 2)]
    assert halves[0] != halves[1]
    assert code_fingerprint(Weighted(iter(()))) is None
    source = "SCALE = 2\ndef f(x):\n    return x\n"
    source += 'def m(logits, prompts):\n    """Says."""\n    return SCALE * f(logits[:, 0])\n'
    first = code_fingerprint(loaded(tmp_path / "a.py", source))
    same = source.replace('"""Says."""', '"""Other."""').replace("return SCALE", "# why\n    return  SCALE")
    assert code_fingerprint(loaded(tmp_path / "b.py", same)) == first
    for before, after in (("SCALE = 2", "SCALE = 3"), ("return x", "return -x"), ("[:, 0]", "[:, 1]")):
        assert code_fingerprint(loaded(tmp_path / "c.py", source.replace(before, after))) != first


@pytest.fixture(scope="module")
def circuit(tiny_model, tiny_saes, tiny_prompts):
    return discover(tiny_model, tiny_saes, tiny_prompts, OPTIONS, metric=scaled(2.0), progress=False)


def test_everything_measured_of_a_circuit_uses_its_own_metric(circuit, tiny_model, tiny_saes, tiny_prompts):
    m = behaviour.metric_values(tiny_model, tiny_prompts, scaled(2.0))
    assert circuit.metadata["m_clean"] == pytest.approx(m.mean().item(), abs=1e-5)
    exact = verify(circuit, tiny_prompts, nodes=4, progress=False)
    assert exact.exact == verify(circuit, tiny_prompts, nodes=4, metric=scaled(2.0), progress=False).exact
    edges = edge_faithfulness(circuit, tiny_prompts, FaithfulnessOptions(random=0, resamples=0), sizes=[5],
        progress=False,
    )  # fmt: skip
    assert edges.m_model == pytest.approx(m.mean().item(), abs=1e-5)


def test_a_saved_circuit_asks_for_its_code(circuit, tmp_path, tiny_model, tiny_saes, tiny_prompts):
    circuit.save(tmp_path, graph=circuit.graph(nodes=5))
    again = Circuit.load(tmp_path)
    with pytest.raises(UserError, match=r"scaled.<locals>.metric', which is Python code"):
        verify(again, tiny_prompts, nodes=4, progress=False)
    with pytest.raises(UserError, match="give the same function"):
        again.get_metric(scaled(3.0))
    with pytest.raises(UserError, match="'kl' now has none"):
        again.get_metric("kl")
    assert again.get_metric(scaled(2.0))


def test_named_metrics_are_read_from_the_run(tiny_model, tiny_saes, tiny_prompts, tmp_path):
    circuit = discover(tiny_model, tiny_saes, tiny_prompts, OPTIONS, metric=behaviour.kl, progress=False)
    assert circuit.metadata["options"]["metric"] == "kl"
    circuit.save(tmp_path, graph=circuit.graph(nodes=5))
    again = Circuit.load(tmp_path)
    assert again.get_metric() is behaviour.kl
    with pytest.raises(UserError, match="explains the metric 'kl', not 'log_probability'"):
        again.get_metric("log_probability")


def test_batches_of_another_function_are_not_gone_on_with(tiny_model, tiny_saes, tiny_prompts, tmp_path):
    def found(metric, *, resume: bool):
        return discover(
            tiny_model, tiny_saes, tiny_prompts, OPTIONS, metric=metric, progress=False, partial=tmp_path / "partial",
            resume=resume,
        )  # fmt: skip

    first = found(scaled(2.0), resume=False)
    assert found(scaled(2.0), resume=True).metadata["m_clean"] == first.metadata["m_clean"]
    with pytest.raises(UserError, match="metric_fingerprint"):
        found(scaled(3.0), resume=True)
    with pytest.raises(UserError, match="cannot be compared with that of the interrupted"):
        found(Weighted(iter(())), resume=True)


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (column, r"gave shape \[8, 1\], expected \[8\]"),
        (mean, r"gave shape \[\], expected \[8\]"),
        (infinite, "it must be finite"),
        (right, "has no gradient"),
        (whole, "gave int64 numbers"),
    ],
)
def test_what_a_users_metric_gives_is_looked_at_first(tiny_model, tiny_saes, tiny_prompts, metric, said, monkeypatch):
    monkeypatch.setattr("circuits.discovery.discover.node_pass", lambda work: pytest.fail("the node pass ran"))
    with pytest.raises(UserError, match=said):
        discover(tiny_model, tiny_saes, tiny_prompts, OPTIONS, metric=metric, progress=False)
