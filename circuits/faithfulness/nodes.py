"""How much of a behaviour a circuit explains by itself, and how much is left without it.

With m(X) the mean metric over prompts when only the nodes X are left as they are and all other features and errors
are ablated (Marks et al. 2024, section 4; circuits.faithfulness.ablation says by what):

    faithfulness(C) = (m(C) - m(0)) / (m(M) - m(0)),    completeness(C) = (m(M without C) - m(0)) / (m(M) - m(0)),

M all nodes, 0 none. A ratio of means, never a mean of ratios. A good circuit has faithfulness near 1 and
completeness near 0 at few nodes. Beside every circuit stand random circuits of the same size, drawn from the nodes
with an effect.

1. Node sets: the n strongest nodes for each size, from `start_site` on; sites before it are given for free and never
   ablated.
2. Errors are nodes like features, or all left in, or all ablated, in every one of these sets; the whole model M has
   them always.
3. Ablation values from the reference prompts (by default those the circuit was found on).
4. One forward pass per batch of prompts and node set; the metric of every prompt is kept for bootstrap intervals.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from circuits.attribution.activations import Setting
from circuits.attribution.nodes import Nodes, SiteNodes, count, joined, masked_nodes, select_nodes
from circuits.circuit import Circuit
from circuits.faithfulness.ablation import AblationValues, ablation_edits
from circuits.faithfulness.optimal_ablation import Gain, NodeSet, ablation_values, gain
from circuits.faithfulness.results import Intervals, NodeFaithfulness, area
from circuits.options import AblationOptions, FaithfulnessOptions
from circuits.prompts.alignment import PositionGroups
from circuits.prompts.dataset import PromptSet
from circuits.uncertainty.bootstrap import Bootstrap, group_sums, too_few, what_is_drawn
from sae._progress import ProgressBar
from sae.errors import UserError, unknown
from sae.model.sites import Site

SIZES = (10, 20, 50, 100, 200, 500, 1000)
"""Numbers of nodes that are measured."""
COVERED = 0.8
"""Share of the prompts whose template must occur among the reference prompts; below it templates are lengths alone."""


def faithfulness(
    circuit: Circuit,
    prompts: PromptSet | None = None,
    options: FaithfulnessOptions | None = None,
    *,
    sizes: Sequence[int] = SIZES,
    reference: PromptSet | None = None,
    progress: bool = True,
) -> NodeFaithfulness:
    """Measure how much of the behaviour the strongest nodes of a circuit explain, and how much is left without them.

    Faithfulness and completeness of Marks et al. 2024 (arXiv 2403.19647), section 4, for every size; their areas are
    the CPR and CMD of Mueller et al. 2025 (MIB).

    Args:
        circuit: The circuit, whose model, SAEs and metric are used.
        prompts: What to measure on, best held out; the prompts the circuit was found on by default.
        options: What ablated nodes become, where ablation starts, how many random circuits, how many resamples.
        sizes: Numbers of nodes; all nodes are measured besides.
        reference: Prompts whose means or values ablated nodes take; those the circuit was found on by default.
        progress: Whether to show a progress bar.

    Returns:
        Curves over sizes, in shares of the behaviour: 1 is the whole model, 0 the model with every node ablated.

    Raises:
        UserError: If no node has an effect from the start site on, ablating every node changes nothing, or no
            reference prompt has a template of the measured prompts.
    """
    return measure_faithfulness(
        circuit.setting(), circuit.nodes, circuit.prompts if prompts is None else prompts, options, sizes=sizes,
        reference=circuit.prompts if reference is None else reference, progress=progress,
    )  # fmt: skip


def measure_faithfulness(
    setting: Setting,
    nodes: Nodes,
    prompts: PromptSet,
    options: FaithfulnessOptions | None = None,
    *,
    sizes: Sequence[int] = SIZES,
    reference: PromptSet | None = None,
    progress: bool = True,
) -> NodeFaithfulness:
    """`faithfulness` of any nodes with effects; reference: the measured prompts themselves by default."""
    options = options or FaithfulnessOptions()
    nodes, prompts, reference, n_uncovered = set_up(setting, nodes, prompts, reference, options)
    n_nodes = count(nodes)
    sizes = sorted({*sizes_within(sizes, n_nodes, of="nodes"), n_nodes})
    strongest = [select_nodes(nodes, top=size) for size in sizes]
    generator = torch.Generator().manual_seed(options.seed)
    drawn = [random_nodes(nodes, size, generator=generator) for _ in range(options.random) for size in sizes]
    sets = [*strongest, *drawn]
    runs = _with_errors([(one, True) for one in ({}, *sets)] + [(one, False) for one in strongest],
                        nodes, options.errors)  # fmt: skip
    curve = runs[: 1 + len(sizes)]  # the empty circuit and the strongest nodes
    values = ablation_values(
        setting, options.ablation, curve, nodes=nodes, named=sets, reference=reference, seed=options.seed,
        batch_size=options.batch_size, progress=progress,
    )  # fmt: skip
    m_all = _metrics(values, runs, prompts, batch_size=options.batch_size, progress=progress)
    gained = gain(values, curve, prompts, batch_size=options.batch_size) if options.ablation == "optimal" else None
    return _record(m_all, sizes, nodes, options, groups=prompts.groups, n_uncovered=n_uncovered, gained=gained)


def _record(
    m_all: torch.Tensor,
    sizes: list[int],
    nodes: Nodes,
    options: FaithfulnessOptions,
    *,
    groups: torch.Tensor,
    n_uncovered: int,
    gained: Gain | None,
) -> NodeFaithfulness:
    """From m_all [2 + sets, B]: the whole model, no node, the strongest, the random draws, all but the strongest."""
    m_model, m_empty = behaviour_of(m_all)
    f = shares(m_all.mean(1)).tolist()
    n, n_nodes = len(sizes), count(nodes)
    return NodeFaithfulness(
        sizes=sizes,
        faithfulness=f[:n],
        completeness=f[-n:],
        random=[f[start : start + n] for start in range(n, len(f) - n, n)],
        m_model=m_model,
        m_empty=m_empty,
        ablation=options.ablation,
        start_site=next(iter(nodes)).name,
        n_nodes=n_nodes,
        n_prompts=m_all.shape[1],
        n_uncovered=n_uncovered,
        errors=options.errors,
        intervals=_intervals(m_all, sizes, n_nodes, groups, options),
        drawn=what_is_drawn(groups),
        gain=gained,
    )


def metrics_of_sets(
    setting: Setting,
    sets: Sequence[NodeSet],
    prompts: PromptSet,
    options: AblationOptions,
    *,
    nodes: Nodes,
    reference: PromptSet,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> torch.Tensor:
    """m of the whole model, of no node, and of every set (nodes, whether they are kept or removed) on every prompt,
    [2 + sets, B]; nodes, prompts and reference as `set_up` gives them.
    """
    runs = _with_errors([({}, True), *sets], nodes, options.errors)
    values = ablation_values(
        setting, options.ablation, runs, nodes=nodes, named=[chosen for chosen, _ in sets], reference=reference,
        seed=seed, batch_size=batch_size, progress=progress,
    )  # fmt: skip
    return _metrics(values, runs, prompts, batch_size=batch_size, progress=progress)


def behaviour_of(m_all: torch.Tensor, what: str = "node") -> tuple[float, float]:
    """Means of m(M) and m(0), with which m_all [2 + sets, B] begins. UserError where they are the same, so that nothing
    can be a share of their difference; what: of which every one is ablated in m(0).
    """
    m_model, m_empty = m_all[:2].mean(1).tolist()
    if abs(m_model - m_empty) < 1e-9:
        raise UserError(f"ablating every {what} leaves the metric at {m_empty:.4f}: there is nothing to explain")
    return m_model, m_empty


def shares(m: torch.Tensor) -> torch.Tensor:
    """(m(C) - m(0)) / (m(M) - m(0)) for every set C; m [..., 2 + sets] begins with m(M) and m(0)."""
    m_model, m_empty = m[..., :1], m[..., 1:2]
    return (m[..., 2:] - m_empty) / (m_model - m_empty)


def share_intervals(m_all: torch.Tensor, groups: torch.Tensor, bootstrap: Bootstrap) -> torch.Tensor:
    """Intervals of (m(C) - m(0)) / (m(M) - m(0)) [sets, 2]; m_all [2 + sets, B] begins with m(M) and m(0)."""
    gained = group_sums((m_all - m_all[1]).T, groups)  # [G, 2 + sets]
    return bootstrap.intervals(gained[:, 2:], gained[:, 0])


def _intervals(
    m_all: torch.Tensor, sizes: Sequence[int], n_nodes: int, groups: torch.Tensor, options: FaithfulnessOptions
) -> Intervals | None:
    """Intervals of every size and of the areas, from m_all [2 + sets, B]; None where the prompts are too few.

    An area is a weighted sum of f, or of 1 - f with the sign it has at each size, so that it is a ratio as f is.
    """
    if not options.resamples or too_few(groups):
        return None
    n, (m_model, m_empty) = len(sizes), m_all[:2]
    faithful, without = m_all[2 : 2 + n], m_all[-n:]
    weights = [area([0.0] * k + [1.0] + [0.0] * (n - k), [0, *sizes], n_nodes) for k in range(n + 1)]
    inside = torch.tensor(weights, dtype=m_all.dtype)  # [1 + n] of no node, and of each size
    side = torch.where(shares(m_all.mean(1))[:n] <= 1, 1.0, -1.0).to(m_all)  # [n] sign of 1 - f
    gained, behaviour = faithful - m_empty, m_model - m_empty
    areas = torch.stack([inside[1:] @ gained, inside[0] * behaviour + (inside[1:] * side) @ (behaviour - gained)])
    bootstrap = Bootstrap(resamples=options.resamples, seed=options.seed)
    bounds = share_intervals(torch.cat([m_all[:2], faithful, without, areas + m_empty]), groups, bootstrap).tolist()
    lowest, highest = bounds[-1]
    return Intervals(bounds[:n], bounds[n:-2], bounds[-2], [max(lowest, 0.0), highest])  # an area of distances


def _with_errors(sets: Sequence[tuple[Nodes, bool]], nodes: Nodes, errors: str) -> list[tuple[Nodes, bool]]:
    """The sets (nodes, keep) with every error kept, or every error removed, where errors are no nodes."""
    if errors == "nodes":
        return list(sets)

    def add(chosen: Nodes) -> Nodes:
        full = {}
        for site, of_site in nodes.items():
            error = SiteNodes(
                of_site.n_features, torch.tensor([of_site.n_features]), torch.tensor([-1]), torch.zeros(1)
            )
            full[site] = joined(chosen.get(site, of_site[:0]), error)
        return full

    return [(add(chosen) if keep == (errors == "keep") else chosen, keep) for chosen, keep in sets]


@torch.no_grad()
def _metrics(
    values: AblationValues,
    sets: Sequence[tuple[Nodes, bool]],
    prompts: PromptSet,
    *,
    batch_size: int,
    progress: bool,
) -> torch.Tensor:
    """Metric of the plain model and of every (nodes, keep) on every prompt, [1 + sets, B] float64."""
    columns, model, metric = [], values.setting.model, values.setting.metric
    n_batches = -(-len(prompts) // batch_size)
    with ProgressBar(total=n_batches * len(sets), desc="faithfulness", unit="run", disable=not progress) as bar:
        for batch in prompts.batches(batch_size):
            plain = model.run(batch.clean, last_only=True)
            column = [metric(plain.logits[:, -1], batch)]
            ablated = values(batch)
            for nodes, keep in sets:
                edits = ablation_edits(values.setting.saes, values.table, nodes, ablated, batch, keep=keep)
                run = model.run(batch.clean, edits=edits, last_only=True)
                column.append(metric(run.logits[:, -1], batch))
                bar.update()
            columns.append(torch.stack(column).cpu().double())  # MPS has no float64
    return torch.cat(columns, dim=1)


def sizes_within(sizes: Sequence[int], n: int, *, of: str) -> list[int]:
    """The positive sizes in order, those above n as n; of: what they count."""
    within = sorted({min(size, n) for size in sizes if size > 0})
    if not within:
        raise UserError(f"sizes hold no positive number of {of}")
    return within


def from_start_site(nodes: Nodes, start_site: str | None, *, errors: str = "nodes") -> Nodes:
    """The nodes at `start_site` and later, without the errors unless these are nodes."""
    if start_site is not None:
        names = [site.name for site in nodes]
        if start_site not in names:
            raise unknown("start site", start_site, names)
        nodes = {site: of_site for site, of_site in nodes.items() if site >= Site.parse(start_site)}
    return nodes if errors == "nodes" else {site: of_site[~of_site.is_error] for site, of_site in nodes.items()}


def random_nodes(nodes: Nodes, size: int, *, generator: torch.Generator) -> Nodes:
    """`size` nodes drawn uniformly from all nodes with an effect."""
    chosen = torch.zeros(count(nodes), dtype=torch.bool)
    chosen[torch.randperm(len(chosen), generator=generator)[:size]] = True
    return masked_nodes(nodes, chosen)


def set_up(
    setting: Setting,
    nodes: Nodes,
    prompts: PromptSet,
    reference: PromptSet | None,
    options: AblationOptions,
) -> tuple[Nodes, PromptSet, PromptSet, int]:
    """Prepare a measurement with ablated nodes: the nodes from the start site on, the prompts, the reference prompts
    (the prompts themselves by default), and how many prompts have none of these and are left out. UserError where there
    are no nodes.
    """
    nodes = from_start_site(nodes, options.start_site, errors=options.errors)
    if not count(nodes):
        raise UserError(f"no node has an effect from {options.start_site or 'the first site'} on: start earlier")
    prompts = setting.prepare(prompts)
    reference, prompts, n_uncovered = aligned(reference or prompts, prompts, options.ablation)
    return nodes, prompts, reference, n_uncovered


def aligned(reference: PromptSet, prompts: PromptSet, ablation: str) -> tuple[PromptSet, PromptSet, int]:
    """Reference and measured prompts keyed by the same template rule; measured prompts without reference left out."""
    if ablation in ("counterfactual", "zero", "mean-pooled"):
        return reference, prompts, 0
    by_group = ablation in ("mean", "optimal")
    tried = []
    for measured, keyed in (
        (prompts.aligned_to(reference), reference),
        (prompts.with_templates("length"), reference.with_templates("length")),
    ):
        templates = set(keyed.templates)
        in_templates = torch.tensor([template in templates for template in measured.templates])
        covered = PositionGroups(keyed).covers(measured) if by_group else in_templates
        tried.append((keyed, measured, covered))
        if covered.float().mean() >= COVERED:
            break
    keyed, measured, covered = max(tried, key=lambda attempt: int(attempt[2].sum()))  # the first of equals
    if not covered.any():
        raise UserError(
            f"none of the {len(prompts)} prompts has the template or length of a reference prompt: "
            "give reference prompts like them, or ablate by zero or counterfactual"
        )
    return keyed, measured[covered], int((~covered).sum())
