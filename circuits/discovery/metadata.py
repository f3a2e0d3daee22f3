"""The metadata of a circuit: how it was found, and how far to trust it.

1. What was asked: model, autoencoders, options, metric.
2. The prompts: how many, their cases, spans and templates, an example pair of each case.
3. What was measured: the metric on both sides, the share of errors and skip connections, and how nearly the effects of
   every site add up to patching it (the sum check); warnings where they do not, or where there are none.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from circuits.attribution.effects import SiteEffects
from circuits.attribution.node_effects import Attribution
from circuits.discovery.batching import DiscoveryRun
from circuits.metrics.metrics import (
    Metric,
    logit_difference,
    metric_fingerprint,
    metric_title,
    warn_if_cancelling,
)
from circuits.metrics.probe import Probe
from circuits.prompts.dataset import PromptSet
from circuits.prompts.spans import LAST, OTHER
from sae.model.huggingface import quantization
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.saes import saes_fingerprint

log = logging.getLogger(__name__)

ADDS_UP = ("ig", "ig-adaptive")
"""Methods whose effects of a site add up to patching it, but for the quadrature error."""
MEAN_RESIDUAL, WORST_RESIDUAL = 0.03, 0.1
"""Shares of the total effect beyond which such effects are not to be trusted."""
FLAT = 1e-3
"""Share of the total effect below which all effects of a site together are rounding."""
LOGIT_DIFFERENCE = "logit(patch answer) - logit(clean answer)"


def circuit_metadata(
    model: LanguageModel,
    run: DiscoveryRun,
    batches: Sequence[Attribution],
    effects: Mapping[Site, SiteEffects],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """The metadata of a circuit; warns where effects cancel, vanish or do not add up.

    batches: the node effects of every batch; effects: the same of all batches together; provenance: names of model,
    autoencoders and prompts.
    """
    m, prompts = run.setting.metric, run.prompts
    cancels, measured = _warn_if_cancelling(m, batches), _of_metric(batches, effects, len(prompts))
    if run.options.method in ADDS_UP and not cancels:  # a total of next to nothing is no measure
        _warn_if_not_adding_up(measured["completeness"])
    _warn_if_flat(effects, measured, len(prompts))
    return {
        "metric": LOGIT_DIFFERENCE if m is logit_difference else metric_title(m, prompts),
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "saes_fingerprint": saes_fingerprint(run.setting.saes.subset(run.sites)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantize": quantization(model.architecture),
        **provenance,
        "options": asdict(run.options),
        "metric_fingerprint": metric_fingerprint(m),
        "sites": [site.name for site in run.sites],
        **_of_prompts(model, prompts, run.options.aggregation),
        **measured,
    }


def _of_prompts(model: LanguageModel, prompts: PromptSet, aggregation: str) -> dict[str, Any]:
    """Metadata of the prompts."""
    by_span = aggregation == "spans"
    return {
        "n_examples": len(prompts),
        "n_positions": prompts.clean.n_positions,
        "rejected": prompts.rejected,
        "tokens": _position_tokens(model, prompts) if aggregation == "position" else [],
        "positions": list(prompts.spans) if by_span else [],
        "span_words": _span_words(model, prompts) if by_span else {},
        "last_span": _last_span(prompts) if by_span else None,
        "templates": sorted(set(prompts.templates)),
        "cases": dict(Counter(case or "prompts" for case in prompts.cases)),
        "example_pairs": _example_pairs(model, prompts),
    }


def _example_pairs(model: LanguageModel, prompts: PromptSet, *, most: int = 4) -> list[dict[str, str]]:
    """The first prompt of each of at most `most` cases, with its patch side and the answers, as text."""

    def text(ids: Tensor, mask: Tensor) -> str:
        return "".join(model.token_strings(id for id in ids[mask.bool()].tolist() if id not in model.special_ids))

    def answer(answers: Tensor) -> str:
        return " / ".join(model.token_strings(id for id in answers.reshape(-1)[:3].tolist() if id >= 0))

    pairs = []
    for case in list(dict.fromkeys(prompts.cases))[:most]:
        row = prompts.cases.index(case)
        pair = {
            "case": case or "prompts",
            "clean": prompts.texts[row],
            "clean_answer": answer(prompts.clean_answers[row]),
        }
        if prompts.patch is not None:
            pair["patch"] = text(prompts.patch.input_ids[row], prompts.patch.attention_mask[row])
        if prompts.patch_answers is not None:
            pair["patch_answer"] = answer(prompts.patch_answers[row])
        pairs.append(pair)
    return pairs


def _of_metric(batches: Sequence[Attribution], effects: Mapping[Site, SiteEffects], n_examples: int) -> dict[str, Any]:
    """Metadata of the metric: its means, and how nearly the effects add up to what was measured."""
    means = _metric_means(batches, n_examples)
    totals = {site: torch.cat([batch.site_totals[site] for batch in batches]) for site in effects}
    scale = abs(means["total_effect"] or 0.0) or max(abs(total.double().mean().item()) for total in totals.values())
    with_skip = {site: of_site for site, of_site in effects.items() if (of_site.feature > of_site.n_features).any()}
    return (
        means
        | {"completeness": _sum_check(effects, totals, n_examples, scale)}
        | {"errors": _shares(effects, n_examples, scale)}
        | ({"skips": _shares(with_skip, n_examples, scale, beyond=1)} if with_skip else {})
    )


def _shares(effects: Mapping[Site, SiteEffects], n_examples: int, scale: float, *, beyond: int = 0) -> dict[str, Any]:
    """The sum of the effects of each site's error node, or its skip connection (`beyond` 1), in units of `scale`."""
    sums = {
        site: of_site.value[of_site.feature == of_site.n_features + beyond].double().sum()
        for site, of_site in effects.items()
    }
    shares = {site: total.item() / n_examples / (scale or 1.0) for site, total in sums.items()}
    largest = max(shares, key=lambda site: abs(shares[site]))
    return {
        "mean_share": sum(shares.values()) / len(shares),
        "largest_share": shares[largest],
        "largest_site": largest.name,
        "sites": {site.name: share for site, share in shares.items()},
    }


def _warn_if_cancelling(metric: Metric, batches: Sequence[Attribution]) -> bool:
    deltas = [batch.states.m_patch - batch.states.m_clean for batch in batches if batch.states.m_patch is not None]
    if deltas:
        return warn_if_cancelling(metric, torch.cat(deltas))
    if isinstance(metric, Probe) and not metric.margin:
        return warn_if_cancelling(metric, -torch.cat([batch.states.m_clean for batch in batches]))
    return False


def _warn_if_not_adding_up(sum_check: Mapping[str, Any]) -> None:
    """Warn where the effects of integrated gradients do not add up to what was measured."""
    mean, worst = sum_check["mean_residual"], sum_check["worst_residual"]
    if mean > MEAN_RESIDUAL or worst > WORST_RESIDUAL:
        log.warning(
            "the effects of a site add up to that of patching it only within %.1f %% of the total on average, %.1f %% "
            "at %s: take more steps, or look for a module of the model through which no gradient flows",
            100 * mean,
            100 * worst,
            sum_check["worst_site"],
        )


def _warn_if_flat(effects: Mapping[Site, SiteEffects], measured: Mapping[str, Any], n_examples: int) -> None:
    """Warn where the metric moves and no node has an effect, as with `kl` and a gradient at the clean run."""
    total = abs(measured["total_effect"] or 0.0)
    largest = max(of_site.value.double().abs().sum().item() for of_site in effects.values()) / n_examples
    if largest < FLAT * total:
        log.warning(
            "no node has an effect, though the metric goes from %.3g on clean prompts to %.3g on patch prompts: its "
            "gradient vanishes where this method takes it; take --method ig, or another --metric",
            measured["m_clean"],
            measured["m_patch"],
        )


def _metric_means(batches: Sequence[Attribution], n_examples: int) -> dict[str, Any]:
    """Mean of the metric on clean and patch prompts, and the points of the path a prompt took per site."""
    m_clean = torch.cat([batch.states.m_clean for batch in batches]).mean().item()
    patch = [batch.states.m_patch for batch in batches if batch.states.m_patch is not None]
    m_patch = torch.cat(patch).mean().item() if patch else None
    means: dict[str, Any] = {
        "m_clean": m_clean,
        "m_patch": m_patch,
        "total_effect": None if m_patch is None else m_patch - m_clean,
    }
    path_nodes: dict[str, float] = {}
    for batch in batches:
        for site, n in batch.path_nodes.items():
            path_nodes[site.name] = path_nodes.get(site.name, 0.0) + n * len(batch.states.m_clean) / n_examples
    return means | ({"path_nodes": path_nodes} if path_nodes else {})


def _sum_check(
    effects: Mapping[Site, SiteEffects],
    totals: Mapping[Site, Tensor],
    n_examples: int,
    scale: float,
) -> dict[str, Any]:
    """Sum of a site's effects against m(the site alone patched) - m(clean), both averaged over examples.

    residual = |sum of effects - measured| / scale; scale: |m(patch) - m(clean)|, or without patch prompts the largest
    measured effect of a site. For integrated gradients it is the quadrature error.
    """
    summed = {site: effects[site].value.double().sum().item() / n_examples for site in effects}
    measured = {site: totals[site].double().mean().item() for site in effects}
    residual = {site: abs(summed[site] - measured[site]) / (scale or 1.0) for site in effects}
    worst = max(residual, key=residual.__getitem__)
    return {
        "mean_residual": sum(residual.values()) / len(residual),
        "worst_residual": residual[worst],
        "worst_site": worst.name,
        "sites": {
            site.name: {"sum_of_effects": summed[site], "measured": measured[site], "residual": residual[site]}
            for site in effects
        },
    }


def _span_words(model: LanguageModel, prompts: PromptSet, *, most: int = 3) -> dict[str, list[str]]:
    """The commonest words of every named span, for the header of a graph by span."""
    assert prompts.span_numbers is not None
    commonest: dict[str, list[str]] = {}
    for number, name in enumerate(prompts.spans):
        rows = zip(prompts.clean.input_ids, prompts.span_numbers == number, strict=True)
        words = Counter("".join(model.token_strings(ids[inside].tolist())).strip() for ids, inside in rows)
        commonest[name] = [word for word, _ in words.most_common(most) if word] if name not in (OTHER, LAST) else []
    return commonest


def _last_span(prompts: PromptSet) -> str | None:
    """The span of the last token, after which the metric is read, where all prompts end in the same."""
    assert prompts.span_numbers is not None
    numbers = prompts.span_numbers[:, -1].unique().tolist()  # padding stands on the left
    return prompts.spans[numbers[0]] if len(numbers) == 1 else None


def _position_tokens(model: LanguageModel, prompts: PromptSet) -> list[str]:
    """The header of a graph by position: the token where all prompts share it, else the first prompt's with an
    ellipsis.
    """
    ids = prompts.clean.input_ids
    shared = (ids == ids[:1]).all(0).tolist()
    return [
        token if same else f"{token}…" for token, same in zip(model.token_strings(ids[0].tolist()), shared, strict=True)
    ]
