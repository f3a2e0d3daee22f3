"""Feature summaries against a pass over each text alone."""

import json

import pytest
import torch
from torch.nn.functional import cosine_similarity

from sae.data.batches import token_batches
from sae.errors import UserError
from sae.features import contexts as features_module
from sae.features import sketches
from sae.features.contexts import top_contexts
from sae.model.sites import Site
from tests.sae.evaluation.test_evaluate import random_sae

SENTENCES = [
    "the man sees the old dog",
    "<bos> a girl walks",
    "kings know that they were happy .",
    "this cat runs near the boy and the boy runs near the young queen who sings",
    "he sees her",
    "the man sees the old dog",
    "that dog likes this dog",
    "queens sing and kings walk , she is small",
]
ASKED = {Site("mlp", 0): [5, 0, 11], Site("resid", 1): [7], Site("attn", 1): list(range(24))}


@pytest.fixture(scope="module")
def saes(tiny_model):
    options = {Site("mlp", 0): {"architecture": "topk", "k": 6}, Site("resid", 1): {"architecture": "jumprelu"}}
    return {site: random_sae(site, tiny_model.d_model, seed=i, **options.get(site, {})) for i, site in enumerate(ASKED)}


def alone(model, sae, site, texts):
    """Per text: ids [S] and activations f [S, F], special tokens at 0."""
    for text in texts:
        tokens = model.tokenize([text])
        f = sae.encode(model.run(tokens, capture=[site]).activations[site][0])
        special = torch.tensor([int(i) in model.special_ids for i in tokens.input_ids[0]])
        yield tokens.input_ids[0], f.masked_fill(special[:, None], 0.0), int((~special).sum())


@pytest.fixture(scope="module")
def one_by_one(tiny_model, saes):
    return {site: list(alone(tiny_model, sae, site, SENTENCES)) for site, sae in saes.items()}


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_summaries_equal_a_loop_over_texts(tiny_model, saes, one_by_one, batch_size, monkeypatch):
    monkeypatch.setattr(features_module, "CHUNK_BYTES", 2000 if batch_size == 3 else 64 * 2**20)
    monkeypatch.setattr(sketches, "PENDING_PAIRS", 10)
    monkeypatch.setattr(sketches, "DENSE_PAIRS", 0 if batch_size < 8 else 2**24)
    summaries = top_contexts(tiny_model, saes, SENTENCES, ASKED, n=3, before=2, after=1, batch_size=batch_size)
    assert list(summaries) == [(site, i) for site in sorted(ASKED) for i in sorted(ASKED[site])]
    for (site, i), summary in summaries.items():
        runs = one_by_one[site]
        values = torch.cat([f[:, i] for _, f, _ in runs])
        ids = torch.cat([ids for ids, _, _ in runs])
        n_tokens = sum(n for _, _, n in runs)
        active = values[values > 0]
        assert summary.density == pytest.approx(len(active) / n_tokens)
        assert summary.max_activation == pytest.approx(float(values.max()), abs=1e-5)
        assert summary.mean_activation == pytest.approx(float(active.mean()) if len(active) else 0.0, abs=1e-5)

        shares = torch.zeros(tiny_model.vocab_size).index_add_(0, ids, values)
        shares /= ids.bincount(minlength=tiny_model.vocab_size) + 5
        assert len(summary.top_tokens) == min(10, int((shares > 0).sum()))
        by_text = {string: float(share) for string, share in zip(vocabulary(tiny_model), shares, strict=True)}
        given = [by_text[token] for token in summary.top_tokens]
        assert given == pytest.approx(sorted(shares.tolist(), reverse=True)[: len(given)], abs=1e-5)

        windows: dict[tuple[int, ...], tuple] = {}
        for row_ids, f, _ in sorted(runs, key=lambda run: -float(run[1][:, i].max())):
            peak = int(f[:, i].argmax())
            window = slice(max(peak - 2, 0), peak + 2)
            if float(f[peak, i]) > 0:
                shown = (tiny_model.token_strings(row_ids[window]), f[window, i].tolist(), min(peak, 2))
                windows.setdefault(tuple(row_ids[window].tolist()), (int(row_ids[peak]), shown))
        peaks = [peak for peak, _ in windows.values()]
        repeats = [peak in peaks[:number] for number, peak in enumerate(peaks)]
        chosen = sorted(sorted(range(len(peaks)), key=lambda number: repeats[number])[:3])
        expected = [list(windows.values())[number][1] for number in chosen]
        assert [c.tokens for c in summary.contexts] == [tokens for tokens, _, _ in expected]
        assert [c.peak for c in summary.contexts] == [peak for _, _, peak in expected]
        for found, (_, activations, _) in zip(summary.contexts, expected, strict=True):
            assert found.activations == pytest.approx(activations, abs=1e-5)
            assert max(found.activations) == found.activations[found.peak]


def vocabulary(model):
    return model.token_strings(range(model.vocab_size))


def test_logit_effect_and_neighbours_equal_a_loop(tiny_model, saes, monkeypatch):
    monkeypatch.setattr(features_module, "CHUNK_BYTES", 4 * tiny_model.vocab_size * 5)
    summaries = top_contexts(tiny_model, saes, SENTENCES, ASKED, n_tokens=4, n_neighbours=2)
    names = vocabulary(tiny_model)
    for (site, i), summary in summaries.items():
        W_dec = saes[site].W_dec
        effect = [float(row @ W_dec[i]) for row in tiny_model.hf.get_output_embeddings().weight]
        order = sorted(range(len(effect)), key=effect.__getitem__)
        assert [name for name, _ in summary.bottom_logits] == [names[v] for v in order[:4]]
        assert [name for name, _ in summary.top_logits] == [names[v] for v in order[::-1][:4]]
        assert summary.top_logits[0][1] == pytest.approx(max(effect), abs=1e-5)
        cosines = {j: float(cosine_similarity(W_dec[i], W_dec[j], dim=0)) for j in range(len(W_dec)) if j != i}
        assert [j for j, _ in summary.neighbours] == sorted(cosines, key=cosines.__getitem__)[::-1][:2]
        assert summary.neighbours[0][1] == pytest.approx(max(cosines.values()), abs=1e-5)


def test_a_window_comes_from_each_text_once_and_no_words_twice(tiny_model, saes):
    summaries = top_contexts(tiny_model, saes, SENTENCES * 3, ASKED, n=8, before=3, after=3)
    for summary in summaries.values():
        assert len({tuple(context.tokens) for context in summary.contexts}) == len(summary.contexts)
        strengths = [max(context.activations) for context in summary.contexts]
        assert strengths == sorted(strengths, reverse=True)
    for key, summary in top_contexts(tiny_model, saes, SENTENCES, ASKED, n=0).items():
        assert not summary.contexts and summary.max_activation == summaries[key].max_activation


def test_a_feature_that_never_fires(tiny_model):
    sae = random_sae("mlp_0", tiny_model.d_model)
    sae.b_enc[3] = -1e6
    summary = top_contexts(tiny_model, {Site("mlp", 0): sae}, SENTENCES, {Site("mlp", 0): [3]})[Site("mlp", 0), 3]
    assert (summary.density, summary.max_activation, summary.mean_activation) == (0.0, 0.0, 0.0)
    assert (summary.contexts, summary.top_tokens) == ([], [])
    assert len(summary.top_logits) == 10
    assert json.loads(json.dumps(summary.to_dict()))["index"] == 3


def test_special_tokens_are_shown_and_not_counted(tiny_model):
    site, sae = Site("embed"), random_sae("embed", tiny_model.d_model, architecture="identity")
    sae.b_enc.fill_(5.0)  # every feature fires everywhere
    tokens = next(token_batches(tiny_model, SENTENCES, max_tokens=None, batch_size=8, context=100))
    specials = sum(int(i) in tiny_model.special_ids for i in tokens.input_ids[tokens.attention_mask.bool()])
    assert specials > 0
    without, with_them = (
        top_contexts(tiny_model, {site: sae}, SENTENCES, {site: [0]}, special_tokens=flag, n_tokens=100)[site, 0]
        for flag in (False, True)
    )
    assert "<bos>" not in without.top_tokens
    assert "<bos>" in with_them.top_tokens
    shown = {token: value for c in without.contexts for token, value in zip(c.tokens, c.activations, strict=True)}
    assert shown["<bos>"] == 0.0


def test_unknown_features_are_refused(tiny_model, saes):
    with pytest.raises(UserError, match="'mlp_0/24': allowed are 0 to 23"):
        top_contexts(tiny_model, saes, SENTENCES, {Site("mlp", 0): [24]})
    with pytest.raises(UserError, match="unknown site 'mlp_1'"):
        top_contexts(tiny_model, saes, SENTENCES, {Site("mlp", 1): [0]})
