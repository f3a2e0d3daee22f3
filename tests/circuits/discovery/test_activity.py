"""Mean activations by case and span, against loops over tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from circuits.discovery.activity import mean_activations, prompt_peaks
from circuits.discovery.description import describe_features
from circuits.discovery.discover import discover
from tests.circuits.conftest import MIXED, with_spans


def by_loops(model, saes, prompts, site, feature):
    """{case: {span: mean}} with one prompt and one token at a time."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in range(len(prompts)):
        one = prompts[row]
        x = model.run(one.clean, capture=[site]).activations[site][0]
        for token, number in enumerate(one.span_numbers[0].tolist() if one.spans else [0] * len(x)):
            if one.clean.input_ids[0, token].item() in model.special_ids:
                continue
            span = one.spans[number] if one.spans else ""
            values.setdefault((one.cases[0], span), []).append(saes[site].encode(x[token])[feature].item())
    means = {key: sum(column) / len(column) for key, column in values.items()}
    return {case: {span: m for (c, span), m in means.items() if c == case} for case in dict.fromkeys(prompts.cases)}


@pytest.mark.slow
def test_means_by_case_and_span(tiny_model, tiny_saes, tiny_prompts):
    ids = tiny_prompts.clean.input_ids.clone()
    ids[:, 2] = min(tiny_model.special_ids)
    special = replace(tiny_prompts, clean=replace(tiny_prompts.clean, input_ids=ids))
    for prompts in (tiny_prompts, special, with_spans(tiny_prompts, MIXED)):
        for site in tiny_model.sites[:2]:
            x = tiny_model.run(prompts.clean, capture=[site]).activations[site][:, -1]
            features = tiny_saes[site].encode(x).sum(0).topk(2).indices
            means = mean_activations(tiny_model, tiny_saes, prompts, {site: features})
            for feature in features.tolist():
                expected = by_loops(tiny_model, tiny_saes, prompts, site, feature)
                assert means[f"{site.name}/{feature}"].keys() == expected.keys()
                for case, by_span in expected.items():
                    shown = means[f"{site.name}/{feature}"][case]
                    assert shown.keys() == by_span.keys()
                    torch.testing.assert_close(list(shown.values()), list(by_span.values()), atol=2e-6, rtol=1e-4)


def test_peaks_leave_special_tokens_out(tiny_model, tiny_saes, tiny_prompts):
    ids = tiny_prompts.clean.input_ids.clone()
    ids[:, 2] = min(tiny_model.special_ids)
    prompts = replace(tiny_prompts, clean=replace(tiny_prompts.clean, input_ids=ids))
    site = tiny_model.sites[0]
    features = torch.arange(tiny_saes[site].config.n_features)
    peaks = prompt_peaks(tiny_model, tiny_saes, prompts, {site: features})
    for row, case in enumerate(prompts.cases):
        one = prompts[row]
        f = tiny_saes[site].encode(tiny_model.run(one.clean, capture=[site]).activations[site][0])
        words = [
            place for place, token in enumerate(one.clean.input_ids[0].tolist()) if token not in tiny_model.special_ids
        ]
        place = prompts.cases[:row].count(case)
        shown = torch.tensor([peaks[f"{site.name}/{feature}"][case][place] for feature in features])
        torch.testing.assert_close(shown, f[words].amax(0), atol=1e-5, rtol=1e-3)


def test_cases_without_a_name_are_called_prompts(tiny_model, tiny_saes, tiny_prompts):
    site = tiny_model.sites[0]
    uncased = replace(tiny_prompts, cases=[""] * len(tiny_prompts))
    means = mean_activations(tiny_model, tiny_saes, uncased, {site: torch.tensor([0])})
    assert list(means[f"{site.name}/0"]) == ["prompts"]


def test_a_described_circuit_shows_words_and_cases(tiny_model, tiny_saes, tiny_prompts):
    circuit = discover(tiny_model, tiny_saes, tiny_prompts, method="attrib", edge_nodes=6, progress=False)
    described = describe_features(circuit)
    for site, index in circuit.features_with_edges().items():
        by_case = mean_activations(tiny_model, tiny_saes, tiny_prompts, {site: torch.tensor(index)})
        for feature in index:
            assert described[f"{site.name}/{feature}"]["by_case"] == by_case[f"{site.name}/{feature}"]
    (node, *_) = [node for node in circuit._shown(6, 9).nodes() if node.kind == "feature"]
    assert node.attributes["top_tokens"] == described[node.name]["top_tokens"]
