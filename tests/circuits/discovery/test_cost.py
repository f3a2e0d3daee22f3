"""The estimate before a discovery: passes and memory as they then are, advice where memory does not suffice."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from circuits._tensors import flatten
from circuits.attribution import attribute, capture_activations
from circuits.attribution.attribution_patching import attribution_patching
from circuits.attribution.edges import cut_forward
from circuits.comparison.peak_memory import peak_memory
from circuits.discovery import batching
from circuits.discovery.batching import backward_bytes, state_bytes
from circuits.discovery.cost import count_passes, cut_share, estimate_discovery, memory_parts, resumed_share
from circuits.discovery.discover import discover
from circuits.discovery.options import DiscoverOptions
from circuits.metrics.metrics import logit_difference
from sae.model.lrp import check_conserved
from sae.model.sites import Site, select_sites
from tests.circuits.discovery.test_resume import streamed

MODULES = {"gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"), "gemma2": ("self_attn.o_proj", "mlp.down_proj")}


class Counted:
    """Rows that go through the sublayers of a model, with and without a graph."""

    def __init__(self, model, architecture: str) -> None:
        self.rows: Counter[bool] = Counter()
        self.n_layers = model.n_layers
        last = MODULES[architecture]
        modules = [module for name, module in model.hf.named_modules() if name.endswith(last)]
        assert len(modules) == 2 * model.n_layers
        self.handles = [module.register_forward_hook(self._count) for module in modules]

    def _count(self, module, inputs, output) -> None:
        self.rows[torch.is_grad_enabled()] += len(output)

    def passes(self, n_prompts: int) -> tuple[float, float]:
        """(forward alone, with a graph), per prompt and in units of the whole model."""
        for handle in self.handles:
            handle.remove()
        whole = 2 * self.n_layers * n_prompts
        return self.rows[False] / whole, self.rows[True] / whole


METHODS, CHOSEN = (
    ("ig", "attrib", "relp", "ig-inputs", "graddrop", "random"),
    ("resid", "mlp", "attn_1,mlp_1,resid_0,resid_2"),
)
PASSES = [("gpt_neox", method, chosen) for method in METHODS for chosen in ("all", *CHOSEN)]
PASSES += [("gemma2", method, "all") for method in METHODS] + [("gemma2", "ig", chosen) for chosen in CHOSEN]


@pytest.mark.parametrize(("architecture", "method", "chosen"), PASSES)
def test_passes_of_the_node_methods(make_tiny_model, make_saes, tiny_prompts, method, chosen, architecture):
    """Counted inside the model's attention and MLP modules, of parallel and of sequential blocks."""
    model = make_tiny_model(architecture, layers=3)
    sites = select_sites(chosen, list(model.sites))
    states_of = {"sites": sites, "gradient": method not in ("ig", "ig-inputs", "relp")}
    saes = make_saes(model)
    options = DiscoverOptions(method=method, steps=3, edge_nodes=0)
    prompts = tiny_prompts[:4]
    if method == "ig-inputs" and Site("embed") not in sites:
        sites = [Site("embed"), *sites]
        states_of["sites"] = sites
    if method == "relp":
        check_conserved(model)  # once for each model
    counted = Counted(model, architecture)
    states = capture_activations(model, saes, prompts, logit_difference, **states_of)
    attribute(model, saes, states, logit_difference, sites=sites, method=method, steps=3)
    forward, backward = counted.passes(len(prompts))
    expected = count_passes(model, sites, options)
    if method == "graddrop":  # a backward pass a layer from one forward pass
        assert (forward, backward) == (pytest.approx(expected.forward), 2)
    else:
        assert (forward, backward) == (pytest.approx(expected.forward), pytest.approx(expected.backward))


def test_segments_of_the_cut_graph(make_tiny_model, tiny_prompts):
    """Sublayers in the graph between a site and the cuts before it, found by walking the graph of the cut run."""
    model = make_tiny_model("gemma2", layers=3)
    for chosen in ("all", "resid", "mlp", "resid_0,attn_2,resid_2"):
        sites = select_sites(chosen, list(model.sites))
        states = capture_activations(model, {}, tiny_prompts[:2], logit_difference, sites=sites)
        graph = cut_forward(model, states, logit_difference, sites=sites)
        for site in sites[1:]:
            seen, stack, products = set(), [graph.outputs[site].grad_fn], 0
            while stack:
                node = stack.pop()
                if node is None or node in seen:
                    continue
                seen.add(node)
                products += "TanhBackward" in node.name() or "GeluBackward" in node.name()
                stack += [parent for parent, _ in node.next_functions]
            assert products / (2 * model.n_layers) == pytest.approx(cut_share(model, sites, site)), (chosen, site)


def test_resuming_at_the_ends(tiny_model):
    sites = list(tiny_model.sites)
    assert resumed_share(tiny_model, sites, Site("embed")) == 1
    assert resumed_share(tiny_model, sites, sites[-1]) == 0


@pytest.mark.parametrize("architecture", ["gpt_neox", "gemma2"])
def test_memory_of_the_parts(make_tiny_model, make_saes, tiny_prompts, architecture):
    """What a backward pass keeps, activations, gradients and effects against what is allocated."""
    model = make_tiny_model(architecture, layers=4, width=128)
    saes = make_saes(model, n_features=256)
    sites, n, length = list(model.sites), len(tiny_prompts), tiny_prompts.clean.n_positions
    states = capture_activations(model, saes, tiny_prompts, logit_difference, sites=sites)
    held = sum(x.numel() * x.element_size() for x in states.clean.values())
    assert held == n * state_bytes(model, sites, length)

    peak = peak_memory(lambda: attribution_patching(model, states, logit_difference, sites=sites), model.device)
    assert 0.5 < n * backward_bytes(model, length) / peak < 2

    options = DiscoverOptions(method="attrib", edge_nodes=40)
    circuit = discover(model, saes, tiny_prompts, options, progress=False)
    entries = sum(len(effects.value) for effects in circuit.effects.values()) / n / len(sites)
    parts = memory_parts(model, saes, sites, options, n_positions=length, n_prompts=n, batch=n, entries=entries)
    stored = {name: x for name, x in flatten(circuit).items() if name.startswith("effects")}
    n_bytes = sum(4 * x.numel() for name, x in stored.items() if "n_features" not in name)
    assert parts["effects"] == pytest.approx(n_bytes)
    assert parts["model"] == sum(x.numel() * x.element_size() for x in model.hf.parameters())
    weights = sum(x.numel() * x.element_size() for sae in saes.values() for x in sae.buffers())
    assert weights <= parts["autoencoders"] < 1.1 * weights
    assert parts["gradients for edges"] == held


def test_estimate_of_streamed_autoencoders(tiny_model, tiny_saes, tiny_prompts):
    saes = streamed(tiny_saes)
    options = DiscoverOptions(method="attrib", edge_nodes=40)
    estimate = estimate_discovery(tiny_model, saes, tiny_prompts, options)
    assert estimate.memory["autoencoders"] == saes.budget
    before = saes.n_reads
    discover(tiny_model, saes, tiny_prompts, options, progress=False)
    assert saes.n_reads - before <= estimate.reads <= 2 * len(saes)


def test_text_and_advice(tiny_model, tiny_saes, tiny_prompts, monkeypatch):
    options = DiscoverOptions(method="attrib", edge_nodes=40)
    estimate = estimate_discovery(tiny_model, tiny_saes, tiny_prompts, options)
    assert not estimate.advice and "estimated memory" in estimate.text() and "estimated time" in estimate.text()
    assert estimate.to_dict()["peak_bytes"] == estimate.peak == sum(estimate.memory.values())
    kept = {"gradients for edges", "kept for edges"}
    in_memory = estimate_discovery(tiny_model, tiny_saes, tiny_prompts, options, files=False)
    moved = {name for name, n in in_memory.memory.items() if n != estimate.memory[name]}
    assert moved == kept and in_memory.on_disk == 0 < estimate.on_disk
    monkeypatch.setattr("circuits.discovery.cost.free_memory", lambda device: 2**20)
    short = estimate_discovery(tiny_model, tiny_saes, tiny_prompts, replace(options, memory=1.0))
    assert "--memory below 1" in short.text()


def test_logits_of_a_large_vocabulary_count(tiny_model, monkeypatch):
    """Fewer prompts run at once where logits take most of what a pass keeps."""
    few = batching.backward_bytes(tiny_model, 7)
    monkeypatch.setattr(tiny_model, "vocab_size", 256_000)
    many = batching.backward_bytes(tiny_model, 7)
    assert many - few == pytest.approx(batching.LOGIT_COPIES * 4 * 256_000, rel=0.01)
    assert batching.max_rows(tiny_model, 7, memory=0.1) == int(0.1 * 2**30 / many) < 30
