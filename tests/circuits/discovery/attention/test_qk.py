"""QK attributions against queries and keys written out by hand, and against the weights the model itself reports."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytest import approx

from circuits.discovery.attention import qk
from circuits.discovery.attention.explain import _busiest
from circuits.discovery.attention.plots import Side, plot_pairs
from circuits.discovery.attention.qk import heads_looking, qk_attribution
from circuits.discovery.attention.results import EdgeLoading, HeadLoadings
from circuits.discovery.attention.stored import with_attention
from graphs.feature_graph import FeatureGraph, feature_node
from sae.errors import UserError
from sae.model.load import load_model
from tests.circuits.conftest import MIXED, with_spans
from tests.conftest import word_tokenizer
from tests.tiny_models import tiny_model as tiny_random_model

LAYER, HEAD, D_HEAD, QUERY, KEY, THAN = 1, 2, 8, 4, 1, 3
FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen3", "gemma2", "gemma3_text")


def own_scores(model, tokens):
    """[S, S] logarithms of the model's own attention weights, which differ from scores by a number for each query."""
    hf = model.hf
    before = hf.config._attn_implementation
    hf.set_attn_implementation("eager")
    weights = hf(**vars_of(tokens), output_attentions=True).attentions[LAYER][0, HEAD]
    hf.set_attn_implementation(before)
    return weights.log()


def vars_of(tokens):
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}


class ByHand:
    """Queries and keys of one head as linear maps, with norms frozen at the token's own activation."""

    def __init__(self, hf, name: str) -> None:
        self.name, self.config = name, hf.config
        if name == "gpt2":
            block = hf.transformer.h[LAYER]
            weight, self.norm = block.attn.c_attn.weight.T, block.ln_1  # [3 H d_h, d]
            self.W = {"q": weight[:32][self.rows(HEAD)], "k": weight[32:64][self.rows(HEAD)]}
        elif name == "gpt_neox":
            block = hf.gpt_neox.layers[LAYER]
            weight, self.norm = (
                block.attention.query_key_value.weight.unflatten(0, (4, 3, D_HEAD)),
                block.input_layernorm,
            )
            self.W = {"q": weight[HEAD, 0], "k": weight[HEAD, 1]}
        else:
            block = hf.model.layers[LAYER]
            attention, self.norm = block.self_attn, block.input_layernorm
            self.W = {
                "q": attention.q_proj.weight[self.rows(HEAD)],
                "k": attention.k_proj.weight[self.rows(HEAD // 2)],
            }  # two heads share a key
            self.norms = {side: getattr(attention, f"{side}_norm", None) for side in "qk"}

    @staticmethod
    def rows(head: int) -> slice:
        return slice(head * D_HEAD, (head + 1) * D_HEAD)

    def gain(self, norm):
        return 1 + norm.weight if self.name.startswith("gemma") else norm.weight

    def __call__(self, side: str, u, x, position: int):
        """The part [n, d_h] that rows u [n, d] have in a query or key at x [d]."""
        centred = self.name in ("gpt2", "gpt_neox")

        def normed(v):
            scale = x.var(unbiased=False) if centred else x.square().mean()
            v = v - v.mean(-1, keepdim=True) if centred else v
            return v * torch.rsqrt(scale + 1e-5 * centred + 1e-6 * (not centred)) * self.gain(self.norm)

        out = normed(u) @ self.W[side].T
        if not centred and (norm := self.norms[side]) is not None:
            total = normed(x) @ self.W[side].T
            out = out * torch.rsqrt(total.square().mean() + 1e-6) * self.gain(norm)
        if self.name == "gpt2":
            return out
        parameters = self.config.rope_parameters
        if self.name == "gemma3_text":
            parameters = parameters[self.config.layer_types[LAYER]]
        n = int(D_HEAD * parameters.get("partial_rotary_factor", 1.0))
        angle = position / parameters["rope_theta"] ** (torch.arange(0, n, 2) / n)
        first, second, rest = out[:, : n // 2], out[:, n // 2 : n], out[:, n:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_pairs_are_those_by_hand_and_add_up_to_the_score(make_tiny_model, make_saes, tiny_prompts, name):
    model = make_tiny_model(name)
    saes = make_saes(model, architecture="relu")
    prompts = tiny_prompts[[1]]  # one prompt of seven tokens
    circuit = SimpleNamespace(model=model, saes=saes, prompts=prompts)
    options = {"layer": LAYER, "head": HEAD, "query": str(QUERY), "key": str(KEY), "progress": False}
    result = qk_attribution(circuit, **options)
    sae = saes[qk.read_site(model, LAYER)]
    x = model.run(prompts.clean, capture=[qk.read_site(model, LAYER)]).activations[qk.read_site(model, LAYER)][0]
    f = sae.encode(x)
    by_hand = ByHand(model.hf, name)
    queries, keys = (
        dict(zip(active.tolist(), by_hand(side, f[at, active, None] * sae.W_dec[active], x[at], at), strict=True))
        for side, at in (("q", QUERY), ("k", KEY))
        for active in [f[at].nonzero()[:, 0]]
    )
    scale = D_HEAD**-0.5
    expected = {
        (f"resid_0/{i}", f"resid_0/{j}"): float(scale * q @ k) for i, q in queries.items() for j, k in keys.items()
    }
    pairs = {(pair.query, pair.key): pair.contribution for pair in result.pairs}
    assert len(expected) > 50 and {*expected} <= {*pairs}
    assert max(abs(pairs[pair] - value) for pair, value in expected.items()) < 1e-5
    assert {name for pair in pairs for name in pair} - {name for pair in expected for name in pair} == {
        "resid_0/error", "resid_0/bias",
    }  # fmt: skip
    assert sum(pairs.values()) == approx(result.score, abs=1e-4)
    assert sum(term.contribution for term in result.keys) == approx(result.score, abs=1e-4)
    other = qk_attribution(circuit, **options, than=str(THAN))
    own = own_scores(model, prompts.clean)[QUERY]
    if result.softcap is None:
        assert other.score == approx(float(own[KEY] - own[THAN]), abs=1e-4)
    else:  # what the softmax takes is capped; what is explained is not
        capped = [
            result.softcap * torch.tensor(s / result.softcap).tanh() for s in (result.score, result.score - other.score)
        ]
        assert float(capped[0] - capped[1]) == approx(float(own[KEY] - own[THAN]), abs=1e-4)
    assert other.than_weight == approx(float(own[THAN].exp()), abs=1e-5)
    assert sum(pair.contribution for pair in other.pairs) == approx(other.score, abs=1e-4)


def test_means_over_prompts_whose_tokens_are_spans_words_or_indices(tiny_model, tiny_saes, tiny_prompts):
    prompts = with_spans(tiny_prompts, MIXED)
    circuit = SimpleNamespace(model=tiny_model, saes=tiny_saes, prompts=prompts)
    options = {"layer": 1, "head": 0, "progress": False}
    result = qk_attribution(circuit, query="end", key="b", **options)
    alone = [
        qk_attribution(circuit, prompts[[row]], query="-1", key=key, **options) for row, key in enumerate("12" * 4)
    ]
    assert result.score == approx(sum(one.score for one in alone) / 8, abs=1e-5)
    pair = result.pairs[0]
    values = [p.contribution for one in alone for p in one.pairs if (p.query, p.key) == (pair.query, pair.key)]
    assert pair.contribution == approx(sum(values) / 8, abs=1e-5)
    assert pair.share == len(values) / 8
    assert "attn_1 head 0 from end to b: score" in result.text() and len(result.to_dict()["pairs"]) == 50
    assert result.to_dict()["rest"] + sum(p["contribution"] for p in result.to_dict()["pairs"]) == approx(
        result.score, abs=1e-5
    )
    looking = {(row.layer, row.head): row for row in heads_looking(circuit, query="end", key="b")}
    assert len(looking) == 8
    assert looking[1, 0].weight == approx(result.weight, abs=1e-5)
    word = tiny_model.token_strings(prompts[[1]].clean.input_ids[0])[2]
    by_word = qk_attribution(circuit, prompts[[1]], query="last", key=word, **options)
    assert by_word.score == approx(alone[1].score, abs=1e-6)


def test_what_cannot_be_split_is_told_in_a_sentence(tiny_model, tiny_saes, make_saes, tiny_prompts, monkeypatch):
    circuit = SimpleNamespace(model=tiny_model, saes=tiny_saes, prompts=tiny_prompts)

    def told(circuit=circuit, **options) -> str:
        with pytest.raises(UserError) as error:
            qk_attribution(
                circuit, **{"layer": 1, "head": 0, "query": "last", "key": "0", "progress": False, **options}
            )
        return str(error.value)

    assert "layers with attention are 0, 1" in told(layer=2)
    assert "attn_1 has heads 0 to 3" in told(head=4)
    assert "unknown token 'verb'" in told(key="verb")
    assert "attention looks back alone" in told(query="1", key="3")
    mlps = tiny_saes.subset([site for site in tiny_saes if site.kind == "mlp"])
    assert "reads resid_0, where this circuit has no autoencoder" in told(
        SimpleNamespace(**vars(circuit) | {"saes": mlps})
    )
    edges = [EdgeLoading(f"resid_{n - 1}/1@a", f"attn_{n}/2@b", f"attn_{n}", 1.0, [float(n), 0.5], 0.0) for n in (1, 2)]
    assert _busiest(HeadLoadings(edges, 1), 3, {1}) == [(1, 0, "b", "a"), (1, 1, "b", "a")]  # layer 2 cannot be split
    bloom = load_model(tiny_random_model("bloom"), check=False)
    assert "its attention does not call" in told(
        SimpleNamespace(model=bloom, saes=make_saes(bloom), prompts=tiny_prompts[[0]])
    )
    monkeypatch.setattr(qk, "frozen_norms", lambda hf: nullcontext())
    assert "not affine in the residual stream" in told()


def test_norms_of_queries_and_keys_without_a_gain_keep_their_scale(make_saes, tiny_prompts):
    """Llama 4 norms them after their rotation, in a class of its own."""
    model = load_model(tiny_random_model("llama4_text"), tokenizer=word_tokenizer(), device="cpu", check=False)
    circuit = SimpleNamespace(model=model, saes=make_saes(model), prompts=tiny_prompts[[1]])
    result = qk_attribution(circuit, layer=0, head=HEAD, query=str(QUERY), key=str(KEY), progress=False)
    assert sum(pair.contribution for pair in result.pairs) == approx(result.score, rel=1e-4) and result.score != 0


def test_pairs_are_drawn(tmp_path):
    rows, columns = Side("at the end", [["a/1", " cat"], ["others"]]), Side("at the b", [["a/2", " $x_"], ["a/bias"]])
    drawn = plot_pairs(
        tmp_path / "pairs.svg", np.array([[2.0, -1.0], [0.1, 0.0]]), title="t", rows=rows, columns=columns
    )
    assert drawn.read_text().count('<g id="text_') >= 4 + 4 + 3


def test_pages_tell_each_feature_what_it_pairs_with(tmp_path):
    """Words stand for partners that are not in the graph; pairs that add little beside the largest are left out."""
    pairs = [("a/1", "a/2", 2.0), ("a/1", "a/bias", -1.0), ("a/3", "a/2", 0.1)]
    score = {
        "layer": 1, "head": 0, "site": "a", "query": "end", "key": "b", "than": None, "title": "t", "n_prompts": 1,
        "score": 1.1, "weight": 0.5, "than_weight": None, "n_pairs": 3,
        "pairs": [dict(zip(("query", "key", "contribution"), pair, strict=True)) for pair in pairs],
        "queries": [{"node": "a/1", "contribution": 1.0, "words": [" cat"]}], "keys": [],
        "matrix": {"queries": [], "keys": [], "values": []},
    }  # fmt: skip
    (tmp_path / "attention.json").write_text(json.dumps({"loadings": None, "scores": [score]}))
    graph = FeatureGraph(["a"])
    graph.add_node(feature_node("a", 2, effect=1.0))
    (node,) = with_attention(graph, tmp_path).nodes()
    assert node.attributes["attention"] == {"attn_1 head 0 looks here (b) from end": [("a/1 cat", 2.0)]}
