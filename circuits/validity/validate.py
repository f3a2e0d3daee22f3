"""How far to trust a circuit: a verdict a line, each with its number and its interval.

1. Faithfulness of the n strongest nodes, over all prompts and prompt by prompt (`circuits.faithfulness.nodes`).
2. Other samples of the prompts: overlap of the circuits of bootstrap resamples (`circuits.validity.overlap`).
3. Families of prompts, and whether the circuit of one stands for the others (`circuits.validity.families`).
4. Backups that take over when the strongest nodes are ablated (`circuits.validity.backups`).
5. How right the effects are: the sum check of the discovery, and exact patching of the strongest
   (`circuits.uncertainty.verification`).
6. Where they are given: prompts in other words, other autoencoders (`circuits.validity.elsewhere`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.attribution.activations import Setting
from circuits.attribution.nodes import Nodes, count, ranked, select_nodes
from circuits.circuit import Circuit
from circuits.discovery.metadata import ADDS_UP, MEAN_RESIDUAL
from circuits.faithfulness.nodes import (
    behaviour_of,
    from_start_site,
    metrics_of_sets,
    set_up,
    share_intervals,
    shares,
)
from circuits.metrics.metrics import Metric
from circuits.options import ValidityOptions
from circuits.prompts.dataset import PromptSet
from circuits.uncertainty.bootstrap import MIN_GROUPS, Bootstrap, group_sums, what_is_drawn
from circuits.uncertainty.intervals import strongest_values
from circuits.uncertainty.verification import Verification, verify
from circuits.validity import checks
from circuits.validity.backups import effects_without, grown, named_nodes, next_strongest, together
from circuits.validity.elsewhere import in_other_saes, on_paraphrases, shared_saes
from circuits.validity.families import find_families
from circuits.validity.overlap import Interval, NodeValues, resample_overlap
from circuits.validity.results import Backups, Check, Families, PromptSpread, Validity, WorstPrompt
from sae.autoencoder import SparseAutoencoder
from sae.model.sites import Site

WORST = 10
"""Prompts that are listed."""
LEAST_BEHAVIOUR = 0.1
"""Prompts whose metric ablation moves by less than this share of the mean have no faithfulness of their own."""


def validate(
    circuit: Circuit,
    prompts: PromptSet | None = None,
    options: ValidityOptions | None = None,
    *,
    reference: PromptSet | None = None,
    paraphrases: PromptSet | None = None,
    other_saes: Mapping[Site, SparseAutoencoder] | None = None,
    metric: str | Metric | None = None,
    progress: bool = True,
) -> Validity:
    """Put a circuit to the test: other samples, families of prompts, backups, single prompts, exact patching.

    Args:
        circuit: The circuit, whose model, SAEs and metric are used.
        prompts: What faithfulness and backups are measured on, best held out; those it was found on by default.
        options: Size of the circuit, what ablated nodes become, how much is tried.
        reference: Prompts whose means or values ablated nodes take; those the circuit was found on by default.
        paraphrases: The same behaviour in other words.
        other_saes: Other autoencoders of the same model, of another seed for example.
        metric: The circuit's own, given again where it is Python code and the circuit is from a file.
        progress: Whether to show progress bars.

    Returns:
        A verdict a line with its number, its 95 % interval and the bar it is held against, and the tables behind them.

    Raises:
        UserError: If no node has an effect from the start site on, ablating every node changes nothing, or prompts or
            autoencoders do not fit the circuit.
    """
    options = options or ValidityOptions()
    study = _Study.of(circuit, prompts, options, reference, metric, progress)
    if paraphrases is not None:
        next(iter(study.nodes.values())).where(paraphrases)  # whether they have its spans is told before any work
    if other_saes is not None:
        shared_saes(circuit, other_saes, options)  # and whether these fit
    measured, spread = study.faithfulness()
    families, of_families = study.families()
    backups, of_backups = study.backups()
    lines = [*measured, study.resamples(), of_families, of_backups, study.sums(), *study.exact()]
    if paraphrases is not None:
        in_other_words = on_paraphrases(circuit, paraphrases, options, metric=study.setting.metric, progress=progress)
        lines.append(checks.paraphrases(in_other_words))
    if other_saes is not None:
        of_others = in_other_saes(circuit, other_saes, options, metric=study.setting.metric, progress=progress)
        lines.append(checks.other_saes(of_others))
    drawn = what_is_drawn(study.prompts.groups)
    return Validity(lines, count(study.strongest), len(study.prompts), drawn, families, backups, spread)


@dataclass(frozen=True)
class _Study:
    """The measurements that the checks of a circuit share."""

    circuit: Circuit
    setting: Setting
    metric: str | Metric | None  # as it was given
    options: ValidityOptions
    nodes: Nodes  # with an effect, from the start site on
    prompts: PromptSet  # measured on
    reference: PromptSet
    candidates: Nodes  # of which effects on every prompt of the discovery are looked at
    values: NodeValues
    progress: bool

    @staticmethod
    def of(
        circuit: Circuit, prompts: PromptSet | None, options: ValidityOptions, reference: PromptSet | None,
        metric: str | Metric | None, progress: bool,
    ) -> _Study:  # fmt: skip
        setting, found_on = circuit.setting(metric), circuit.prompts
        n_examples = circuit.metadata["n_examples"]
        every = from_start_site(circuit.nodes, options.start_site, errors=options.errors)
        nodes, tested, keyed, _ = set_up(
            setting, circuit.nodes, found_on if prompts is None else prompts,
            found_on if reference is None else reference, options,
        )  # fmt: skip
        candidates, values = strongest_values(circuit.effects, every, n_examples)
        names = [name for site, of_site in candidates.items() for name in of_site.ids(site)]
        groups = torch.arange(n_examples) if circuit.groups is None else circuit.groups
        of_prompts = NodeValues(names, values, groups)
        return _Study(circuit, setting, metric, options, nodes, tested, keyed, candidates, of_prompts, progress)

    @property
    def strongest(self) -> Nodes:
        """The circuit that is tested."""
        return select_nodes(self.nodes, top=self.options.nodes)

    @property
    def bootstrap(self) -> Bootstrap:
        return Bootstrap(resamples=self.options.resamples, seed=self.options.seed)

    def measure(self, sets: Sequence[tuple[Nodes, bool]]) -> Tensor:
        """m [2 + sets, B] of the whole model, no node, and every set (nodes, whether kept or removed)."""
        return metrics_of_sets(
            self.setting, sets, self.prompts, self.options, nodes=self.nodes, reference=self.reference,
            seed=self.options.seed, batch_size=self.options.batch_size, progress=self.progress,
        )  # fmt: skip

    def with_intervals(self, m: Tensor) -> list[tuple[float, Interval | None]]:
        """Share of the behaviour of every set with its interval."""
        bounds = share_intervals(m, self.prompts.groups, self.bootstrap).tolist()
        values = shares(m.mean(1)).tolist()
        return [(f, (low, high) if low == low else None) for f, (low, high) in zip(values, bounds, strict=True)]

    def faithfulness(self) -> tuple[list[Check], PromptSpread]:
        """Faithfulness of the circuit, over all prompts and prompt by prompt."""
        m = self.measure([(self.strongest, True), (self.strongest, False)])
        behaviour_of(m)
        (f, interval), (left, _) = self.with_intervals(m)
        spread, explained = _spread(m, self.prompts)
        told = ~explained.isnan()
        groups, half = self.prompts.groups[told], (explained[told] >= checks.EXPLAINED).float()
        sums = group_sums(torch.stack([half, torch.ones_like(half)], 1), groups.unique(return_inverse=True)[1])
        low, high = self.bootstrap.intervals(sums[:, :1], sums[:, 1])[0].tolist()
        share = float(half.mean()) if len(half) else float("nan")
        return [
            checks.faithfulness(f, interval, left, count(self.strongest)),
            checks.prompts(share, (low, high) if low == low else None, spread),
        ], spread

    def resamples(self) -> Check:
        """Overlap of the circuits of other samples of the prompts."""
        overlap = resample_overlap(self.values, self.options.nodes, self.bootstrap)
        return checks.resamples(overlap, len(self.values.groups.unique()), MIN_GROUPS, self.options.nodes)

    def families(self) -> tuple[Families, Check]:
        """Families of prompts."""
        transfer = find_families(
            self.setting, self.candidates, self.values, self.circuit.prompts, self.options, progress=self.progress
        )
        return transfer.families, checks.families(transfer)

    def backups(self) -> tuple[Backups, Check]:
        """Effects of the other nodes without the strongest."""
        options = self.options
        removed = select_nodes(self.nodes, top=options.removed)
        before, after = effects_without(
            self.setting, removed, self.nodes, self.prompts, self.reference, options,
            self.circuit.metadata["options"]["aggregation"],
        )  # fmt: skip
        scale = self.circuit.metadata["total_effect"] or sum(float(of.effect.sum()) for of in before.values())
        rows = grown(before, after, removed, scale=scale, most=options.removed)
        named = named_nodes(after, {name for name, _, _ in rows})
        sets = [removed, together(removed, named), together(removed, next_strongest(self.nodes, removed, len(rows)))]
        m = self.measure([(chosen, False) for chosen in (sets if rows else sets[:1])])
        (left, interval), *others = self.with_intervals(m)
        without_backups, without_next = (value for value, _ in others) if rows else (None, None)
        backups = Backups(
            removed=count(removed),
            names=[name for name, _, _ in rows],
            before=[effect for _, effect, _ in rows],
            after=[effect for _, _, effect in rows],
            left=left,
            left_without_backups=without_backups,
            left_without_next=without_next,
        )
        return backups, checks.backups(backups, interval)

    def sums(self) -> Check:
        """The sum check of the discovery."""
        metadata = self.circuit.metadata
        return checks.sum_check(metadata, adds_up=metadata["options"].get("method") in ADDS_UP, bar=MEAN_RESIDUAL)

    def exact(self) -> list[Check]:
        """The strongest nodes patched exactly, as discovery noted or now."""
        n, circuit = self.options.verify, self.circuit
        noted = circuit.metadata.get("verification", {}).get("nodes", {})
        if noted:
            effects = dict(ranked(circuit.nodes))
            names = [name for name in noted if name in effects]
            exact = [noted[name]["exact_effect"] for name in names]
            shared = circuit.metadata["options"].get("method") in ADDS_UP
            return [checks.exact(Verification(names, [effects[name] for name in names], exact, shared=shared))]
        if not n:
            return []
        return [checks.exact(verify(circuit, nodes=n, metric=self.metric, progress=self.progress))]


def _spread(m: Tensor, prompts: PromptSet) -> tuple[PromptSpread, Tensor]:
    """Faithfulness prompt by prompt from m [3, B]: quartiles, the worst prompts, and all of it [B], NaN where ablation
    changes a prompt's metric too little.
    """
    behaviour = m[0] - m[1]
    small = behaviour.abs() < LEAST_BEHAVIOUR * behaviour.abs().mean()
    explained = torch.where(small, torch.nan, (m[2] - m[1]) / behaviour.masked_fill(small, 1.0))
    order = [row for row in explained.argsort().tolist() if not small[row]]
    worst = [WorstPrompt(prompts.texts[row], prompts.cases[row], float(explained[row])) for row in order[:WORST]]
    quantiles = torch.tensor([0.25, 0.5, 0.75], dtype=explained.dtype)
    quartiles = torch.quantile(explained[~small], quantiles).tolist() if order else []
    return PromptSpread(quartiles, worst, int(small.sum())), explained
