"""Circuits by span are those by position, of sums, and by brute force."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from circuits.attribution.activations import Setting
from circuits.attribution.nodes import count, select_nodes
from circuits.circuit import Circuit
from circuits.discovery.discover import discover
from circuits.faithfulness.ablation import AblationValues, NodeTable, ablation_edits
from circuits.faithfulness.edges import edge_faithfulness
from circuits.faithfulness.learned_mask import MaskOptions, learn_node_mask
from circuits.faithfulness.nodes import FaithfulnessOptions, measure_faithfulness
from circuits.metrics.metrics import logit_difference
from circuits.options import DiscoverOptions
from circuits.prompts.alignment import PositionGroups
from circuits.uncertainty.verification import verify
from graphs.drawing.dot import draw
from sae.errors import UserError
from sae.model.sites import Site
from tests.circuits.conftest import MIXED, with_spans


@pytest.fixture(scope="module")
def mixed(tiny_prompts):
    return with_spans(tiny_prompts, MIXED)


def found(model, saes, prompts, aggregation, **options):
    options = {"method": "attrib", "edge_nodes": 40, "aggregation": aggregation} | options
    return discover(model, saes, prompts, DiscoverOptions(**options), progress=False)


@pytest.mark.parametrize(
    ("method", "kind"), [("ig", "whole"), ("exact", "tokens"), ("exact", "whole"), ("activation-difference", "tokens")]
)
def test_at_both_ends(tiny_model, tiny_saes, tiny_prompts, kind, method):
    """Spans of one token each are positions, one span over everything is the sum: nodes and edges, exactly."""
    prompts = tiny_prompts[1::2] if kind == "tokens" else tiny_prompts
    if kind == "tokens":
        rows = {7: [f"p{place}" for place in range(7)]}
    else:
        rows = {5: ["whole"] * 5, 7: ["whole"] * 7}
    options = {"method": method, "steps": 2, "sites": "resid,mlp_1"}
    plain = found(tiny_model, tiny_saes, prompts, "position" if kind == "tokens" else "sum", **options)
    spans = found(tiny_model, tiny_saes, with_spans(prompts, rows), "spans", **options)
    for site, nodes in plain.nodes.items():
        ours = spans.nodes[site]
        names = [name.replace("@", "@p") if kind == "tokens" else f"{name}@whole" for name in nodes.ids(site)]
        values = dict(zip(ours.ids(site), ours.effect.tolist(), strict=True))
        assert sorted(values) == sorted(names)
        assert [values[name] for name in names] == pytest.approx(nodes.effect.tolist(), abs=1e-6)
    ours, theirs = (
        {(edge.source, edge.target): edge.weight for edge in circuit.graph(nodes=40).edges()}
        for circuit in (spans, plain)
    )
    rename = (lambda n: n.replace("@", "@p")) if kind == "tokens" else (lambda n: n if n == "metric" else f"{n}@whole")
    theirs = {(rename(u), rename(v)): weight for (u, v), weight in theirs.items()}
    assert ours.keys() == theirs.keys() and ours
    for pair, weight in theirs.items():
        assert ours[pair] == pytest.approx(weight, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ablation", "kind"), [("mean", "tokens"), ("mean", "whole"), ("resample", "tokens"), ("zero", "whole")]
)
def test_faithfulness_at_both_ends(tiny_model, tiny_saes, tiny_prompts, kind, ablation):
    prompts = tiny_prompts[1::2] if kind == "tokens" else tiny_prompts
    rows = {7: [f"p{place}" for place in range(7)]} if kind == "tokens" else {n: ["whole"] * n for n in (5, 7)}
    spanned = with_spans(prompts, rows)
    sites = {"sites": "resid,mlp_1"}
    plain = found(tiny_model, tiny_saes, prompts, "position" if kind == "tokens" else "sum", **sites)
    spans = found(tiny_model, tiny_saes, spanned, "spans", **sites)
    options = FaithfulnessOptions(ablation=ablation, random=0)
    if kind == "whole":  # ablation values follow the prompts' own spans: compare on the same prompts
        prompts = spanned
    for errors in ("nodes", "ablate") if ablation == "mean" else ("nodes",):
        ours, theirs = (
            measure_faithfulness(
                circuit.setting(), circuit.nodes, on, replace(options, errors=errors), sizes=[5, 30], progress=False
            )
            for circuit, on in ((spans, spanned), (plain, prompts))
        )
        assert ours.faithfulness == pytest.approx(theirs.faithfulness, abs=1e-4)
        assert ours.completeness == pytest.approx(theirs.completeness, abs=1e-4)
    ours, theirs = (
        edge_faithfulness(circuit, on, options, sizes=[30], reference=on, progress=False)
        for circuit, on in ((spans, spanned), (plain, prompts))
    )
    assert ours.faithfulness == pytest.approx(theirs.faithfulness, abs=1e-3)
    assert ours.all_joined == pytest.approx(theirs.all_joined, abs=1e-3)


def test_nodes_of_mixed_lengths_are_sums_over_the_tokens_of_the_span(tiny_model, tiny_saes, mixed, tiny_prompts):
    by_span = found(tiny_model, tiny_saes, mixed, "spans", edge_nodes=0)
    tokens = found(tiny_model, tiny_saes, tiny_prompts, "sum", edge_nodes=0)
    lengths = mixed.clean.lengths.tolist()
    for site, effects in tokens.effects.items():
        expected: dict[str, float] = {}
        for b, s, i, value in zip(
            effects.example.tolist(), effects.position.tolist(), effects.feature.tolist(), effects.value.tolist(),
            strict=True,
        ):  # fmt: skip
            what = "error" if i == effects.n_features else i
            name = f"{site.name}/{what}@{MIXED[lengths[b]][s]}"
            expected[name] = expected.get(name, 0.0) + value / len(lengths)
        nodes = by_span.nodes[site]
        for name, effect in zip(nodes.ids(site), nodes.effect.tolist(), strict=True):
            assert effect == pytest.approx(expected[name], abs=1e-6)


@pytest.mark.slow
def test_edges_of_mixed_lengths_are_sums_over_the_tokens_of_both_spans(tiny_model, tiny_saes, mixed):
    """Against circuits by position of each prompt alone, among the same features at every token of their span."""
    sites = [Site.parse(name) for name in ("embed", "mlp_0", "resid_1")]
    saes = {site: tiny_saes[site] for site in sites}
    circuit = found(tiny_model, saes, mixed, "spans", edge_nodes=25)
    total: dict[tuple[str, str], float] = {}
    for row in range(len(mixed)):
        one = mixed[row]
        names = MIXED[int(one.clean.lengths[0])]
        alone = found(tiny_model, saes, one, "position", edge_nodes=100_000)
        ids = {site: nodes.ids(site) for site, nodes in alone.edge_nodes.items()}
        for (up, down), weights in alone.edges.items():
            targets = ["metric@0"] if down is None else ids[down]
            for d, u in weights.nonzero().tolist():
                ends = []
                for name in (ids[up][u], targets[d]):
                    what, _, place = name.partition("@")
                    ends.append("metric" if what == "metric" else f"{what}@{names[int(place)]}")
                total[ends[0], ends[1]] = total.get((ends[0], ends[1]), 0.0) + float(weights[d, u]) / len(mixed)
    edges = circuit.graph(nodes=25).edges()
    assert len(edges) > 20
    assert {edge.source.partition("@")[2] for edge in edges} == {"b", "end"}
    for edge in edges:
        assert edge.weight == pytest.approx(total[edge.source, edge.target], abs=1e-6)


def test_kept_nodes_and_their_means_by_definition(tiny_model, tiny_saes, mixed):
    """x' of every token by loops: a node is kept at the tokens of its span; means are over equal span and place."""
    nodes = found(tiny_model, tiny_saes, mixed, "spans", edge_nodes=0).nodes
    site = Site.parse("mlp_0")
    chosen = {site: select_nodes({site: nodes[site]}, top=12)[site]}
    table = NodeTable(tiny_saes, [chosen], sites=[site])
    values = AblationValues(
        Setting(tiny_model, tiny_saes, logit_difference), table, "mean", reference=mixed, batch_size=3
    )(mixed)
    x_all = [tiny_model.run(tokens, capture=[site]).activations[site] for tokens in (mixed.clean, mixed.patch)]
    sae = tiny_saes[site]

    def cell(b, s):
        """Span and place: from the beginning in the first span, from the end in the others."""
        row = [n for n in mixed.span_numbers[b].tolist() if n >= 0]
        s -= mixed.clean.n_positions - len(row)
        return row[s], s if row[s] == 0 else row[s:].count(row[s])

    where = [(b, s) for b, s in mixed.clean.attention_mask.nonzero().tolist()]
    kept = set(zip(chosen[site].feature.tolist(), chosen[site].position.tolist(), strict=True))
    edited = ablation_edits(tiny_saes, table, chosen, values, mixed, keep=True)[site](x_all[0])
    removed = ablation_edits(tiny_saes, table, chosen, values, mixed, keep=False)[site](x_all[0])
    f_all = [sae.encode(x) for x in x_all]
    for b, s in where[::3]:
        same = [place for place in where if cell(*place) == cell(b, s)]
        mean_x = torch.stack([x[p] for x in x_all for p in same]).mean(0)
        mean_f = torch.stack([f[p] for f in f_all for p in same]).mean(0)
        f, x = f_all[0][b, s], x_all[0][b, s]
        moved = torch.zeros_like(x)
        for feature, span in kept:
            if span == mixed.span_numbers[b, s] and feature < len(f):
                moved += (f[feature] - mean_f[feature]) * sae.W_dec[feature]
            elif span == mixed.span_numbers[b, s]:
                moved += (x - sae.decode(f)) - (mean_x - sae.decode(mean_f))
        torch.testing.assert_close(edited[b, s], mean_x + moved, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(removed[b, s], x - moved, atol=1e-5, rtol=1e-4)


def test_prompts_of_new_lengths_share_the_means_of_their_spans(mixed):
    """A span longer than any in the reference takes the farthest place it has; an unknown span is not covered."""
    cells = PositionGroups(mixed)
    longer = with_spans(mixed[1::2], {7: ["a", "b", "c", "c", "c", "c", "end"]})
    assert cells.covers(longer).all()
    here, there = cells.of(longer)[0].tolist(), cells.of(mixed)[1].tolist()
    assert here[2] == here[3] == there[3] and here[3:6] == there[3:6] and here[1] == there[2]
    strange = with_spans(mixed[1::2], {7: ["a", "b", "x", "c", "c", "c", "end"]})
    assert not cells.covers(strange).any()


@pytest.mark.slow
def test_exact_effects_patch_a_span_at_once(tiny_model, tiny_saes, mixed):
    circuit = found(tiny_model, tiny_saes, mixed, "spans", edge_nodes=0)
    result = verify(circuit, mixed, nodes=10, batch_size=3, max_rows=5, progress=False)
    for name, exact in zip(result.names[:6], result.exact, strict=False):
        what, _, span = name.partition("@")
        site, _, feature = what.partition("/")
        at = Site.parse(site)
        sae, ends = tiny_saes[at], []
        for tokens in (mixed.clean, mixed.patch):
            ends.append(tiny_model.run(tokens, capture=[at]).activations[at])
        f = [sae.encode(x) for x in ends]
        if feature == "error":
            delta = (ends[1] - sae.decode(f[1])) - (ends[0] - sae.decode(f[0]))
        else:
            delta = (f[1] - f[0])[..., int(feature), None] * sae.W_dec[int(feature)]
        delta = delta * (mixed.span_numbers == mixed.spans.index(span))[..., None]
        m = [
            logit_difference(tiny_model.run(mixed.clean, edits=edits, last_only=True).logits[:, -1], mixed)
            for edits in ({at: lambda x, delta=delta: x + delta}, {})
        ]
        assert exact == pytest.approx((m[0] - m[1]).mean().item(), abs=1e-5), name


def test_masks_by_span_are_the_circuits_whose_faithfulness_is_measured(tiny_model, tiny_saes, mixed):
    nodes = found(tiny_model, tiny_saes, mixed, "spans", edge_nodes=0).nodes
    options = MaskOptions(steps=2, batch_size=4, smallest=5)
    mask = learn_node_mask(Setting.of(tiny_model, tiny_saes), nodes, mixed, options, progress=False)
    assert count(mask.nodes) == count(nodes)
    named = [name for site, part in mask.nodes.items() for name in part.ids(site)]
    assert sorted(named) == sorted(name for site, part in nodes.items() for name in part.ids(site))


@pytest.mark.slow
def test_a_circuit_by_span_keeps_the_names(tiny_model, tiny_saes, mixed, tmp_path):
    circuit = found(tiny_model, tiny_saes, mixed, "spans", edge_nodes=20)
    graph = circuit.graph(nodes=20)
    circuit.save(tmp_path / "circuit", graph=graph)
    again = Circuit.load(tmp_path)
    assert again.spans == mixed.spans == ("a", "b", "c", "end")
    assert again.graph(nodes=15).to_json() == circuit.graph(nodes=15).to_json()
    assert set(graph.positions) <= set(mixed.spans) and all(isinstance(p, str) for p in graph.positions)
    words = graph.metadata["span_words"]
    assert list(words) == list(mixed.spans)
    assert all(len(shown) <= 3 and all(shown) for shown in words.values()) and len(words["c"][0].split()) in (2, 3)
    drawn = draw(graph, tmp_path / "c.svg").read_text()
    assert graph.metadata["last_span"] == "end" and ("last token" in drawn) == ("end" in graph.positions)
    assert ", ".join(words[graph.positions[0]]) in drawn


@pytest.mark.slow
def test_circuits_and_prompts_of_other_spans(tiny_model, tiny_saes, tiny_prompts, mixed):
    nodes = found(tiny_model, tiny_saes, mixed, "spans", edge_nodes=0).nodes
    with pytest.raises(UserError, match="needs prompts with spans"):
        found(tiny_model, tiny_saes, tiny_prompts, "spans")
    with pytest.raises(UserError, match="these prompts have no spans"):
        measure_faithfulness(Setting.of(tiny_model, tiny_saes), nodes, tiny_prompts, sizes=[5], progress=False)
    other = with_spans(tiny_prompts, {5: ["a"] * 5, 7: ["x"] * 7})
    with pytest.raises(UserError, match="have the span 'x'"):
        measure_faithfulness(Setting.of(tiny_model, tiny_saes), nodes, other, sizes=[5], progress=False)
    fewer = with_spans(tiny_prompts, {5: ["c", "c", "c", "a", "a"], 7: ["c", "c", "c", "c", "a", "a", "a"]})
    result = measure_faithfulness(Setting.of(tiny_model, tiny_saes), nodes, fewer, sizes=[5], progress=False)
    assert result.n_prompts == len(fewer)
