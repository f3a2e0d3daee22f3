"""A model elsewhere gives what the same model gives here: nnsight's simulation, and a server that has none of our code.

The stand-in for a server has a model of its own, receives the bytes that nnsight would send, restores them while the
modules of this project cannot be imported, and sends back the bytes of what was saved. The client has no weights.
"""

from __future__ import annotations

import io
import sys
from functools import partial
from typing import Any

import nnsight.ndif
import pytest
import torch
from nnsight import CONFIG, TransformersModel
from nnsight.intervention.backends.remote import RemoteError
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from nnsight.tracing.util import push

from circuits.attribution.activations import Setting, capture_activations
from circuits.attribution.node_effects import attribute
from circuits.discovery.discover import discover
from circuits.options import DiscoverOptions
from sae._run import processes
from sae.errors import UserError
from sae.model import remote
from sae.model.load import load_model
from sae.model.sites import Site
from sae.neurons import mlp_neuron_dictionaries, neuron_dictionaries
from tests.conftest import tiny_hf, word_tokenizer

OURS = ("sae", "circuits", "graphs", "tests")


@pytest.fixture(autouse=True)
def _nothing_of_ours_travels(monkeypatch):
    """nnsight would look through all that is installed for code to send along: there is none to be sent."""
    monkeypatch.setattr(nnsight.ndif, "_PULLED_ENV", True)


class StandIn(Backend):
    """A server with a model of its own."""

    def __init__(self, there: TransformersModel) -> None:
        self.there = there

    def __call__(self, tracer: Any) -> None:
        request = RequestModel.serialize(tracer, compress=True)
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in OURS}
        path, sys.path[:] = list(sys.path), [entry for entry in sys.path if "site-packages" in entry or "lib" in entry]
        try:
            restored = RequestModel.deserialize(request, self.there._remoteable_persistent_objects(), compress=True)
        finally:
            sys.modules.update(hidden)
            sys.path[:] = path
        restored.execute(restored.info.code)
        answer = io.BytesIO()
        torch.save(restored.info.frame.f_locals["answer"], answer)
        answer.seek(0)
        push(tracer.info.frame, {"answer": torch.load(answer, weights_only=False)})


@pytest.fixture
def far_model(tmp_path, monkeypatch):
    """far_model(hf) -> a model whose weights only the stand-in has."""

    def make(hf, **options):
        hf.save_pretrained(tmp_path)
        there = TransformersModel(hf, tokenizer=word_tokenizer(), task="text-generation", device="cpu")
        monkeypatch.setattr(TransformersModel, "_remote_backend", lambda *_: StandIn(there))
        here = partial(TransformersModel, str(tmp_path), task="text-generation")
        monkeypatch.setattr(remote, "server_handles", lambda name, tokenizer: here(tokenizer=tokenizer))
        return load_model("owner/name", remote="https://server", tokenizer=word_tokenizer(), **options)

    return make


@pytest.mark.slow
def test_a_server_gives_what_the_model_gives(far_model, make_tiny_model, tiny_prompts):
    near = make_tiny_model("gemma2")
    far = far_model(near.hf)
    assert all(weight.device.type == "meta" for weight in far.architecture.parameters())
    assert far.fingerprints == near.fingerprints
    assert far.widths == near.widths and far.parallel_blocks == near.parallel_blocks and far.dtype == near.dtype
    tokens = tiny_prompts[:2].clean
    runs = [one.run(tokens, capture=one.sites, grad=True, last_only=True) for one in (far, near)]
    n = far.server.n_requests
    gradients = [run.gradients(run.logits.square().sum(), near.sites) for run in runs]
    assert far.server.n_requests == n + 1  # all sites in one
    torch.testing.assert_close(*(run.logits.detach() for run in runs))
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y)
    site = near.sites[-2]
    cached = {place: x.detach() for place, x in runs[0].activations.items()}
    leaves = [(cached[site] / 2).requires_grad_() for _ in runs]
    for one, leaf in zip((far, near), leaves, strict=True):
        logits = one.run(tokens, skip=one.resume_from(site, cached) | {site: leaf}, grad=True).logits
        logits.square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    half = {place: lambda x: x / 2 for place in near.sites[1:4]}
    edited = [one.run(tokens, edits=half, capture=near.sites) for one in (far, near)]
    torch.testing.assert_close(edited[0].logits, edited[1].logits)
    for x, y in zip(edited[0].activations.values(), edited[1].activations.values(), strict=True):
        torch.testing.assert_close(x, y)
    for refused in (lambda: far.hf, lambda: far.generate(tokens, max_new_tokens=1), lambda: far.reads):
        with pytest.raises(UserError, match="leave --remote out"):
            refused()


@pytest.mark.slow
def test_circuits_of_a_server(far_model, make_tiny_model, tiny_prompts):
    near, prompts = make_tiny_model("gpt_neox"), tiny_prompts[:2]
    far = far_model(near.hf, check=False)
    saes = neuron_dictionaries(near)
    options = DiscoverOptions(method="ig", steps=1, edge_nodes=4, sites="embed,resid_1")
    ours, theirs = (discover(one, saes, prompts, options, progress=False) for one in (near, far))
    for site, nodes in ours.nodes.items():
        torch.testing.assert_close(theirs.nodes[site].effect, nodes.effect)
    assert ours.edges.keys() == theirs.edges.keys()
    for pair, weights in ours.edges.items():
        torch.testing.assert_close(theirs.edges[pair], weights)
    dropped = [attribute_on(one, saes, prompts, "graddrop") for one in (near, far)]
    for site, effects in dropped[0].items():
        torch.testing.assert_close(dropped[1][site].value, effects.value)
    with pytest.raises(UserError, match="leave --remote out"):
        attribute_on(far, saes, prompts, "relp")
    with pytest.raises(UserError, match="leave --remote out"):
        mlp_neuron_dictionaries(far)


def attribute_on(model, saes, prompts, method):
    setting = Setting.of(model, saes, sites=[Site("resid", 1)])
    return attribute(capture_activations(setting, prompts), method=method, steps=2).effects


def test_the_simulation_and_wrong_input(monkeypatch, tmp_path):
    hf = tiny_hf("gpt2")
    model = load_model(hf, tokenizer=word_tokenizer(), remote="local", check=False)
    tokens = model.probe_tokens()
    assert model.run(tokens).logits.equal(load_model(hf, tokenizer=word_tokenizer()).run(tokens).logits)
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    for name, words in (("ndif", "NDIF_API_KEY"), ("ndiff", "allowed are ndif, local")):
        with pytest.raises(UserError, match=words):
            load_model("owner/name", remote=name)
    with pytest.raises(UserError, match="give one of them"):
        load_model(tmp_path, remote="local", device_map="auto")
    with pytest.raises(UserError, match="cannot run elsewhere"):
        load_model(tmp_path, remote="https://server")

    def fail(*_: Any) -> Any:
        raise RemoteError("Failed to send request: the key is not known")

    monkeypatch.setattr(TransformersModel, "_remote_backend", lambda *_: fail)
    with pytest.raises(UserError, match="the key is not known"):
        model.run(tokens)
    monkeypatch.setattr(processes, "_current", processes.Processes(0, 2))
    with pytest.raises(UserError, match="one process"):
        load_model(tmp_path, remote="local")
