"""Backups: nodes that do the work once the strongest nodes are gone, and that a circuit of effects therefore misses.

After "CoAx" (arXiv 2607.01940), where the growth of a unit's effect after a primary set is removed finds the backup
heads of GPT-2 that single ablations miss.

1. Ablate the n strongest nodes in the clean and in the patch run alike: at the same values, those of the clean prompt.
2. Attribution patching from the one run to the other: effects of all nodes with the strongest gone, beside the same
   with nothing ablated. What grows, in the direction of the behaviour, may be a backup.
3. What is left of the behaviour without the strongest is the completeness gap. Measured again without the nodes that
   grow most as well, and, for comparison, without as many of the next strongest: backups close the gap, others do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuits.attribution.activations import ActivationPair, Setting, nothing, with_reads
from circuits.attribution.effects import SiteEffects
from circuits.attribution.feature_effects import contract
from circuits.attribution.nodes import Nodes, aggregate, joined, ranked
from circuits.faithfulness.ablation import AblationValues, ablation_edits
from circuits.faithfulness.optimal_ablation import ablation_values
from circuits.options import Aggregation, ValidityOptions
from circuits.prompts.dataset import PromptSet
from sae.model.forward import with_gradients
from sae.model.hook_points import SiteEdit
from sae.model.sites import Site

LEAST_GROWTH = 0.01
"""Growth, as a share of the total effect, below which a node is no backup."""


@with_gradients
def effects_without(
    setting: Setting, removed: Nodes, nodes: Nodes, prompts: PromptSet, reference: PromptSet,
    options: ValidityOptions, aggregation: Aggregation,
) -> tuple[Nodes, Nodes]:  # fmt: skip
    """Effects by attribution patching with nothing ablated, and with the nodes `removed` ablated in both runs."""
    values = ablation_values(
        setting, options.ablation, [(removed, False)], nodes=nodes, named=[removed], reference=reference,
        seed=options.seed, batch_size=options.batch_size, progress=False,
    )  # fmt: skip
    spans = next(iter(nodes.values())).spans
    by_site: list[dict[Site, list[SiteEffects]]] = [{site: [] for site in nodes} for _ in range(2)]
    rows = torch.arange(len(prompts))
    for index in rows.split(options.batch_size):
        batch = prompts[index]
        for effects, ablated in zip(by_site, (None, removed), strict=True):
            states, gradients = _run_both(setting, batch, list(nodes), values, ablated)
            positions = None if aggregation == "sum" else batch.positions(spans)
            for site, gradient in gradients.items():
                of_site = contract(states, gradient, site=site)[0]
                if positions is not None:
                    of_site = of_site.at_positions(positions, states.tokens.lengths)
                effects[site].append(of_site.relabel_examples(index))
    before, after = (
        aggregate(
            {site: SiteEffects.concatenate(of_batches) for site, of_batches in effects.items()},
            n_examples=len(prompts), n_positions=prompts.clean.n_positions, aggregation=aggregation, spans=spans,
        )
        for effects in by_site
    )  # fmt: skip
    return before, after


def _run_both(
    setting: Setting, batch: PromptSet, sites: list[Site], values: AblationValues, removed: Nodes | None
) -> tuple[ActivationPair, dict[Site, Tensor]]:
    """The clean and the patch run of a batch with these nodes at the same ablation values in both, and dm/dx at the
    clean one.
    """
    edits: dict[Site, SiteEdit] = {}
    if removed is not None:
        edits = ablation_edits(setting.saes, values.table, removed, values(batch), batch, keep=False)
    model, with_read_sites = setting.model, with_reads(setting, sites)
    with torch.enable_grad():
        run = model.run(batch.clean, capture=with_read_sites, edits=edits, last_only=True, grad=True)
        m = setting.metric(run.logits[:, -1], batch)
        gradients = run.gradients(m.sum(), sites)
    clean = {site: x.detach() for site, x in run.activations.items()}
    by_site = dict(zip(sites, gradients, strict=True))
    if batch.patch is None:
        patch = nothing(setting, clean)
        return ActivationPair(setting, batch, clean, patch, True, m.detach(), None), by_site
    with torch.no_grad():
        patched = model.run(batch.patch, capture=with_read_sites, edits=edits, last_only=True)
        m_patch = setting.metric(patched.logits[:, -1], batch)
    return ActivationPair(setting, batch, clean, patched.activations, False, m.detach(), m_patch), by_site


def grown(before: Nodes, after: Nodes, removed: Nodes, *, scale: float, most: int) -> list[tuple[str, float, float]]:
    """(name, effect before, effect after) of nodes whose effect grows, the most first.

    Args:
        before, after: nodes with their effects.
        removed: nodes that were ablated and are no backups of themselves.
        scale: the total effect, whose sign is the direction of the behaviour.
        most: how many at most.
    """
    effects = [_by_name(nodes) for nodes in (before, after)]
    gone = set(_by_name(removed))
    rows = [(name, effects[0].get(name, 0.0), value) for name, value in effects[1].items() if name not in gone]
    sign = 1.0 if scale >= 0 else -1.0

    def growth(row: tuple[str, float, float]) -> float:
        return sign * row[2] - max(sign * row[1], 0.0)

    rows = [row for row in rows if growth(row) > LEAST_GROWTH * abs(scale)]
    return sorted(rows, key=growth, reverse=True)[:most]


def _by_name(nodes: Nodes) -> dict[str, float]:
    return dict(ranked(nodes))


def named_nodes(nodes: Nodes, names: set[str]) -> Nodes:
    """The nodes of these names."""
    return {
        site: of_site[torch.tensor([name in names for name in of_site.ids(site)], dtype=torch.bool)]
        for site, of_site in nodes.items()
    }


def together(first: Nodes, second: Nodes) -> Nodes:
    """The nodes of both, which have the same sites."""
    return {site: joined(first[site], second[site]) for site in first}


def next_strongest(nodes: Nodes, removed: Nodes, n: int) -> Nodes:
    """The n strongest nodes that are not removed."""
    gone = set(_by_name(removed))
    left = [name for name, _ in ranked(nodes) if name not in gone]
    return named_nodes(nodes, set(left[:n]))
