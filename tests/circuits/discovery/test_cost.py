"""The estimate before a discovery: memory as it then is, advice where memory does not suffice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from circuits._tensors import flatten
from circuits.attribution.activations import Setting, capture_activations
from circuits.attribution.attribution_patching import attribution_patching
from circuits.discovery import batching
from circuits.discovery.batching import backward_bytes, state_bytes
from circuits.discovery.cost import estimate_discovery
from circuits.discovery.discover import discover
from circuits.metrics.metrics import logit_difference
from circuits.options import DiscoverOptions
from sae._peak_memory import peak_memory
from sae.errors import UserError
from tests.circuits.discovery.test_resume import at_three_sites, streamed


@pytest.mark.parametrize("architecture", ["gpt_neox", "gemma2"])
def test_memory_of_a_backward_pass(make_tiny_model, make_saes, tiny_prompts, architecture):
    """What a backward pass keeps and activations, by which prompts are batched, against what is allocated."""
    model = make_tiny_model(architecture, layers=4, width=128)
    sites, n, length = list(model.sites), len(tiny_prompts), tiny_prompts.clean.n_positions
    states = capture_activations(Setting(model, make_saes(model), logit_difference), tiny_prompts, sites=sites)
    held = sum(x.numel() * x.element_size() for x in states.clean.values())
    assert held == n * state_bytes(model, sites, length)
    peak = peak_memory(lambda: attribution_patching(states, sites=sites), model.device)
    assert 0.5 < n * backward_bytes(model, length) / peak < 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ig", "attrib"])
def test_memory_as_it_then_is(make_tiny_model, make_saes, tiny_prompts, method, tmp_path, monkeypatch):
    """The peak within a fifth, and files on disk, of a discovery in several batches."""
    model = make_tiny_model("gpt_neox", width=64)
    saes = make_saes(model, n_features=256)
    monkeypatch.setattr(batching, "MOST_ROWS", 4)
    options = DiscoverOptions(method=method, steps=2, edge_nodes=40)
    estimate = estimate_discovery(model, saes, tiny_prompts, options, files=False)
    circuits = []
    peak = peak_memory(
        lambda: circuits.append(discover(model, saes, tiny_prompts, options, progress=False)), model.device
    )
    weights = sum(x.numel() * x.element_size() for sae in saes.values() for x in sae.buffers())
    parameters = sum(x.numel() * x.element_size() for x in model.hf.parameters())
    assert estimate.memory["model"] == parameters
    assert weights <= estimate.memory["autoencoders"] < 1.1 * weights
    assert 1 / 1.2 < estimate.peak / (peak + weights + parameters) < 1.2
    effects = sum(x.numel() * x.element_size() for n, x in flatten(circuits[0]).items() if n.startswith("effects"))
    assert estimate.memory["effects"] == pytest.approx(2 * effects, rel=0.1)
    if method == "attrib":
        on_disk = estimate_discovery(model, saes, tiny_prompts, options).on_disk
        discover(model, saes, tiny_prompts, options, progress=False, partial=tmp_path / "p")
        written = sum(path.stat().st_size for path in (tmp_path / "p").glob("nodes-*"))
        assert written == pytest.approx(on_disk, rel=0.5)  # names and headers outweigh tensors as small as these


def test_estimates_count_sparse_tensors_and_take_prompts_that_do_not_differ(tiny_model, tiny_saes, tiny_prompts):
    lengths = tiny_prompts.clean.lengths
    long = tiny_prompts[(lengths == lengths.max()).nonzero().flatten()]
    same = replace(long, patch=long.clean)
    for prompts in (long, same):
        options = DiscoverOptions(method="attrib", aggregation="position", edge_nodes=10, sites="resid")
        assert estimate_discovery(tiny_model, tiny_saes, prompts, options).memory["one batch"] >= 0
    with pytest.raises(UserError, match="no node has an effect"):
        discover(tiny_model, tiny_saes, same, options, progress=False)


def test_estimate_of_streamed_autoencoders(tiny_model, tiny_saes, tiny_prompts):
    saes = streamed(at_three_sites(tiny_saes))
    options = DiscoverOptions(method="attrib", edge_nodes=40)
    estimate = estimate_discovery(tiny_model, saes, tiny_prompts, options)
    assert estimate.memory["autoencoders"] == saes.budget
    before = saes.n_reads
    discover(tiny_model, saes, tiny_prompts, options, progress=False)
    assert 0 < saes.n_reads - before <= estimate.reads <= 2 * len(saes)


@pytest.mark.slow
def test_text_and_advice(tiny_model, tiny_saes, tiny_prompts, monkeypatch):
    options = DiscoverOptions(method="attrib", edge_nodes=40, sites="resid")
    estimate = estimate_discovery(tiny_model, tiny_saes, tiny_prompts, options)
    assert not estimate.advice and "estimated memory" in estimate.text() and "estimated time" in estimate.text()
    assert estimate.to_dict()["peak_bytes"] == estimate.peak == sum(estimate.memory.values())
    kept = {"gradients for edges", "kept for edges"}
    in_memory = estimate_discovery(tiny_model, tiny_saes, tiny_prompts, options, files=False)
    moved = {name for name, n in in_memory.memory.items() if n != estimate.memory[name]}
    assert moved == kept | {"effects"} and in_memory.on_disk == 0 < estimate.on_disk
    monkeypatch.setattr("circuits.discovery.cost.free_memory", lambda device: 2**18)
    short = estimate_discovery(tiny_model, tiny_saes, tiny_prompts, replace(options, memory=1.0))
    assert "--memory below 1" in short.text()


def test_logits_of_a_large_vocabulary_count(tiny_model, monkeypatch):
    """Fewer prompts run at once where logits take most of what a pass keeps."""
    few = batching.backward_bytes(tiny_model, 7)
    monkeypatch.setattr(tiny_model, "vocab_size", 256_000)
    many = batching.backward_bytes(tiny_model, 7)
    assert many - few == pytest.approx(batching.LOGIT_COPIES * 4 * 256_000, rel=0.01)
    assert batching.max_rows(tiny_model, 7, memory=0.1) == int(0.1 * 2**30 / many) < 30
