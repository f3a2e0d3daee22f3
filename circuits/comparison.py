"""Node methods side by side: how good the circuits they rank are on held-out prompts, and what they cost.

For every method, on the autoencoders' features and, for some, on neurons:

1. Effects on the training prompts, timed; the tensors alive at once are counted on one batch.
2. Faithfulness and completeness of the strongest nodes over circuit sizes on the held-out prompts, ablation values from
   the training prompts; the areas CPR and CMD (Mueller et al. 2025); the sizes at which faithfulness first reaches .8
   and .95, between measured sizes by interpolation in log size.
3. Pearson and Spearman correlation with exact patching, on a random sample of the features that differ between clean
   and patch; Pearson on the error nodes by themselves, few and large as they are. Two exact quantities: *noising* sets
   one node to its patch value in the clean run, *denoising* restores its clean value in the patch run (with the sign
   turned). `ESTIMATES` says which of them a method estimates.
4. The completeness residual: |sum of a site's effects - m(the site alone patched) + m(clean)| / |total effect|, mean
   over sites, with effects averaged over examples first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from tqdm import tqdm

from circuits.attribution import METHODS, SiteEffects, States, attribute, capture_states
from circuits.attribution.baselines import activation_difference
from circuits.attribution.exact import exact_effects
from circuits.attribution.gradients import RULES, site_total_effect
from circuits.behaviour import Metric, get_metric, prepare
from circuits.correlation import pearson, spearman
from circuits.faithfulness import Faithfulness, FaithfulnessOptions, measure_faithfulness, random_nodes
from circuits.memory import peak_memory
from circuits.nodes import Nodes, SiteNodes, aggregate_site, count
from circuits.passes import max_rows
from circuits.prompts import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError, unknown
from sae.model import LanguageModel
from sae.neurons import NEURONS, neuron_dictionaries
from sae.sites import Site, select_sites
from sae.streaming import subset

NOISING, MEAN = "noising", "mean"
ESTIMATES = {
    "ig": MEAN, "ig-adaptive": MEAN, "ig-inputs": MEAN,
    "attrib": NOISING, "relp": NOISING, "graddrop": NOISING, "exact": NOISING,
}  # fmt: skip
"""Exact quantity each method estimates: noising, or the mean of noising and denoising. Baselines estimate none."""
UNSIGNED = ("activation-difference",)
"""Methods whose effects have no sign: compared with the magnitude of the exact effect."""
LEVELS = (0.8, 0.95)
GRID = 1.6
"""Largest ratio between neighbouring circuit sizes."""
SAES = "saes"
MEMORY_PROMPTS = 16
"""Prompts in the batch on which memory is counted."""


@dataclass(frozen=True)
class CompareOptions:
    """What is compared, and how circuits are scored."""

    methods: str = "ig,ig-adaptive,ig-inputs,attrib,relp,graddrop,activation-difference,random"
    """Node methods, comma-separated; exact is one as well."""
    neurons: str = "ig"
    """Methods that are also run on neurons; none for an empty text."""
    sizes: str = "10,20,50,100,200,500"
    """Circuit sizes of the table; the curve is measured in between and up to all nodes."""
    sample: int = 1000
    """Features of each dictionary patched exactly, drawn at random from those that differ; 0 for no correlations."""
    rule: str = "midpoint"
    """Quadrature of ig and ig-inputs."""
    steps: int = 10
    """Quadrature nodes of ig and ig-inputs."""
    residual: float = 0.003
    """Completeness error ig-adaptive goes down to."""
    metric: str = "logit_difference"
    """What is explained."""
    sites: str = "all"
    """Sites of the circuits."""
    start_site: str | None = None
    """First site that is ablated; everything before is given for free."""
    ablation: str = "mean"
    """What ablated nodes become: mean, optimal, counterfactual, resample, zero or mean-pooled."""
    errors: str = "nodes"
    """Errors of the autoencoders: nodes, keep or ablate."""
    seed: int = 0
    """Seed of the sample and of random circuits."""
    resamples: int = 1000
    """Times the held-out prompts are drawn anew for 95 % intervals of CPR and CMD; 0 leaves them out."""
    memory: float = 2.0
    """Budget in GiB for a forward and backward pass."""

    def __post_init__(self) -> None:
        for method in [*split(self.methods), *split(self.neurons)]:
            if method not in METHODS:
                raise unknown("method", method, METHODS)
        if not split(self.methods) and not split(self.neurons):
            raise UserError(f"methods is empty: give some of {', '.join(METHODS)}")
        if self.rule not in RULES:
            raise unknown("rule", self.rule, RULES)
        for name, least in (("sample", 0), ("resamples", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        self.circuit_sizes  # noqa: B018

    @property
    def circuit_sizes(self) -> list[int]:
        """Sizes of the table."""
        words = split(self.sizes)
        if not words or not all(word.isdigit() and int(word) for word in words):
            raise UserError(f"sizes {self.sizes!r}: expected positive whole numbers separated by commas, such as 10,20")
        return sorted({int(word) for word in words})


@dataclass(frozen=True)
class Agreement:
    """Correlation with one exact quantity."""

    pearson: float
    """Linear correlation over the sampled features."""
    spearman: float
    """Correlation of their ranks."""
    errors: float | None
    """Linear correlation over the error nodes; None where there are fewer than three."""


@dataclass(frozen=True)
class MethodScore:
    """One row of the comparison."""

    method: str
    """Node method."""
    dictionary: str
    """saes or neurons."""
    estimates: str | None
    """Exact quantity the method estimates: noising, mean (of noising and denoising) or None."""
    agreement: dict[str, Agreement]
    """Correlations by exact quantity; empty where nothing was sampled."""
    residual: float
    """Completeness residual, mean over sites."""
    path_nodes: float | None
    """Gradient evaluations per prompt and site where the method goes site by site."""
    nodes_for: dict[str, float | None]
    """Nodes needed for faithfulness .8 and .95; None where it is not reached."""
    seconds: float
    """Time for the effects on all training prompts."""
    peak_bytes: int
    """Tensors alive at once on a batch of `MEMORY_PROMPTS` prompts."""
    curve: Faithfulness
    """Faithfulness and completeness on the held-out prompts."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        curve = self.curve.to_dict()
        kept = ("sizes", "faithfulness", "completeness", "n_nodes", "cpr", "cmd", "m_model", "m_empty")
        row = asdict(self)
        known = self.curve.intervals
        row["intervals"] = None if known is None else {"cpr": known.cpr, "cmd": known.cmd}
        return {**{name: row[name] for name in row if name != "curve"}, **{name: curve[name] for name in kept}}


@dataclass(frozen=True)
class Comparison:
    """All methods beside each other."""

    rows: list[MethodScore]
    """One a method and dictionary."""
    options: CompareOptions
    """How it was made."""
    n_train: int
    """Prompts the circuits were found on."""
    n_test: int
    """Held-out prompts they were scored on."""
    sampled: dict[str, int] = field(default_factory=dict)
    """Features patched exactly, by dictionary."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "schema_version": 1,
            "options": asdict(self.options),
            "n_train": self.n_train,
            "n_test": self.n_test,
            "sampled": self.sampled,
            "rows": [row.to_dict() for row in self.rows],
        }


def compare_methods(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    train: PromptSet,
    test: PromptSet,
    options: CompareOptions | None = None,
    *,
    progress: bool = True,
) -> Comparison:
    """Every method of the options, found on `train` and scored on `test`."""
    options = options or CompareOptions()
    m = get_metric(options.metric)
    train, test = prepare(train, model, m), prepare(test, model, m)
    sites = select_sites(options.sites, list(saes))
    plan: list[tuple[str, Mapping[Site, SparseAutoencoder], list[str]]] = []
    if methods := split(options.methods):
        plan.append((SAES, subset(saes, sites), methods))
    if methods := split(options.neurons):
        plan.append((NEURONS, neuron_dictionaries(model, sites=sites), methods))
    rows, sampled = [], {}
    with tqdm(total=sum(len(methods) for *_, methods in plan), desc="methods", disable=not progress) as bar:
        for name, dictionary, methods in plan:
            study = _Study(model, dictionary, train, m, options)
            truth = study.truth()
            sampled[name] = sum(int((~nodes.is_error).sum()) for nodes in truth.sample.values())
            for method in methods:
                bar.set_postfix_str(f"{method} on {name}")
                rows.append(_score(study, truth, test, method, name))
                bar.update()
    return Comparison(rows, options, len(train), rows[0].curve.n_prompts, sampled)


@dataclass(frozen=True)
class _Truth:
    """What was measured once for a dictionary."""

    totals: dict[Site, float]  # m(the site alone patched) - m(clean), mean over prompts
    scale: float  # |total effect|
    sample: Nodes  # nodes patched exactly: some features and all errors
    exact: dict[str, torch.Tensor]  # by quantity: effects of the sampled nodes [n]


class _Study:
    """One dictionary on the training prompts."""

    def __init__(self, model, saes, prompts: PromptSet, metric: Metric, options: CompareOptions) -> None:
        self.model, self.saes, self.prompts, self.metric, self.options = model, saes, prompts, metric, options
        self.rows = max_rows(model, prompts.clean.n_positions, memory=options.memory)

    def batches(self) -> Iterator[tuple[torch.Tensor, States]]:
        """Index [B] and both ends of every batch, prompts of like length together."""
        order = self.prompts.clean.lengths.argsort(stable=True).cpu()
        for index in order.split(max(1, min(self.rows, 64))):
            batch = self.prompts[index]
            yield index, capture_states(self.model, self.saes, batch, self.metric, sites=list(self.saes))

    def attribute(self, states: States, method: str):
        """The method's effects of one batch, without measuring totals."""
        options = self.options
        return attribute(
            self.model, self.saes, states, self.metric, sites=list(self.saes), method=method, rule=options.rule,
            steps=options.steps, residual=options.residual, max_rows=self.rows, seed=options.seed, totals=False,
        )  # fmt: skip

    def aggregated(self, parts: Mapping[Site, Sequence[SiteEffects]]) -> Nodes:
        """Nodes from the effects of all batches."""
        n_examples, n_positions = len(self.prompts), self.prompts.clean.n_positions
        return {
            site: aggregate_site(
                SiteEffects.concatenate(of_site), n_examples=n_examples, n_positions=n_positions, aggregation="sum"
            )
            for site, of_site in parts.items()
        }

    def truth(self) -> _Truth:
        """Site totals, and exact effects of a sample of nodes."""
        model, metric, sites = self.model, self.metric, list(self.saes)
        n = len(self.prompts)
        totals, total_effect = dict.fromkeys(sites, 0.0), 0.0
        live: dict[Site, list[SiteEffects]] = {site: [] for site in sites}
        for _, states in self.batches():
            for site in sites:
                totals[site] += site_total_effect(model, states, metric, site=site).sum().item() / n
                live[site].append(activation_difference(self.saes[site], states, site=site))
            if states.m_patch is not None:
                total_effect += (states.m_patch - states.m_clean).sum().item() / n
        scale = abs(total_effect) or max(abs(value) for value in totals.values())
        generator = torch.Generator().manual_seed(self.options.seed)
        nodes = self.aggregated(live)
        features = {site: of_site[~of_site.is_error] for site, of_site in nodes.items()}
        drawn = random_nodes(features, min(self.options.sample, count(features)), generator=generator)
        if not self.options.sample:
            return _Truth(totals, scale, drawn, {})
        errors = {site: of_site[of_site.is_error] for site, of_site in nodes.items()}
        sample = {site: _both(drawn[site], errors[site]) for site in sites}
        return _Truth(totals, scale, sample, self._exact(sample))

    def _exact(self, sample: Nodes) -> dict[str, torch.Tensor]:
        """Exact effects of the sampled nodes, mean over prompts: noising, and where there are pairs the mean of
        noising and denoising.
        """
        paired = self.prompts.patch is not None
        sums = {
            site: torch.zeros(1 + paired, nodes.n_features + 1, dtype=torch.float64) for site, nodes in sample.items()
        }
        for _, states in self.batches():
            ends = [(states, 1), (states.reversed(), -1)] if paired else [(states, 1)]
            for site, nodes in sample.items():
                for row, (start, sign) in enumerate(ends):
                    effects = exact_effects(
                        self.model, self.saes[site], start, self.metric, site=site, places=None,
                        features=nodes.feature, max_rows=self.rows,
                    )  # fmt: skip
                    sums[site][row] += sign * effects.summed(1).double()
        found = torch.cat([sums[site][:, nodes.feature] for site, nodes in sample.items()], 1) / len(self.prompts)
        return {NOISING: found[0], **({MEAN: found.mean(0)} if paired else {})}


def _score(study: _Study, truth: _Truth, test: PromptSet, method: str, dictionary: str) -> MethodScore:
    """One row: effects on the training prompts, scored on the test prompts."""
    parts: dict[Site, list[SiteEffects]] = {site: [] for site in study.saes}
    path_nodes: list[float] = []
    start = time.perf_counter()
    for index, states in study.batches():
        result = study.attribute(states, method)
        for site, effects in result.effects.items():
            parts[site].append(effects.relabel_examples(index))
        if result.path_nodes:
            path_nodes.append(sum(result.path_nodes.values()) / len(result.path_nodes) * len(index))
    seconds = time.perf_counter() - start
    nodes = study.aggregated(parts)
    options = study.options
    scoring = FaithfulnessOptions(
        ablation=options.ablation, start_site=options.start_site, errors=options.errors, random=0, seed=options.seed,
        resamples=options.resamples,
    )  # fmt: skip
    curve = measure_faithfulness(
        study.model, study.saes, nodes, test, scoring, sizes=size_grid(options.circuit_sizes, count(nodes)),
        reference=study.prompts, metric=study.metric, progress=False,
    )  # fmt: skip
    gaps = [abs(nodes[site].effect.double().sum().item() - truth.totals[site]) for site in nodes]
    return MethodScore(
        method=method,
        dictionary=dictionary,
        estimates=ESTIMATES.get(method),
        agreement=_agreement(nodes, truth, unsigned=method in UNSIGNED),
        residual=sum(gaps) / len(gaps) / truth.scale,
        path_nodes=sum(path_nodes) / len(study.prompts) if path_nodes else None,
        nodes_for={str(level): nodes_for(curve.sizes, curve.faithfulness, level) for level in LEVELS},
        seconds=seconds,
        peak_bytes=_peak(study, method),
        curve=curve,
    )


def _peak(study: _Study, method: str) -> int:
    batch = study.prompts[: min(MEMORY_PROMPTS, study.rows)]
    states = capture_states(study.model, study.saes, batch, study.metric, sites=list(study.saes))
    return peak_memory(lambda: study.attribute(states, method), study.model.device)


def _agreement(nodes: Nodes, truth: _Truth, *, unsigned: bool) -> dict[str, Agreement]:
    """Correlation of the method's effects with each exact quantity over the sampled nodes."""
    if not truth.exact:
        return {}
    is_error = torch.cat([sample.is_error for sample in truth.sample.values()])
    estimated = []
    for site, sample in truth.sample.items():
        effect = torch.zeros(sample.n_features + 1, dtype=torch.float64)
        effect[nodes[site].feature] = nodes[site].effect.double()
        estimated.append(effect[sample.feature])
    x = torch.cat(estimated)
    found = {}
    for quantity, exact in truth.exact.items():
        y = exact.abs() if unsigned else exact
        (f, g), (e, h) = ((x[part], y[part]) for part in (~is_error, is_error))
        of_errors = pearson(e, h) if len(e) > 2 else None
        found[quantity] = Agreement(pearson(f, g), spearman(f, g), of_errors)
    return found


def _both(a: SiteNodes, b: SiteNodes) -> SiteNodes:
    """The nodes of a site in a, then those in b."""
    columns = (torch.cat([getattr(a, name), getattr(b, name)]) for name in ("feature", "position", "effect"))
    return SiteNodes(a.n_features, *columns)


def size_grid(sizes: Sequence[int], n_nodes: int) -> list[int]:
    """The sizes up to n_nodes, with others between and beyond so that neighbours are at most `GRID` apart."""
    ends = [size for size in sizes if size < n_nodes] + [n_nodes]
    grid = {ends[0]}
    for low, high in pairwise(ends):
        steps = math.ceil(math.log(high / low) / math.log(GRID))
        grid |= {round(low * (high / low) ** (step / steps)) for step in range(1, steps + 1)}
    return sorted(grid)


def nodes_for(sizes: Sequence[int], faithfulness: Sequence[float], level: float) -> float | None:
    """Size at which faithfulness first reaches the level, log-linear between sizes; None where it does not."""
    if faithfulness[0] >= level:
        return float(sizes[0])
    for (n0, f0), (n1, f1) in pairwise(zip(sizes, faithfulness, strict=True)):
        if f1 >= level:
            return n0 * (n1 / n0) ** ((level - f0) / (f1 - f0))
    return None


def split(text: str) -> list[str]:
    """Comma-separated words, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
