"""The whole package on a second device, under the names of CUDA and MPS: nothing is left on the CPU, nothing is asked
for that the device does not have, and the numbers are those of the CPU.
"""

from __future__ import annotations

import pytest
import torch

from circuits.attribution.activations import Setting
from circuits.discovery.attention.explain import explain_attention
from circuits.discovery.attention.head_loadings import head_loadings
from circuits.discovery.discover import discover
from circuits.editing.edit import Edit, EditOptions, measure_edit
from circuits.faithfulness.edges import edge_faithfulness
from circuits.faithfulness.learned_mask import MaskOptions, learn_node_mask
from circuits.faithfulness.nodes import FaithfulnessOptions, measure_faithfulness
from circuits.options import AttentionOptions, DiscoverOptions
from circuits.uncertainty.verification import verify
from sae.data.cache import CachedActivations
from sae.data.cache_writer import write_cache
from sae.evaluation.evaluate import evaluate_saes
from sae.features.contexts import top_contexts
from sae.features.matching import match_by_activation
from sae.model.sites import Site
from sae.saes import SAEs, load_saes
from sae.sparse.activations import group_offsets, rows_added, rows_multiplied, segment_dot, using, weighted_segment_sum
from sae.training.config import FinetuneConfig, TrainConfig
from sae.training.finetuning import finetune_saes
from sae.training.train import train_saes
from tests.conftest import WORDS
from tests.simulated_device import simulated_device

TEXT = [" ".join(WORDS[i * j % len(WORDS)] for j in range(1, 13)) for i in range(1, 100)]
SITE, OTHER = Site.parse("resid_0"), Site.parse("mlp_0")
QUICK = FaithfulnessOptions(random=1, resamples=20)

only_mps = pytest.mark.parametrize("device", ["mps"], indirect=True)
"""It has all that CUDA lacks and more: no float64, no segment_reduce. Only training asks for CUDA by name."""


@pytest.fixture(params=["cuda", "mps"])
def device(request):
    with simulated_device(request.param) as device, using("torch"):
        yield device


@pytest.fixture(scope="module")
def small_model(make_tiny_model):
    """Of one layer: every operation of the simulated device costs a hundred times what it computes."""
    return make_tiny_model("gpt_neox", layers=1)


@pytest.fixture
def model(make_tiny_model, device):
    return make_tiny_model("gpt_neox", layers=1, device=device.type)


@pytest.fixture
def saes(make_saes, small_model, device):
    return SAEs({site: sae.to(device) for site, sae in make_saes(small_model, architecture="jumprelu").items()})


def small(**options):
    defaults = {"features": 32, "k": 4, "tokens": 1500, "batch_size": 250, "dead_tokens": 600, "autocast": False}
    defaults["checkpoints"] = 1
    return TrainConfig(**defaults | options)


def trained(model, out, **options):
    return train_saes(model, TEXT, sites="resid_0", config=small(**options), out=out, progress=False)[SITE]


def assert_learned_the_same(a, b, start):
    """The changes since the start are the same as a whole, to a fiftieth (a step left out is a sixth).

    Element by element they need not be: Adam divides by the size of the gradient, so where that is all rounding, its
    sign decides about a whole learning rate; and a token may have two features that are nearly the k-th.
    """
    others, before = dict(b.named_buffers()), dict(start.named_buffers())
    for name, x in a.named_buffers():
        change = (others[name] - before[name]).norm()
        assert (x.cpu() - others[name]).norm() <= 0.02 * change + 1e-6 * others[name].norm(), name


def test_the_device_refuses_what_a_real_one_refuses(device):
    x, on_cpu = torch.ones(3, device=device), torch.ones(3)
    assert x.device == device and (x + torch.tensor(1.0)).device == device and x.cpu().device.type == "cpu"
    assert x[torch.tensor([0])].device == device
    for wrong in (
        lambda: x + on_cpu,
        lambda: on_cpu[x > 0],
        lambda: torch.cat([x, on_cpu]),
        lambda: x.index_select(0, torch.tensor([0])),
        lambda: torch.randn(3, device=device, generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError):
            wrong()
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    if device.type == "mps":
        with pytest.raises(TypeError, match="float64"):
            x.double()
        with pytest.raises(NotImplementedError):
            torch.segment_reduce(x, "sum", lengths=torch.tensor([3], device=device))


def test_rows_by_index_are_embedding_bags():
    index, weight, source, g = torch.randint(9, (200,)), torch.randn(200), torch.randn(9, 5), torch.randn(31, 5)
    bag = torch.randint(30, (200,)).sort().values
    offsets = group_offsets(bag, 31)  # the last is empty
    expected = weighted_segment_sum(source, index, offsets, weight), segment_dot(g, bag, source, index, offsets)
    found = rows_added(source, index, offsets, weight), rows_multiplied(g, bag, source, index)
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "options"),
    [
        ("cuda", {"architecture": "topk"}),
        ("mps", {"architecture": "topk"}),
        ("mps", {"architecture": "relu", "revival": "resample", "dead_tokens": 250}),
        ("mps", {"architecture": "matryoshka"}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["architecture"],
    indirect=["device"],
)
def test_training_gives_what_it_gives_on_the_cpu(model, small_model, tmp_path, options):
    there = trained(model, tmp_path / "there", **options)
    assert there.device == model.device
    start = trained(small_model, tmp_path / "start", learning_rate=1e-12, **options)
    assert_learned_the_same(there, trained(small_model, tmp_path / "here", **options), start)
    loaded = load_saes(tmp_path / "there", device=model.device)[SITE]
    assert all(torch.equal(x.cpu(), loaded.get_buffer(name).cpu()) for name, x in there.named_buffers())


@pytest.mark.slow
def test_training_in_bfloat16_from_a_cache_and_fine_tuning(model, tmp_path):
    write_cache(model, TEXT, sites="resid", tokens=600, out=tmp_path / "cache", progress=False)
    cache = CachedActivations(tmp_path / "cache", device=model.device)
    config, out = small(autocast=True, tokens=500), tmp_path / "run"
    saes = train_saes(cache.model, cache.text, config=config, out=out, activations=cache, progress=False)
    config = FinetuneConfig(tokens=300, batch_size=150, checkpoints=1)
    tuned = finetune_saes(model, saes, TEXT, out=tmp_path / "tuned", config=config, progress=False)
    assert all(sae.device == model.device for sae in tuned.values())


@pytest.mark.slow
@only_mps
def test_evaluation_contexts_and_matches(model, saes, small_model, make_saes):
    found = evaluate_saes(model, saes, TEXT[:6], errors=True)
    here = make_saes(small_model, architecture="jumprelu")
    expected = evaluate_saes(small_model, here, TEXT[:6], errors=True)
    for site, metrics in expected.sites.items():
        other = found.sites[site]
        assert other.explained_variance == pytest.approx(metrics.explained_variance, abs=1e-4)
        assert other.shrinkage == pytest.approx(metrics.shrinkage, abs=1e-4)
        assert other.predictions.ce == pytest.approx(metrics.predictions.ce, abs=1e-4)
    features = {SITE: [0, 1, 2]}
    contexts = [top_contexts(one, those, TEXT[:6], features) for one, those in ((model, saes), (small_model, here))]
    densities = [[summary.density for summary in summaries.values()] for summaries in contexts]
    assert densities[0] == densities[1] and len(densities[0]) == 3
    match = match_by_activation(model, (SITE, saes[SITE]), (OTHER, saes[OTHER]), TEXT[:6])
    there = match_by_activation(small_model, (SITE, here[SITE]), (OTHER, here[OTHER]), TEXT[:6])
    torch.testing.assert_close(match.similarity.cpu(), there.similarity, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@only_mps
def test_why_attention_looks_there(model, saes, small_model, make_saes, tiny_prompts):
    here = make_saes(small_model, architecture="jumprelu")
    reports = []
    for m, dictionaries, prompts in (
        (model, saes, tiny_prompts[:2].to(model.device)),
        (small_model, here, tiny_prompts[:2]),
    ):
        circuit = discover(m, dictionaries, prompts, method="attrib", edge_nodes=12, progress=False)
        report = explain_attention(circuit, prompts, AttentionOptions(query="last", key="1"), progress=False)
        reports.append((head_loadings(circuit, prompts, edges=2, progress=False).edges, report.scores[0]))
    (edges, score), (expected_edges, expected) = reports
    assert edges and [edge.heads for edge in edges] == [pytest.approx(e.heads, abs=1e-5) for e in expected_edges]
    assert score.score == pytest.approx(expected.score, abs=1e-4)
    assert [pair.contribution for pair in score.pairs] == pytest.approx(
        [p.contribution for p in expected.pairs], abs=1e-4
    )


@pytest.mark.slow
@only_mps
def test_an_ensemble_whose_edges_take_stored_gradients(model, saes, tiny_prompts):
    options = DiscoverOptions(method="ensemble:attrib,activation-difference", edge_nodes=5)
    circuit = discover(model, saes, tiny_prompts[:2].to(model.device), options, progress=False)
    assert circuit.edges


@pytest.mark.slow
@only_mps
def test_a_circuit_its_tests_and_an_edit(model, saes, small_model, make_saes, tiny_prompts):
    tiny_prompts = tiny_prompts[:2]  # of both lengths
    options, prompts = DiscoverOptions(steps=1, edge_nodes=10), tiny_prompts.to(model.device)
    circuit = discover(model, saes, prompts, options, progress=False)
    here = make_saes(small_model, architecture="jumprelu")
    expected = discover(small_model, here, tiny_prompts, options, progress=False)
    for site, nodes in expected.nodes.items():
        torch.testing.assert_close(circuit.nodes[site].effect, nodes.effect, atol=1e-5, rtol=1e-3)
    for pair, weights in expected.edges.items():
        torch.testing.assert_close(circuit.edges[pair], weights, atol=1e-5, rtol=1e-3)
    for ablation in ("mean", "counterfactual", "resample"):
        how = FaithfulnessOptions(ablation=ablation, random=0)
        measure_faithfulness(Setting.of(model, saes), circuit.nodes, prompts, how, sizes=(5,), progress=False)
    edges = edge_faithfulness(circuit, prompts, QUICK, sizes=(10,), progress=False)
    there = edge_faithfulness(expected, tiny_prompts, QUICK, sizes=(10,), progress=False)
    assert edges.faithfulness == pytest.approx(there.faithfulness, abs=1e-3)
    how = MaskOptions(steps=1, batch_size=2, smallest=5)
    learn_node_mask(Setting.of(model, saes), circuit.nodes, prompts, how, progress=False)
    verify(circuit, prompts, nodes=2, progress=False)
    for operation in ("zero", "mean"):
        edit = Edit(["resid_0/3"], operation)
        measure_edit(model, saes, edit, prompts, EditOptions(texts=TEXT[:4], n_random=1))
