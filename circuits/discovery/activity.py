"""When the features of a circuit are on: their mean activation by case and span of the prompts.

    a_i(c, s) = mean of f_i over all tokens in span s of the clean prompts of case c, special ones left out

Prompts without spans have one span "" of all their tokens. Cases without a name are called "prompts". `prompt_peaks`
gives the largest activation on each prompt instead.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.data.batches import counted_tokens
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.saes import as_saes

ActivityByCase = dict[str, dict[str, float]]
"""case -> span -> mean activation."""
BATCH = 64
"""Prompts of one forward pass."""


@torch.no_grad()
def mean_activations(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    prompts: PromptSet,
    features: Mapping[Site, Tensor],
) -> dict[str, ActivityByCase]:
    """The mean activation of some features by case and span.

    Args:
        model: the model the prompts were tokenised for.
        saes: SAEs by site.
        prompts: B prompts; the clean side is read.
        features: indices of features [n] int64 by site.

    Returns:
        By feature, `resid_3/120`, {case: {span: mean activation}}; spans that no prompt of a case has are left out.
    """
    cases = list(dict.fromkeys(prompts.cases))
    spans = prompts.spans or ("",)
    n_groups = len(cases) * len(spans)
    sums = {site: torch.zeros(n_groups, len(index), dtype=torch.float64) for site, index in features.items()}
    counts, reads = torch.zeros(n_groups, dtype=torch.float64), as_saes(saes).read_sites(features)
    for batch in prompts.batches(BATCH):
        run = model.run(batch.clean, capture=reads.values(), need_logits=False)
        span = batch.positions(batch.spans) if batch.spans else batch.positions().clamp(max=0)  # [B, S]; -1 at padding
        case = torch.tensor([cases.index(name) for name in batch.cases], device=span.device)
        real = (span >= 0) & counted_tokens(model, batch.clean.to(model.device))
        group = (case[:, None] * len(spans) + span)[real].cpu()
        counts.index_add_(0, group, torch.ones(len(group), dtype=torch.float64))
        for site, index in features.items():
            f = saes[site].encode_some(run.activations[reads[site]][real], index)
            sums[site].index_add_(0, group, f.cpu().double())
    means = {site: total / counts.clamp(min=1)[:, None] for site, total in sums.items()}
    return {
        f"{site.name}/{feature}": _by_case(column.tolist(), counts.tolist(), cases, spans)
        for site, index in features.items()
        for feature, column in zip(index.tolist(), means[site].T, strict=True)
    }


@torch.no_grad()
def prompt_peaks(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    prompts: PromptSet,
    features: Mapping[Site, Tensor],
) -> dict[str, dict[str, list[float]]]:
    """The largest activation of some features on the clean side of each prompt, special tokens left out.

    Args:
        model, saes, prompts, features: as in `mean_activations`.

    Returns:
        By feature, {case: a number for each of its prompts}.
    """
    peaks: dict[Site, list[Tensor]] = {site: [] for site in features}
    reads = as_saes(saes).read_sites(features)
    for batch in prompts.batches(BATCH):
        run = model.run(batch.clean, capture=reads.values(), need_logits=False)
        counted = counted_tokens(model, batch.clean.to(model.device))
        for site, index in features.items():
            f = saes[site].encode_some(run.activations[reads[site]], index) * counted[..., None]
            peaks[site].append(f.amax(1).cpu())  # [B, n]
    cases = [case or "prompts" for case in prompts.cases]
    by_feature: dict[str, dict[str, list[float]]] = {}
    for site, index in features.items():
        for feature, column in zip(index.tolist(), torch.cat(peaks[site]).T.tolist(), strict=True):
            by_case: dict[str, list[float]] = {case: [] for case in dict.fromkeys(cases)}
            for case, peak in zip(cases, column, strict=True):
                by_case[case].append(float(f"{peak:.4g}"))
            by_feature[f"{site.name}/{feature}"] = by_case
    return by_feature


def _by_case(means: list[float], counts: list[float], cases: list[str], spans: tuple[str, ...]) -> ActivityByCase:
    rows = {
        case: {
            span: round(means[row * len(spans) + column], 6)
            for column, span in enumerate(spans)
            if counts[row * len(spans) + column]
        }
        for row, case in enumerate(cases)
    }
    return {case or "prompts": by_span for case, by_span in rows.items()}
