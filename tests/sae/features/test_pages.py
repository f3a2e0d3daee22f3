"""Feature pages against a pass over each text alone, and against a plain edited forward pass."""

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from sae.errors import UserError
from sae.features import pages as pages_module
from sae.features import sketches, tally
from sae.features.options import FeaturePageOptions
from sae.features.pages import feature_pages, feature_pages_by_site
from sae.features.sketches import ActivationHistogram, IntervalSamples
from sae.model.sites import Site
from tests.sae.evaluation.test_evaluate import random_sae
from tests.sae.features.test_contexts import SENTENCES

WORDS = "the man sees old dog girl walks kings know that they were happy this cat runs near boy queen"
TEXTS = [*SENTENCES, *(" ".join(WORDS.split()[(7 * i + j * j) % 19] for j in range(4 + i % 9)) for i in range(22))]
ASKED = {Site("embed"): [3], Site("mlp", 0): [0, 5, 11], Site("resid", 1): [2, 7]}
OPTIONS = FeaturePageOptions(contexts=3, samples=2, intervals=3, before=2, after=1, listed=4, correlation_tokens=10**6)
KINDS = {Site("mlp", 0): {"architecture": "topk", "k": 6}, Site("resid", 1): {"architecture": "jumprelu"}}


@pytest.fixture(scope="module")
def saes(tiny_model):
    sites = [Site("embed"), Site("attn", 0), Site("mlp", 0), Site("resid", 0), Site("attn", 1), Site("resid", 1)]
    made = {site: random_sae(site, tiny_model.d_model, seed=i, **KINDS.get(site, {})) for i, site in enumerate(sites)}
    made[Site("mlp", 0)].b_enc[11] = -1e6  # it never fires
    return made


@pytest.fixture(scope="module")
def runs(tiny_model, saes):
    """Per text: ids [S], x and f by site ([S, d] and [S, F], special tokens at 0), which tokens count, logits."""
    found = []
    for text in TEXTS:
        tokens = tiny_model.tokenize([text])
        run = tiny_model.run(tokens, capture=saes)
        ids = tokens.input_ids[0]
        counts = torch.tensor([int(i) not in tiny_model.special_ids for i in ids])
        f = {site: sae.encode(run.activations[site][0]) * counts[:, None] for site, sae in saes.items()}
        found.append((ids, {site: x[0] for site, x in run.activations.items()}, f, counts, run.logits[0]))
    return found


@pytest.fixture(scope="module")
def pages(tiny_model, saes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages_module, "BATCH_TEXTS", 4)
        patch.setattr(tally, "PASS_TOKENS", 30)
        patch.setattr(tally, "FORGET_EVERY", 2)
        return feature_pages(tiny_model, saes, TEXTS, ASKED, OPTIONS)


def values_of(runs, name):
    """All activations of a feature at tokens that count, in the order of the text."""
    site, index = name.split("/")
    return torch.cat([f[Site.parse(site)][counts, int(index)] for _, _, f, counts, _ in runs])


@pytest.mark.slow
def test_counts_histogram_and_quantiles(runs, pages):
    assert list(pages) == [f"{site}/{i}" for site in sorted(ASKED) for i in ASKED[site]]
    for name, page in pages.items():
        values = values_of(runs, name)
        active = values[values > 0].double()
        assert page.n_tokens == len(values)
        assert page.density == pytest.approx(len(active) / len(values))
        assert page.max_activation == pytest.approx(float(values.max()), rel=1e-4)
        if not len(active):
            assert (page.histogram, page.quantiles, page.samples) == ({"edges": [], "counts": []}, [], [])
            continue
        edges = page.histogram["edges"]
        width = edges[1] - edges[0]
        assert edges[0] == 0 and edges[-2] <= page.max_activation <= edges[-1] and len(edges) <= 41
        exact = np.histogram(active.numpy(), np.arange(len(edges)) * width)[0]
        assert np.abs(np.cumsum(exact) - np.cumsum(page.histogram["counts"])).max() <= 1  # a value beside an edge
        assert sum(page.histogram["counts"]) == len(active)
        for share, value in page.quantiles:
            below = int((active < value - width).sum()), int((active <= value + width).sum())
            assert below[0] <= share * len(active) <= below[1]


@pytest.mark.slow
def test_contexts_are_the_strongest_of_each_token_and_read_differently(tiny_model, runs, pages):
    for page in pages.values():
        site, index = Site.parse(page.site), page.index
        by_token = defaultdict(list)
        for number, (ids, _, f, _, _) in enumerate(runs):
            peak = int(f[site][:, index].argmax())
            if float(f[site][peak, index]) > 0:
                by_token[int(ids[peak])].append((-float(f[site][peak, index]), number, peak))
        order = sorted((rank, *entry) for rows in by_token.values() for rank, entry in enumerate(sorted(rows)))
        windows = {}
        for _, strength, number, peak in order:
            window = slice(max(peak - 2, 0), peak + 2)
            windows.setdefault(tuple(runs[number][0][window].tolist()), (strength, min(peak, 2)))
        of_window = {
            tuple(tiny_model.token_strings(ids)): (-strength, peak) for ids, (strength, peak) in windows.items()
        }
        expected = [strength for strength, _ in list(of_window.values())[:3]]
        assert [c.activations[c.peak] for c in page.contexts] == pytest.approx(expected, rel=1e-3)
        assert len({tuple(c.tokens) for c in page.contexts}) == len(page.contexts)
        for context in page.contexts:  # which of those that begin alike is taken is a matter of rounding
            strength, peak = of_window[tuple(context.tokens)]
            assert context.peak == peak and context.activations[peak] == pytest.approx(strength, rel=1e-3)


def test_samples_lie_in_their_interval(runs, pages):
    for name, page in pages.items():
        values = values_of(runs, name)
        assert sum(sample.share for sample in page.samples) == pytest.approx(page.density)
        for sample in page.samples:
            inside = int(((values > 0) & (values >= sample.low) & (values <= sample.high)).sum())
            assert len(sample.contexts) == min(2, round(sample.share * len(values)))
            assert abs(inside - sample.share * len(values)) <= 1
            for context in sample.contexts:
                assert sample.low * 0.999 <= context.activations[context.peak] <= sample.high * 1.001
        assert len(page.random) == 2


def test_change_is_that_of_a_plain_edited_forward_pass(tiny_model, saes, runs, pages):
    texts = [ids.tolist() for ids, *_ in runs]
    for page in pages.values():
        site, direction = Site.parse(page.site), saes[Site.parse(page.site)].W_dec[page.index]
        shown = [*page.contexts, *page.random, *(c for sample in page.samples for c in sample.contexts)]
        for context in shown[:: 1 + len(shown) // 6]:
            number, start = find(tiny_model, texts, context)
            ids, _, f, _, logits = runs[number]
            edited = tiny_model.run(
                tiny_model.tokenize([TEXTS[number]]),
                edits={site: lambda x, f=f, site=site, i=page.index, w=direction: x - f[site][:, i, None] * w},
            ).logits[0]
            change = (edited.log_softmax(-1) - logits.log_softmax(-1))[:-1].gather(1, ids[1:, None])[:, 0]
            expected = [None, *change.tolist()][start : start + len(context.tokens)]
            assert [c is None for c in context.change] == [c is None for c in expected]
            given = [c for c in context.change if c is not None]
            assert given == pytest.approx([c for c in expected if c is not None], abs=2e-4)
            window = f[site][start : start + len(context.tokens), page.index]
            assert context.activations == pytest.approx(window.tolist(), rel=2e-3, abs=1e-5)


def find(model, texts, context):
    """A text with the context's words, and where they begin in it."""
    for number, ids in enumerate(texts):
        strings = model.token_strings(ids)
        for start in range(len(ids) - len(context.tokens) + 1):
            if strings[start : start + len(context.tokens)] == context.tokens and (start == 0 or start + 2 < len(ids)):
                first = context.change[0] is None
                if first == (start == 0):
                    return number, start
    raise AssertionError(context)


def test_similar_features(saes, runs, pages):
    for name, page in pages.items():
        site = Site.parse(page.site)
        near = [
            s
            for s in saes
            if abs((-1 if s.layer is None else s.layer) - (-1 if site.layer is None else site.layer)) <= 1
        ]
        own, W_dec = values_of(runs, name), saes[site].W_dec[page.index]
        cosines, correlations = {}, {}
        for other in near:
            activations = torch.cat([f[other][counts] for _, _, f, counts, _ in runs])
            for i, values in enumerate(activations.T):
                if (other, i) != (site, page.index):
                    cosines[f"{other}/{i}"] = float(cosine_similarity(W_dec, saes[other].W_dec[i], dim=0))
                    varies = float(own.std()) > 0 and float(values.std()) > 0
                    correlations[f"{other}/{i}"] = float(np.corrcoef(own, values)[0, 1]) if varies else 0.0
        for kind, exact in (("decoder", cosines), ("activation", correlations)):
            best = sorted((v for v in exact.values() if kind == "decoder" or v > 1e-6), reverse=True)[:4]
            assert [value for _, value in page.similar[kind]] == pytest.approx(best, abs=1e-3)
            assert all(exact[other] == pytest.approx(value, abs=1e-3) for other, value in page.similar[kind])


def test_logits_go_through_the_gain_of_the_final_norm(tiny_model, saes, pages):
    norm = tiny_model.hf.gpt_neox.final_layer_norm
    weight = tiny_model.hf.get_output_embeddings().weight
    for page in pages.values():
        row = saes[Site.parse(page.site)].W_dec[page.index]
        logits = weight @ (norm.weight * (row - row.mean()))
        assert page.top_logits[0][1] == pytest.approx(float(logits.max()), abs=1e-4)
        assert page.bottom_logits[0][1] == pytest.approx(float(logits.min()), abs=1e-4)
        assert sum(page.logit_histogram["counts"]) == len(logits)


@pytest.mark.slow
def test_an_interrupted_pass_ends_as_it_would_have(tiny_model, saes, pages, tmp_path, monkeypatch):
    monkeypatch.setattr(pages_module, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(pages_module, "BATCH_TEXTS", 4)
    monkeypatch.setattr(tally, "PASS_TOKENS", 30)
    monkeypatch.setattr(sketches, "MERGED_AT_ONCE", 4)
    calls = []

    def stop(n: int) -> None:
        calls.append(n)
        if len(calls) == 4:
            raise KeyboardInterrupt

    arguments = (tiny_model, saes, TEXTS, ASKED, OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        list(feature_pages_by_site(*arguments, partial=tmp_path, progress=stop))
    read = []
    resumed = list(feature_pages_by_site(*arguments, partial=tmp_path, progress=read.append))
    assert read[0] == sum(calls[:3])
    found = {page.name: page.to_dict() for _, of_site in resumed for page in of_site}
    assert json.dumps(found) == json.dumps({name: page.to_dict() for name, page in pages.items()})
    last = list(feature_pages_by_site(*arguments, partial=tmp_path, finished=list(ASKED)[:2]))
    assert [site for site, _ in last] == [Site("resid", 1)]


def test_bins_fold_exactly_and_samples_stay_uniform():
    generator = torch.Generator().manual_seed(1)
    histogram, n = ActivationHistogram(2), 4000
    hits = torch.zeros(n)
    for seed in range(30):
        samples, seen = IntervalSamples(1, 4), ActivationHistogram(1)
        draws = torch.Generator().manual_seed(seed)
        for start in range(0, 400, 50):
            value = torch.arange(start + 1, start + 51, dtype=torch.float32)  # each batch is stronger
            slot = torch.zeros(50, dtype=torch.int64)
            samples.widen(seen.widen(slot, value))
            samples.add(slot, seen.bins(slot, value) // 16, torch.arange(start, start + 50), slot, draws)
        chosen = [text for text, _ in samples.of_levels(0, slice(0, 32))]
        assert len(chosen) == 4
        hits[chosen] += 1
    assert float(hits[:200].sum()) == pytest.approx(60, abs=22)  # of 120 draws half are of the weaker half
    value = torch.rand(n, generator=generator) ** 6 * 1000
    slot = torch.randint(2, (n,), generator=generator)
    for part in torch.arange(n).split(100):
        histogram.widen(slot[part], value[part])
        histogram.add(slot[part], histogram.bins(slot[part], value[part]))
    for one in range(2):
        edges = histogram.edges(one)
        assert torch.equal(torch.histogram(value[slot == one].double(), edges).hist.long(), histogram.counts[one])


def test_pages_show_themselves(pages):
    frame = pages.to_frame()
    assert list(frame.index) == list(pages) and frame.loc["mlp_0/11", "density"] == 0
    html = pages["resid_1/2"]._repr_html_()
    assert "border-bottom" in html and "221 tokens" in html
    assert "resid_1/2" in pages._repr_html_() and json.loads(json.dumps(pages.to_dict()))["schema_version"] == 1


def test_bad_input(tiny_model, saes):
    with pytest.raises(UserError, match="'mlp_0/24': allowed are 0 to 23"):
        feature_pages(tiny_model, saes, TEXTS, {Site("mlp", 0): [24]})
    with pytest.raises(UserError, match="the text is empty"):
        feature_pages(tiny_model, saes, [], {Site("mlp", 0): [2]})
    with pytest.raises(UserError, match="no features asked about"):
        feature_pages(tiny_model, saes, TEXTS, {Site("mlp", 0): []})
