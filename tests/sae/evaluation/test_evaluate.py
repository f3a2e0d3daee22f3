"""An evaluation in batches against one text at a time through plain torch hooks."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save
from torch.nn.functional import cross_entropy, normalize

from sae.autoencoder import SAEConfig, SparseAutoencoder
from sae.data.batches import token_batches
from sae.data.predictions import cross_entropy as text_cross_entropy
from sae.errors import UserError
from sae.evaluation.evaluate import Evaluator, evaluate_saes
from sae.evaluation.plots import evaluation_figure, plot_evaluation
from sae.model.sites import Site, site_table
from sae.splice import decode_sparse, spliced_predictions

TEXTS = [
    "the man sees the old dog behind the house",
    "<bos> a girl walks",
    "  ",
    "kings know that they were happy .",
    "the cat runs near the boy and the boy runs near the young queen who sings",
    "he sees her",
    "she",
    "this dog likes that dog",
]
SITES = ["embed", "attn_0", "mlp_0", "resid_0", "attn_1", "resid_1"]


def random_sae(site, d, *, n_features=24, architecture="relu", seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    W_dec = normalize(torch.randn(n_features, d, generator=generator), dim=-1)
    tensors = {
        "W_enc": W_dec.clone() * 0.6,
        "b_enc": -0.1 * torch.rand(n_features, generator=generator),
        "W_dec": W_dec,
        "b_dec": 0.1 * torch.randn(d, generator=generator),
    }
    if architecture == "jumprelu":
        tensors["threshold"] = torch.full((n_features,), 0.2)
    config = SAEConfig(architecture, d, n_features, site=str(site), **options)
    return SparseAutoencoder(config, tensors)


@pytest.fixture(scope="module")
def saes(tiny_model):
    kinds = [{"architecture": "topk", "k": 4}, {}, {"architecture": "jumprelu"}]
    return {
        Site.parse(name): random_sae(name, tiny_model.d_model, seed=i, **kinds[i % 3]) for i, name in enumerate(SITES)
    }


def hooked_logits(model, ids, edits):
    """Logits [S, V] of one text with edits x [S, d] -> x at sites, by torch hooks; and x at every site before."""
    seen, handles = {}, []

    def hook(site):
        def replace(module, inputs, output):
            x = output[0] if isinstance(output, tuple) else output
            seen[site] = x[0]
            new = edits.get(site, lambda x: x)(x[0])[None]
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return replace

    for site, path in site_table(model.hf).items():
        handles.append(model.hf.get_submodule(path.module).register_forward_hook(hook(site)))
    try:
        with torch.no_grad():
            return model.hf(input_ids=ids[None]).logits[0].double(), seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize(("special_tokens", "texts"), [(False, TEXTS[:4]), (True, TEXTS[1:6:2])])
def test_evaluation_equals_one_text_at_a_time(tiny_model, saes, special_tokens, texts):
    result = evaluate_saes(tiny_model, saes, texts, batch_size=3, special_tokens=special_tokens, errors=True)
    groups = {site.name: [site] for site in saes}
    groups |= {"attn": [Site("attn", 0), Site("attn", 1)], "resid": [Site("resid", 0), Site("resid", 1)]}
    groups["all"] = list(saes)
    groups |= {f"all but {site}": [other for other in saes if other != site] for site in saes}
    sums = {name: {"sae": 0.0, "zero": 0.0, "kl": 0.0, "kl_zero": 0.0, "same": 0} for name in groups}
    ce_model, n, inputs = 0.0, 0, {site: [] for site in saes}
    for text in texts:
        if not text.strip():
            continue
        ids = tiny_model.tokenize([text]).input_ids[0]
        counted = torch.tensor([special_tokens or int(i) not in tiny_model.special_ids for i in ids])[:, None]
        logits, seen = hooked_logits(tiny_model, ids, {})
        log_p = logits.log_softmax(-1)[:-1]
        scored = counted[1:, 0]  # predictions of special tokens do not count either
        log_p = log_p[scored]
        ce_model += float(cross_entropy(logits[:-1][scored], ids[1:][scored], reduction="sum"))
        n += int(scored.sum())
        for site in saes:
            inputs[site].append(seen[site][counted[:, 0]])
        for name, group in groups.items():
            edits = {s: lambda x, s=s, counted=counted: torch.where(counted, saes[s](x), x) for s in group}
            zeros = {s: lambda x, counted=counted: torch.where(counted, 0.0, x) for s in group}
            for kind, edit in (("sae", edits), ("zero", zeros))[: 1 if name.startswith("all but") else 2]:
                log_q = hooked_logits(tiny_model, ids, edit)[0].log_softmax(-1)[:-1][scored]
                sums[name][kind] -= float(log_q.gather(1, ids[1:, None][scored]).sum())
                sums[name]["kl" if kind == "sae" else "kl_zero"] += float((log_p.exp() * (log_p - log_q)).sum())
                sums[name]["same"] += int((log_q.argmax(-1) == log_p.argmax(-1)).sum()) if kind == "sae" else 0

    assert result.n_predictions == n
    assert result.ce_model == pytest.approx(ce_model / n, rel=1e-5)
    assert result.ce_errors_kept == pytest.approx(result.ce_model, rel=1e-5)
    assert set(result.spliced) == {"attn", "resid", "all"}
    measured = {name: metrics.predictions for name, metrics in result.sites.items()} | result.spliced
    for site in saes:
        kept = result.sites[site.name].ce_error_kept
        assert kept == pytest.approx(sums.pop(f"all but {site}")["sae"] / n, rel=1e-5)
    for name, expected in sums.items():
        p = measured[name]
        assert p.ce == pytest.approx(expected["sae"] / n, rel=1e-5), name
        assert p.ce_zero == pytest.approx(expected["zero"] / n, rel=1e-5), name
        assert p.kl == pytest.approx(expected["kl"] / n, rel=1e-3, abs=1e-6), name
        assert p.kl_recovered == pytest.approx(1 - expected["kl"] / expected["kl_zero"], rel=1e-3, abs=1e-5), name
        assert p.top1_consistency == pytest.approx(expected["same"] / n), name
        recovered = (expected["zero"] - expected["sae"]) / (expected["zero"] - ce_model)
        assert p.ce_recovered == pytest.approx(recovered, rel=1e-2, abs=1e-3), name
    assert list(result.sites) == SITES
    for site, metrics in zip(saes, result.sites.values(), strict=True):
        x = torch.cat(inputs[site]).double()
        f = saes[site].encode(x.float()).double()
        x_hat = saes[site].decode(f.float()).double()
        assert result.n_tokens == len(x)
        deviation = (x - x.mean(0)).square().sum()
        assert metrics.explained_variance == pytest.approx(float(1 - (x - x_hat).square().sum() / deviation), rel=1e-4)
        assert metrics.l0 == pytest.approx(float((f != 0).sum() / len(x)))
        assert metrics.dead_fraction == pytest.approx(float((f == 0).all(0).float().mean()))
        assert metrics.dense_fraction == pytest.approx(float(((f != 0).double().mean(0) > 0.1).double().mean()))
        assert metrics.mse == pytest.approx(float((x - x_hat).square().mean()), rel=1e-4)
        assert metrics.cosine == pytest.approx(float(torch.cosine_similarity(x, x_hat).mean()), rel=1e-4)
        assert metrics.l2_ratio == pytest.approx(float((x_hat.norm(dim=1) / x.norm(dim=1)).mean()), rel=1e-4)
        assert metrics.relative_bias == pytest.approx(float(x_hat.square().sum() / (x * x_hat).sum()), rel=1e-4)
        assert sum(metrics.density_histogram.counts) == int((f != 0).any(0).sum())
        assert (metrics.architecture, metrics.n_features) == (saes[site].config.architecture, 24)
        error = ((x - x_hat) @ saes[site].W_dec.double().T * f).sum() / f.square().sum()
        assert metrics.shrinkage == pytest.approx(float(error), rel=1e-4)


def test_a_kind_that_is_all_there_is_is_not_measured_twice(tiny_model, saes):
    residual = {site: sae for site, sae in saes.items() if site.kind == "resid"}
    assert set(evaluate_saes(tiny_model, residual, TEXTS).spliced) == {"all"}


@pytest.mark.slow
def test_runs_measured_together_are_measured_as_alone(tiny_model, saes, monkeypatch):
    """Also where sums went to disk in between, and without a second pass where no autoencoder is in it."""
    fewer = {site: random_sae(site, tiny_model.d_model, seed=9, n_features=8) for site in list(saes)[1:4]}
    runs = {"one": saes, "fewer": fewer, "again": saes}
    texts = TEXTS[:6]
    alone = {
        name: evaluate_saes(tiny_model, runs[name], texts, batch_size=3, errors=False).to_dict()
        for name in ("one", "fewer")
    }
    first, *others = token_batches(tiny_model, texts, max_tokens=None, batch_size=3, context=128)
    begun = Evaluator(tiny_model, runs)
    begun.update(first)
    resumed = Evaluator(tiny_model, runs)
    resumed.restore(load(save(begun.state())))
    passes, run = [], tiny_model.run
    monkeypatch.setattr(tiny_model, "run", lambda *a, **options: passes.append(1) or run(*a, **options))
    for batch in others:
        resumed.update(batch)
    assert {name: result.to_dict() for name, result in resumed.results().items()} == alone | {"again": alone["one"]}
    zeros, spliced = 6 + 3 + 1, 2 * (6 + 3 + 1) + (3 + 1 + 1)  # of both sets of sites: alone, groups, errors kept
    assert resumed.n_batches == 2 and len(passes) == 1 + zeros + spliced


def test_sparse_decoding_equals_dense(saes):
    for sae in saes.values():
        x = torch.randn(9, sae.config.d_model)
        x[4] = sae.b_dec - 100.0 * sae.W_enc.sum(0)  # a token on which little fires
        dense = sae.decode(sae.encode(x))
        assert torch.allclose(decode_sparse(sae, sae.encode_sparse(x), 9), dense, atol=1e-5)


def test_a_perfect_autoencoder_costs_nothing(tiny_model):
    eye = torch.eye(tiny_model.d_model)
    tensors = {"W_enc": torch.cat([eye, -eye]), "W_dec": torch.cat([eye, -eye])}
    tensors |= {"b_enc": torch.zeros(2 * len(eye)), "b_dec": torch.zeros(len(eye))}
    config = SAEConfig("relu", len(eye), 2 * len(eye), subtract_b_dec=False)
    result = evaluate_saes(tiny_model, {site: SparseAutoencoder(config, tensors) for site in tiny_model.sites}, TEXTS)
    assert result.spliced["all"].ce == pytest.approx(result.ce_model, rel=1e-5)
    for metrics in result.sites.values():
        assert metrics.explained_variance == pytest.approx(1.0)
        assert metrics.predictions.ce_recovered == pytest.approx(1.0, abs=1e-3)
        assert metrics.l0 == pytest.approx(len(eye), abs=0.5)


def test_table_fits_a_terminal_and_json_has_no_nan(tiny_model, saes):
    result = evaluate_saes(tiny_model, saes, TEXTS, max_tokens=30, errors=False)
    lines = result.text().splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1:7]] == [line.split()[0] for line in lines[9:15]] == SITES
    assert lines[-2].startswith("all sites")
    entries = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert entries["sites"]["mlp_0"]["l0"] == pytest.approx(result.sites["mlp_0"].l0)
    assert len(entries["sites"]["embed"]["density_histogram"]["counts"]) == 24
    assert entries["sites"]["embed"]["ce_error_kept"] is None


def test_an_undefined_score_is_a_dash_and_null(tiny_model):
    dead = random_sae("mlp_0", tiny_model.d_model)
    dead.b_enc.fill_(-1e6)
    result = evaluate_saes(tiny_model, {Site("mlp", 0): dead}, TEXTS)
    metrics = result.sites["mlp_0"]
    assert metrics.dead_fraction == 1.0
    assert math.isnan(metrics.shrinkage)
    assert result.to_dict()["sites"]["mlp_0"]["shrinkage"] is None
    assert " - " in result.text()


def test_batches_stop_at_max_tokens_and_cut_texts(tiny_model):
    def lengths(**options):
        batches = token_batches(tiny_model, iter(TEXTS), **options)
        return [batch.lengths.tolist() for batch in batches]

    full = lengths(max_tokens=None, batch_size=3, context=100)
    assert [len(batch) for batch in full] == [3, 3, 1]
    flat = [length for batch in full for length in batch]
    cut = [length for batch in lengths(max_tokens=None, batch_size=3, context=4) for length in batch]
    assert cut == [min(length, 4) for length in flat]
    for limit in (1, 12, 20, sum(flat)):
        given = [length for batch in lengths(max_tokens=limit, batch_size=3, context=100) for length in batch]
        assert given == flat[: len(given)]
        assert sum(given) <= limit or len(given) == 1
        assert len(given) == len(flat) or sum(flat[: len(given) + 1]) > limit


@pytest.mark.parametrize("limit", [1, 13, 24, 40])
def test_the_tokens_read_do_not_depend_on_the_size_of_batches(tiny_model, limit):
    def rows(batch_size):
        batches = token_batches(tiny_model, TEXTS, max_tokens=limit, batch_size=batch_size)
        return [
            row[mask.bool()].tolist()
            for batch in batches
            for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
        ]

    assert rows(1) == rows(3) == rows(64) != []


@pytest.mark.slow
def test_one_cross_entropy(tiny_model, saes, monkeypatch):
    """That of `evaluate`, of `ablate` and of fine-tuning, also where logits are made a text at a time."""
    texts = [*TEXTS[:4], "the old <eos> cat <bos> sings", "the king " * 60]
    saes = {site: saes[site] for site in (Site("mlp", 0), Site("resid", 1)) if site in saes}
    batches = list(token_batches(tiny_model, texts, max_tokens=None, batch_size=3))
    assert max(batch.n_positions for batch in batches) == 64 == tiny_model.max_positions  # 120 words in the last text
    result = evaluate_saes(tiny_model, saes, texts, batch_size=2, errors=False)
    assert result.ce_model == pytest.approx(text_cross_entropy(tiny_model, batches), rel=1e-6)
    assert result.ce_model != pytest.approx(
        evaluate_saes(tiny_model, saes, texts, special_tokens=True, errors=False).ce_model, rel=1e-4
    )
    together, spliced = spliced_predictions(tiny_model, saes, texts, max_tokens=10_000), result.spliced["all"]
    assert (together["ce"], together["kl"]) == pytest.approx((spliced.ce, spliced.kl), rel=1e-5)
    monkeypatch.setattr("sae.data.batches.LOGIT_BYTES", 1)
    monkeypatch.setattr("sae.data.predictions.CHUNK_BYTES", 4 * tiny_model.vocab_size)
    again, shapes, run = evaluate_saes(tiny_model, saes, texts, errors=False), [], tiny_model.run
    assert again.ce_model == pytest.approx(result.ce_model, rel=1e-6) and again.n_tokens == result.n_tokens
    assert again.spliced["all"].kl == pytest.approx(spliced.kl, rel=1e-4)
    monkeypatch.setattr(tiny_model, "run", lambda tokens, **o: shapes.append(len(tokens)) or run(tokens, **o))
    assert text_cross_entropy(tiny_model, batches) == pytest.approx(result.ce_model, rel=1e-6) and set(shapes) == {1}


def test_nothing_to_evaluate_is_refused(tiny_model, saes):
    with pytest.raises(UserError, match="no autoencoders"):
        evaluate_saes(tiny_model, {}, TEXTS)
    for texts in ([], ["  "], ["she"]):
        with pytest.raises(UserError, match="no tokens"):
            evaluate_saes(tiny_model, saes, texts)


@pytest.mark.slow
def test_plot_has_a_bar_and_a_histogram_for_every_site(tiny_model, saes, tmp_path):
    result = evaluate_saes(tiny_model, saes, TEXTS[:4], errors=True)
    figure = evaluation_figure(result)
    bars, costs, *histograms = figure.axes
    assert [label.get_text() for label in costs.get_xticklabels()] == SITES
    heights = [bar.get_height() for bar in bars.patches[: len(SITES)]]
    assert heights == pytest.approx([m.explained_variance for m in result.sites.values()])
    nats = [bar.get_height() for bar in costs.patches[len(SITES) :]]
    assert nats == pytest.approx([result.spliced["all"].ce - m.ce_error_kept for m in result.sites.values()])
    assert [axes.get_title().split()[0] for axes in histograms] == SITES
    drawn = [sum(bar.get_height() for bar in axes.patches) for axes in histograms]
    assert drawn == [sum(m.density_histogram.counts) for m in result.sites.values()]
    alone = replace(result, sites=dict(list(result.sites.items())[:1]))
    assert plot_evaluation(alone, tmp_path / "evaluation.svg").stat().st_size > 5000
    with pytest.raises(UserError, match="'gif'"):
        plot_evaluation(alone, tmp_path / "evaluation.gif")
