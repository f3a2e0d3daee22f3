"""A probe's logit as the metric: by hand, through every method, edges and faithfulness; probes learned and kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from circuits.attribution.activations import Setting
from circuits.discovery.discover import discover
from circuits.faithfulness.edges import edge_faithfulness
from circuits.faithfulness.learned_mask import MaskOptions, learn_node_mask
from circuits.faithfulness.nodes import FaithfulnessOptions, measure_faithfulness
from circuits.metrics.fit_probe import fit_probe, read_site
from circuits.metrics.metrics import absolute, get_metric
from circuits.metrics.probe import Probe, read_by, save_probe, visible_sites
from circuits.options import METHODS, DiscoverOptions
from circuits.uncertainty.verification import verify
from sae.errors import UserError
from sae.model.sites import Site
from tests.circuits.conftest import MIXED, with_spans

SITE = Site.parse("resid_0")


@pytest.fixture(scope="module")
def probe():
    generator = torch.Generator().manual_seed(3)
    return Probe(torch.randn(32, generator=generator), torch.tensor(0.7), SITE)


def by_hand(model, probe, tokens, places=None):
    x = model.run(tokens, capture=[probe.site]).activations[probe.site]
    outputs = x @ probe.weight + probe.bias
    return (
        outputs[:, -1]
        if places is None
        else torch.stack([row[at].mean() for row, at in zip(outputs, places, strict=True)])
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, tiny_model, tiny_saes, tiny_prompts, probe):
    """Ends by hand; at the probe's own site the metric is linear, so effects are products with the probe's weight."""
    prompts = with_spans(tiny_prompts, MIXED)
    probe = replace(probe, position="b")  # attention carries little to the last token, the span differs itself
    circuit = discover(
        tiny_model, tiny_saes, prompts, DiscoverOptions(method=method, edge_nodes=20), metric=probe, progress=False
    )
    assert circuit.metadata["sites"] == ["embed", "attn_0", "mlp_0", "resid_0"]
    places = prompts.span_numbers == prompts.spans.index("b")
    for name, tokens in (("m_clean", prompts.clean), ("m_patch", prompts.patch)):
        assert circuit.metadata[name] == pytest.approx(
            by_hand(tiny_model, probe, tokens, places).mean().item(), abs=1e-4
        )
    if method in ("random", "activation-difference"):
        return
    sae = tiny_saes[SITE]
    f = [
        sae.encode(tiny_model.run(tokens, capture=[SITE]).activations[SITE])
        for tokens in (prompts.clean, prompts.patch)
    ]
    share = (places / places.sum(1, keepdim=True))[..., None]
    expected = ((f[1] - f[0]) * share).sum(1).mean(0) * (sae.W_dec @ probe.weight)
    nodes = circuit.nodes[SITE]
    if method == "graddrop":  # magnitudes of single tokens are added
        return
    for feature, effect in zip(nodes.feature.tolist(), nodes.effect.tolist(), strict=True):
        if feature < nodes.n_features:
            assert effect == pytest.approx(expected[feature].item(), abs=1e-4)
    assert any(down is None for _, down in circuit.edges)


@pytest.mark.slow
def test_everything_that_is_measured(tiny_model, tiny_saes, tiny_prompts, probe, tmp_path):
    path = save_probe(tmp_path / "p.safetensors", probe.weight, probe.bias, site=SITE)
    options = DiscoverOptions(metric=f"probe:{path}", edge_nodes=30, steps=4)
    circuit = discover(tiny_model, tiny_saes, tiny_prompts, options, progress=False)
    assert circuit.metadata["completeness"]["worst_residual"] < 0.05
    result = measure_faithfulness(
        Setting.of(tiny_model, tiny_saes, options.metric),
        circuit.nodes,
        tiny_prompts,
        FaithfulnessOptions(random=0),
        sizes=[10, 10_000],
        progress=False,
    )
    assert result.m_model == pytest.approx(by_hand(tiny_model, probe, tiny_prompts.clean).mean().item(), abs=1e-4)
    edges = edge_faithfulness(circuit, tiny_prompts, FaithfulnessOptions(random=0), sizes=[20], progress=False)
    kept = measure_faithfulness(
        Setting.of(tiny_model, tiny_saes, options.metric),
        circuit.edge_nodes,
        tiny_prompts,
        FaithfulnessOptions(random=0),
        sizes=[10_000],
        progress=False,
    )
    assert edges.m_model == pytest.approx(result.m_model, abs=1e-4)
    assert edges.all_joined == pytest.approx(kept.faithfulness[0], abs=2e-3)
    exact = verify(circuit, tiny_prompts, nodes=10, max_rows=3, progress=False)
    assert exact.correlation is None or exact.correlation > 0.5
    mask = learn_node_mask(
        Setting.of(tiny_model, tiny_saes, options.metric),
        circuit.nodes,
        tiny_prompts,
        MaskOptions(steps=2, batch_size=4),
        progress=False,
    )
    assert len(mask.losses) == 2
    with pytest.raises(UserError, match="'optimal' fits constants to the logits"):
        measure_faithfulness(
            Setting.of(tiny_model, tiny_saes, options.metric),
            circuit.nodes,
            tiny_prompts,
            FaithfulnessOptions(ablation="optimal"),
            sizes=[10],
            progress=False,
        )


def test_the_margin_does_not_cancel(tiny_model, tiny_saes, tiny_prompts, probe, tmp_path, caplog):
    """Both directions of every pair: the logit's total effect is zero, the margin's is what either direction loses."""
    both = tiny_prompts[[0, 0]]
    middle = sum(by_hand(tiny_model, probe, tokens).mean() for tokens in (both.clean, both.patch)) / 2
    probe = replace(probe, bias=probe.bias - middle)  # of opposite sign on the two
    path = save_probe(tmp_path / "p.safetensors", probe.weight, probe.bias, site=SITE)
    swap = torch.tensor([False, True])[:, None]
    sides = [
        torch.where(swap, a.input_ids, b.input_ids) for a, b in ((both.patch, both.clean), (both.clean, both.patch))
    ]
    both = replace(both, clean=replace(both.clean, input_ids=sides[0]), patch=replace(both.patch, input_ids=sides[1]))
    logit, margin = (
        discover(tiny_model, tiny_saes, both, DiscoverOptions(metric=f"{kind}:{path}", edge_nodes=10), progress=False)
        for kind in ("probe", "probe-margin")
    )
    assert logit.metadata["total_effect"] == pytest.approx(0, abs=1e-5)
    assert [record.getMessage().rpartition("; ")[2] for record in caplog.records] == [
        "use probe-margin:FILE in place of probe:FILE"
    ]
    clean, patch = (by_hand(tiny_model, probe, tokens) for tokens in (both.clean, both.patch))
    assert margin.metadata["m_clean"] == pytest.approx(-clean.abs().mean().item(), abs=1e-5)
    assert margin.metadata["m_patch"] == pytest.approx(-(patch * clean.sign()).mean().item(), abs=1e-5)
    assert margin.metadata["total_effect"] == pytest.approx(2 * clean.abs().mean().item(), abs=1e-5) != 0


def test_the_forward_pass_ends_at_the_probe(tiny_model, tiny_prompts, probe):
    read = read_by(tiny_model, probe)
    run = read.run(tiny_prompts.clean, capture=[Site("embed")])
    assert list(run.activations) == [Site("embed")] and run.logits.shape == (8, 1, 7)
    assert torch.allclose(probe(run.logits[:, -1], tiny_prompts), by_hand(tiny_model, probe, tiny_prompts.clean))
    some = tiny_prompts[[0, 2]]  # shorter than the batch they were run in
    assert torch.allclose(probe(run.logits[[0, 2], -1], some), by_hand(tiny_model, probe, some.clean), atol=1e-5)
    assert read_by(tiny_model, get_metric("kl")) is tiny_model


def test_sites_that_the_probe_cannot_see(make_tiny_model, tiny_model, probe):
    sites = list(tiny_model.sites)
    assert visible_sites(probe, tiny_model, sites) == sites[: sites.index(SITE) + 1]
    of_mlp = replace(probe, site=Site.parse("mlp_1"))
    assert tiny_model.parallel_blocks and Site.parse("attn_1") not in visible_sites(of_mlp, tiny_model, sites)
    assert Site.parse("attn_1") in visible_sites(of_mlp, make_tiny_model("llama"), sites)
    assert visible_sites(None, tiny_model, sites) == sites
    with pytest.raises(UserError, match="none of the sites"):
        visible_sites(probe, tiny_model, [Site.parse("mlp_1")])


def test_files_and_names(tmp_path, tiny_model, tiny_prompts):
    weight, bias = torch.randn(3, 32), torch.randn(3)
    path = save_probe(tmp_path / "jobs.safetensors", weight, bias, site=SITE, position="b", classes=["a", "b", "c"])
    found = get_metric(f"probe:{path}:b")
    assert isinstance(found, Probe) and torch.equal(found.weight, weight[1]) and found.bias == bias[1]
    assert (found.site, found.position, found.name) == (SITE, "b", "logit of probe jobs, b")
    assert torch.equal(get_metric(f"probe:{path}:2").weight, weight[2])
    for name, why in (
        (f"probe:{path}", "class"),
        (f"probe:{path}:9", "class"),
        ("probe:nowhere.safetensors", "no probe"),
    ):
        with pytest.raises(UserError, match=why):
            get_metric(name)
    one = save_probe(tmp_path / "one.safetensors", weight[0], bias[0], site=SITE)
    with pytest.raises(UserError, match="one output"):
        get_metric(f"probe:{one}:a")
    with pytest.raises(UserError, match="reads the span 'b'"):
        found(torch.zeros(8, 7), tiny_prompts)
    with pytest.raises(UserError, match="width 3"):
        read_by(tiny_model, replace(found, weight=torch.zeros(3)))
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(UserError, match="not a safetensors"):
        get_metric(f"probe:{tmp_path / 'text.safetensors'}")
    assert absolute(f"probe:{path}:b") == f"probe:{path}:b" and absolute("kl") == "kl"


def test_learning_one():
    """Standardisation is folded back: the raw weights label what the generating direction does."""
    generator = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(300, 8, generator=generator) * torch.logspace(-2, 2, 8)
    labels = ["right" if value > 0 else "left" for value in ((x - 3) / torch.logspace(-2, 2, 8))[:, 2]]
    fitted = fit_probe(x, labels)
    assert fitted.classes == ["left", "right"] and fitted.accuracy > 0.95 and fitted.n_test == 75
    right = (x @ fitted.weight + fitted.bias > 0) == torch.tensor([label == "right" for label in labels])
    assert right.float().mean() > 0.97
    three = fit_probe(x, [label if row % 3 else "up" for row, label in enumerate(labels)])
    assert three.weight.shape == (3, 8) and three.bias.shape == (3,)
    with pytest.raises(UserError, match="two labels"):
        fit_probe(x, ["a"] * 300)


def test_reading_a_site(tiny_model, tiny_prompts):
    x = tiny_model.run(tiny_prompts.clean, capture=[SITE]).activations[SITE]
    assert torch.allclose(read_site(tiny_model, tiny_prompts.clean, SITE, batch_size=3), x[:, -1], atol=1e-5)
    inside = tiny_prompts.clean.attention_mask.bool()
    means = torch.stack([row[at].mean(0) for row, at in zip(x, inside, strict=True)])
    assert torch.allclose(read_site(tiny_model, tiny_prompts.clean, SITE, inside), means, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weight": torch.tensor(1.0)}, "'weight' has shape"),
        ({"weight": torch.zeros(0)}, "0 weights"),
        ({"weight": torch.ones(4, dtype=torch.complex64)}, "expected float numbers"),
        ({"weight": torch.full((4,), float("nan"))}, "not finite"),
        ({"weight": torch.ones(3, 4)}, "'bias' has shape"),
        ({"weight": torch.ones(3, 4), "bias": torch.ones(3)}, "3 outputs"),
        ({"bias": torch.ones(2)}, "'bias' has shape"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, changes, said):
    tensors = {"weight": torch.ones(4), "bias": torch.tensor(0.5)} | changes
    about = {"site": "resid_0", "position": "last", "classes": "a,b"}
    save_file(tensors, tmp_path / "p.safetensors", about)
    with pytest.raises(UserError) as caught:
        Probe.load(tmp_path / "p.safetensors")
    assert said in str(caught.value) and "p.safetensors" in str(caught.value)
