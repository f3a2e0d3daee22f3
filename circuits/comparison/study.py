"""One dictionary on the training prompts of a comparison: what every method makes of them, and what is exact.

1. `Study.ranking`: the nodes by a method's effects, or by a learned mask, with the time and memory they took.
2. `Study.truth`: effects of sites patched whole, and of a sample of nodes patched one by one.
3. `agreement`: how a ranking correlates with the exact effects of the sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr

from circuits.attribution.activation_patching import exact_effects
from circuits.attribution.activations import ActivationPair, Setting, capture_activations, site_total_effect
from circuits.attribution.baselines import activation_difference
from circuits.attribution.effects import SiteEffects
from circuits.attribution.ensemble import combined_nodes, ensemble_weights, weighted_effects
from circuits.attribution.node_effects import Attribution, attribute
from circuits.attribution.nodes import Nodes, aggregate, count, joined
from circuits.comparison.options import EDGE_MASK, MASK_EQUAL, MASKS, SIGNS, CompareOptions
from circuits.comparison.results import MEAN, NOISING, Agreement
from circuits.discovery.batching import DiscoveryRun
from circuits.discovery.discover import discover
from circuits.faithfulness.edge_mask import learn_edge_mask
from circuits.faithfulness.learned_mask import learn_node_mask
from circuits.faithfulness.nodes import random_nodes
from circuits.metrics.metrics import warn_if_cancelling
from circuits.options import DiscoverOptions, MaskOptions, members
from circuits.prompts.dataset import PromptSet
from circuits.uncertainty.bootstrap import Bootstrap
from circuits.uncertainty.signs import consistent_first
from sae._peak_memory import peak_memory
from sae.model.sites import Site

MEMORY_PROMPTS = 16
"""Prompts in the batch on which memory is counted."""


@dataclass(frozen=True)
class Ranking:
    """Nodes as a method ranks them, and what that took."""

    nodes: Nodes
    """With the method's effects; of a mask with what falls with the rank."""
    seconds: float
    """Time on all training prompts."""
    peak_bytes: int
    """Tensors alive at once on a batch of `MEMORY_PROMPTS` prompts."""
    path_nodes: float | None
    """Gradient evaluations per prompt and site where the method goes site by site."""


@dataclass(frozen=True)
class Truth:
    """Measurements that all methods of a dictionary are held against, made once."""

    totals: dict[Site, float]  # m(the site alone patched) - m(clean), mean over prompts
    scale: float  # |total effect|
    sample: Nodes  # nodes patched exactly: some features and all errors
    exact: dict[str, torch.Tensor]  # by quantity: effects of the sampled nodes [n]


class Study:
    """One dictionary on the training prompts."""

    def __init__(self, setting: Setting, prompts: PromptSet, options: CompareOptions) -> None:
        self.setting, self.prompts, self.options = setting, prompts, options
        self.run = DiscoveryRun(setting, prompts, DiscoverOptions(memory=options.memory))
        self.sites, self.rows = self.run.sites, self.run.rows
        self._rankings: dict[str, Ranking] = {}
        self._site_effects: dict[str, dict[Site, SiteEffects]] = {}  # of every prompt, by method

    def batches(self) -> Iterator[tuple[torch.Tensor, ActivationPair]]:
        """Index [B] and both ends of every batch, prompts of like length together."""
        for index in self.run.batches():
            yield index, capture_activations(self.setting, self.prompts[index])

    def ranking(self, method: str) -> Ranking:
        """The method's effects over all training prompts, computed once."""
        if method not in self._rankings:
            self._rankings[method] = self._rank(method)
        return self._rankings[method]

    def _rank(self, method: str) -> Ranking:
        if method in MASKS:
            return self._edge_mask() if method == EDGE_MASK else self._mask(from_nothing=method == MASK_EQUAL)
        if method.startswith(SIGNS):
            return self._by_signs(method.removeprefix(SIGNS))
        return self._effects(method) if len(members(method)) == 1 else self._ensemble(members(method))

    def _by_signs(self, method: str) -> Ranking:
        """Nodes that keep their sign first."""
        start, begin = self.ranking(method), time.perf_counter()
        bootstrap = Bootstrap(resamples=max(self.options.resamples, 100), seed=self.options.seed)
        weights = ensemble_weights([self.ranking(name).nodes for name in members(method)])
        effects = weighted_effects([self._site_effects[name] for name in members(method)], weights)
        nodes = consistent_first(effects, start.nodes, groups=self.prompts.groups, bootstrap=bootstrap)
        return replace(start, nodes=nodes, seconds=start.seconds + time.perf_counter() - begin)

    def _ensemble(self, names: Sequence[str]) -> Ranking:
        """The mean of the normalised effects of several methods, which takes the time of all of them."""
        rankings = [self.ranking(name) for name in names]
        seconds = sum(ranking.seconds for ranking in rankings)
        peak_bytes = max(ranking.peak_bytes for ranking in rankings)
        return Ranking(combined_nodes([ranking.nodes for ranking in rankings]), seconds, peak_bytes, None)

    def _effects(self, method: str) -> Ranking:
        by_batch: dict[Site, list[SiteEffects]] = {site: [] for site in self.sites}
        path_nodes: list[float] = []
        start = time.perf_counter()
        for index, states in self.batches():
            result = self.attribute(states, method)
            for site, effects in result.effects.items():
                by_batch[site].append(effects.relabel_examples(index))
            if result.path_nodes:
                path_nodes.append(sum(result.path_nodes.values()) / len(result.path_nodes) * len(index))
        seconds = time.perf_counter() - start
        states = capture_activations(self.setting, self._few)
        peak = peak_memory(lambda: self.attribute(states, method), self.setting.model.device)
        per_prompt = sum(path_nodes) / len(self.prompts) if path_nodes else None
        self._site_effects[method] = {site: SiteEffects.concatenate(of_site) for site, of_site in by_batch.items()}
        return Ranking(self.aggregated(by_batch), seconds, peak, per_prompt)

    @property
    def _learning(self) -> MaskOptions:
        """How masks are learned."""
        options = self.options
        return MaskOptions(
            steps=options.mask_steps, start_site=options.start_site, errors=options.errors,
            ablation=options.ablation, batch_size=min(MaskOptions.batch_size, self.rows), seed=options.seed,
        )  # fmt: skip

    def _edge_mask(self) -> Ranking:
        """Nodes by when the edges that a mask keeps join them to the metric, the others behind them by effect."""
        setting, options = self.setting, self.options
        begin = time.perf_counter()
        circuit = discover(
            setting.model, setting.saes, self.prompts, metric=setting.metric, method=options.mask_start,
            rule=options.rule, steps=options.steps, residual=options.residual, memory=options.memory,
            edge_nodes=options.mask_edge_nodes, progress=False,
        )  # fmt: skip
        mask = learn_edge_mask(circuit, options=self._learning, progress=False)
        seconds = time.perf_counter() - begin
        few = replace(circuit, source=replace(circuit.source, prompts=self._few))
        short = replace(self._learning, steps=1, batch_size=len(self._few))
        peak = peak_memory(lambda: learn_edge_mask(few, options=short, progress=False), setting.model.device)
        return Ranking(_before_others(mask.nodes, circuit.nodes), seconds, peak, None)

    def _mask(self, *, from_nothing: bool) -> Ranking:
        start = self.ranking(self.options.mask_start)
        learning = replace(self._learning, start="equal" if from_nothing else "effects")

        def learn(prompts: PromptSet, learning: MaskOptions) -> Nodes:
            return learn_node_mask(
                self.setting, start.nodes, prompts, learning, reference=self.prompts, progress=False
            ).nodes

        begin = time.perf_counter()
        nodes = learn(self.prompts, learning)
        seconds = time.perf_counter() - begin + start.seconds
        short = replace(learning, steps=1, batch_size=len(self._few))
        peak = peak_memory(lambda: learn(self._few, short), self.setting.model.device)
        return Ranking(nodes, seconds, max(peak, start.peak_bytes), None)

    @property
    def _few(self) -> PromptSet:
        """The batch on which memory is counted."""
        return self.prompts[: min(MEMORY_PROMPTS, self.rows)]

    def attribute(self, states: ActivationPair, method: str) -> Attribution:
        """The method's effects of one batch, by the passes it uses itself."""
        options = self.options
        return attribute(
            states, method=method, rule=options.rule, steps=options.steps, residual=options.residual,
            max_rows=self.rows, seed=options.seed, totals=False, gradients=False,
        )  # fmt: skip

    def aggregated(self, by_batch: Mapping[Site, Sequence[SiteEffects]]) -> Nodes:
        """Nodes from the effects of all batches."""
        effects = {site: SiteEffects.concatenate(of_site) for site, of_site in by_batch.items()}
        return aggregate(effects, n_examples=len(self.prompts), n_positions=self.prompts.clean.n_positions)

    def truth(self) -> Truth:
        """Site totals, and exact effects of a sample of nodes."""
        n, sites = len(self.prompts), self.sites
        totals, deltas = dict.fromkeys(sites, 0.0), []
        live: dict[Site, list[SiteEffects]] = {site: [] for site in sites}
        for _, states in self.batches():
            for site in sites:
                totals[site] += site_total_effect(states, site=site).sum().item() / n
                live[site].append(activation_difference(states, site=site))
            if states.m_patch is not None:
                deltas.append(states.m_patch - states.m_clean)
        if deltas:
            warn_if_cancelling(self.setting.metric, torch.cat(deltas))
        scale = abs(sum(delta.sum().item() / n for delta in deltas)) or max(abs(value) for value in totals.values())
        generator = torch.Generator().manual_seed(self.options.seed)
        nodes = self.aggregated(live)
        features = {site: of_site[of_site.is_feature] for site, of_site in nodes.items()}
        drawn = random_nodes(features, min(self.options.sample, count(features)), generator=generator)
        if not self.options.sample:
            return Truth(totals, scale, drawn, {})
        errors = {site: of_site[of_site.is_error] for site, of_site in nodes.items()}
        sample = {site: joined(drawn[site], errors[site]) for site in sites}
        return Truth(totals, scale, sample, self._exact(sample))

    def _exact(self, sample: Nodes) -> dict[str, torch.Tensor]:
        """Exact effects of the sampled nodes, mean over prompts: noising, and where there are pairs the mean of
        noising and denoising.
        """
        paired = self.prompts.patch is not None
        sums = {
            site: torch.zeros(1 + paired, nodes.n_features + 2, dtype=torch.float64) for site, nodes in sample.items()
        }
        for _, states in self.batches():
            directions = [(states, 1), (states.reversed(), -1)] if paired else [(states, 1)]
            for site, nodes in sample.items():
                for row, (start, sign) in enumerate(directions):
                    effects = exact_effects(
                        start, site=site, positions=None, features=nodes.feature, max_rows=self.rows
                    )
                    sums[site][row, : effects.n_nodes] += sign * effects.summed(1).double()
        exact = torch.cat([sums[site][:, nodes.feature] for site, nodes in sample.items()], 1) / len(self.prompts)
        return {NOISING: exact[0], **({MEAN: exact.mean(0)} if paired else {})}


def _before_others(first: Nodes, nodes: Nodes) -> Nodes:
    """All nodes by rank: those of `first` with an effect, largest first, then the others by their own |effect|."""
    rows = []  # of every node: its effect in `first`, and its own
    for site, of_site in nodes.items():
        in_first = torch.zeros(of_site.n_features + 2)
        if site in first:
            in_first[first[site].feature] = first[site].effect
        rows.append(torch.stack([in_first[of_site.feature], of_site.effect.abs()]))
    given, alone = torch.cat(rows, dim=1).double()
    key = torch.where(given > 0, 1 + given, alone / (1 + alone.max()))
    rank = torch.empty(len(key))
    rank[key.argsort(descending=True, stable=True)] = torch.arange(len(key), 0, -1) / len(key)
    by_site = rank.split([len(of_site) for of_site in nodes.values()])
    return {
        site: replace(of_site, effect=effect) for (site, of_site), effect in zip(nodes.items(), by_site, strict=True)
    }


def agreement(nodes: Nodes, truth: Truth, *, unsigned: bool) -> dict[str, Agreement]:
    """Correlation of the method's effects with each exact quantity over the sampled nodes."""
    if not truth.exact:
        return {}
    kinds = [torch.cat([getattr(of, name) for of in truth.sample.values()]) for name in ("is_feature", "is_error")]
    estimated = []
    for site, sample in truth.sample.items():
        effect = torch.zeros(sample.n_features + 2, dtype=torch.float64)
        effect[nodes[site].feature] = nodes[site].effect.double()
        estimated.append(effect[sample.feature])
    x = torch.cat(estimated)
    agreements = {}
    for quantity, exact in truth.exact.items():
        y = exact.abs() if unsigned else exact
        (f, g), (e, h) = ((x[chosen].numpy(), y[chosen].numpy()) for chosen in kinds)
        of_errors = correlation(pearsonr, e, h) if len(e) > 2 else None
        agreements[quantity] = Agreement(correlation(pearsonr, f, g), correlation(spearmanr, f, g), of_errors)
    return agreements


def correlation(measure: Callable[..., Any], x: np.ndarray, y: np.ndarray) -> float:
    """`pearsonr` or `spearmanr` of x and y, [n] each; 0 where one of them does not vary."""
    varies = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
    return float(measure(x, y).statistic) if varies else 0.0
