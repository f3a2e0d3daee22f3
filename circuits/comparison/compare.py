"""Node methods side by side: how good the circuits they rank are on held-out prompts, and what they cost.

For every method, on the autoencoders' features and, for some, on neurons:

1. Effects on the training prompts, or the ranking of a learned mask, timed; the tensors alive at once are counted on
   one batch (`circuits.comparison.study`).
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

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from circuits.attribution.activations import Setting
from circuits.attribution.node_effects import CHECKS, check_allowed
from circuits.attribution.nodes import count
from circuits.comparison.options import MASKS, SIGNS, CompareOptions, split
from circuits.comparison.results import LEVELS, MEAN, NOISING, Comparison, MethodScore
from circuits.comparison.study import Study, Truth, agreement
from circuits.faithfulness.nodes import measure_faithfulness
from circuits.metrics.metrics import get_metric
from circuits.metrics.probe import visible_sites
from circuits.options import FaithfulnessOptions
from circuits.prompts.dataset import PromptSet
from sae._progress import ProgressBar
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError
from sae.model.forward import with_gradients
from sae.model.language_model import LanguageModel
from sae.model.sites import Site, select_sites
from sae.neurons import DICTIONARIES, MLP_NEURONS, NEURONS

log = logging.getLogger(__name__)

ESTIMATES = {
    "ig": MEAN, "ig-adaptive": MEAN, "ig-inputs": MEAN,
    "attrib": NOISING, "relp": NOISING, "gim": NOISING, "graddrop": NOISING, "exact": NOISING,
}  # fmt: skip
"""Exact quantity each method estimates: noising, or the mean of noising and denoising. Baselines estimate none."""
UNSIGNED = ("activation-difference",)
"""Methods whose effects have no sign: compared with the magnitude of the exact effect."""
GRID = 1.6
"""Largest ratio between neighbouring circuit sizes."""
SAES = "saes"


@with_gradients
def compare_methods(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    train: PromptSet,
    test: PromptSet,
    options: CompareOptions | None = None,
    *,
    progress: bool = True,
) -> Comparison:
    """Compare methods that rank nodes: every method of the options finds nodes on `train`, which are scored on `test`.

    Args:
        model: The model that shows the behaviour.
        saes: A dictionary for every site of the circuits.
        train: Prompts that effects are computed on.
        test: Other prompts, on which faithfulness is measured.
        options: Methods, dictionaries, circuit sizes and how ablated nodes are treated; the command line's by default.
        progress: Whether progress bars are shown.

    Returns:
        A row for each method and dictionary: faithfulness over sizes, agreement with exact effects, time and memory.

    Raises:
        UserError: For a method that the model or the prompts do not allow, or prompts that do not fit each other.
    """
    options = options or CompareOptions()
    m = get_metric(options.metric)
    sites = visible_sites(m, model, select_sites(options.sites, list(saes)))
    plan: list[tuple[str, Setting, list[str]]] = []
    if methods := split(options.methods):
        plan.append((SAES, Setting.of(model, saes, m, sites=sites), methods))
    for name, chosen in ((NEURONS, options.neurons), (MLP_NEURONS, options.mlp_neurons)):
        if methods := split(chosen):
            plan.append((name, Setting.of(model, DICTIONARIES[name](model, sites=sites), m), methods))
    plan = [(name, setting, _allowed(setting, methods, options)) for name, setting, methods in plan]
    train, test = (plan[0][1].prepare(prompts) for prompts in (train, test))
    rows, sampled = [], {}
    with ProgressBar(total=sum(len(methods) for *_, methods in plan), desc="methods", disable=not progress) as bar:
        for name, setting, methods in plan:
            study = Study(setting, train, options)
            truth = study.truth()
            sampled[name] = sum(int(nodes.is_feature.sum()) for nodes in truth.sample.values())
            for method in methods:
                bar.set_postfix_str(f"{method} on {name}")
                rows.append(_score(study, truth, test, method, name))
                bar.update()
    return Comparison(rows, options, len(train), rows[0].curve.n_prompts, sampled)


def _allowed(setting: Setting, methods: Sequence[str], options: CompareOptions) -> list[str]:
    """The methods without those that the model does not allow; UserError where they were asked for by name."""
    allowed = []
    for method in methods:
        try:
            check_allowed(setting.model, options.mask_start if method in MASKS else method.removeprefix(SIGNS))
        except UserError as error:
            if method not in CHECKS or options.methods != CompareOptions.methods:
                raise
            log.warning("%s is left out: %s", method, error)
        else:
            allowed.append(method)
    return allowed


def _score(study: Study, truth: Truth, test: PromptSet, method: str, dictionary: str) -> MethodScore:
    """One row: effects on the training prompts, scored on the test prompts."""
    ranking, options = study.ranking(method), study.options
    nodes = ranking.nodes
    scoring = FaithfulnessOptions(
        ablation=options.ablation, start_site=options.start_site, errors=options.errors, random=0, seed=options.seed,
        resamples=options.resamples,
    )  # fmt: skip
    curve = measure_faithfulness(
        study.setting, nodes, test, scoring, sizes=size_grid(options.circuit_sizes, count(nodes)),
        reference=study.prompts, progress=False,
    )  # fmt: skip
    learned = method in MASKS or method.startswith(SIGNS)  # ranks, not effects
    gaps = [abs(nodes[site].effect.double().sum().item() - truth.totals[site]) for site in nodes]
    return MethodScore(
        method=method,
        dictionary=dictionary,
        estimates=ESTIMATES.get(method),
        agreement={} if learned else agreement(nodes, truth, unsigned=method in UNSIGNED),
        residual=None if learned else sum(gaps) / len(gaps) / truth.scale,
        path_nodes=ranking.path_nodes,
        nodes_for={str(level): nodes_for(curve.sizes, curve.faithfulness, level) for level in LEVELS},
        seconds=ranking.seconds,
        peak_bytes=ranking.peak_bytes,
        curve=curve,
    )


def size_grid(sizes: Sequence[int], n_nodes: int) -> list[int]:
    """The sizes up to n_nodes, with others between and beyond so that neighbours are at most `GRID` apart."""
    given = [size for size in sizes if size < n_nodes] + [n_nodes]
    grid = {given[0]}
    for low, high in pairwise(given):
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
