"""The node pass of a discovery: activations, gradients and sparse effects of all nodes, batch by batch.

The results of a batch go to the `ResumeFolder`, if there is one, and are taken from there where an interrupted
discovery goes on. Everything the edges need of the node pass is among them, so that edges come out the same to the bit.

Between the passes lie the sparse effects, one gradient [B, S, d] per site, and within the memory budget what the edges
would else compute again: on the CPU, or on disk where there are files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from circuits._tensors import flatten, unflatten
from circuits.attribution.activations import capture_activations
from circuits.attribution.effects import SiteEffects
from circuits.attribution.ensemble import combined_batches, ensemble_weights
from circuits.attribution.node_effects import GRADIENT_AT_CLEAN, Attribution, attribute_batches
from circuits.attribution.nodes import Nodes, aggregate, effects_of
from circuits.discovery.batching import GIB, DiscoveryRun
from circuits.options import members
from sae._progress import ProgressBar
from sae.model.sites import Site

MOST_BATCHES = 10**6
"""Files of the methods of an ensemble are numbered this far apart."""


def node_pass(run: DiscoveryRun) -> list[Attribution]:
    """The effects of every batch, in the order of `DiscoveryRun.batches`."""
    names = members(run.options.method)
    if len(names) == 1:
        return _pass(run)
    alone = [replace(run, options=replace(run.options, method=name, edge_nodes=0)) for name in names]
    passes = [_pass(one, first=number * MOST_BATCHES) for number, one in enumerate(alone)]
    weights = ensemble_weights([all_effects(run, batches)[1] for batches in passes])
    return combined_batches(passes, weights)


def _pass(run: DiscoveryRun, first: int = 0) -> list[Attribution]:
    """The effects of one method; `first`: the number that the file of the first batch has."""
    indices = run.batches()
    results: dict[int, Attribution] = {}
    for number, index in enumerate(indices):
        if run.files is not None and (tensors := run.files.get(f"nodes-{first + number:04}")) is not None:
            results[number] = unflatten(Attribution, tensors, setting=run.setting, prompts=run.prompts[index])
    budget = run.options.memory * GIB - sum(batch.n_bytes_for_edges for batch in results.values())
    if any(not batch.edge_inputs for batch in results.values()):
        budget = -1.0  # it was used up before
    unfinished = [number for number in range(len(indices)) if number not in results]
    with ProgressBar(
        total=len(indices) * len(run.sites), initial=len(results) * len(run.sites),
        desc=f"nodes ({run.options.method})", unit="site", disable=not run.progress,
    ) as bar:  # fmt: skip
        for numbers in run.rounds(unfinished):
            for number, batch in zip(numbers, _round(run, [indices[n] for n in numbers], bar), strict=True):
                budget -= batch.n_bytes_for_edges
                batch = batch if budget >= 0 else batch.without_edge_inputs()
                if run.files is not None:
                    name = f"nodes-{first + number:04}"
                    run.files.put(name, flatten(batch))
                    tensors = run.files.get(name) or {}
                    prompts = run.prompts[indices[number]]
                    batch = unflatten(Attribution, tensors, setting=run.setting, prompts=prompts)
                results[number] = batch
    return [results[number] for number in range(len(indices))]


def all_effects(
    run: DiscoveryRun, batches: Sequence[Attribution], only: Nodes | None = None
) -> tuple[dict[Site, SiteEffects], Nodes]:
    """The effects of all batches together, per site, those of the nodes `only` where given; and what they aggregate
    to.
    """
    effects = {site: SiteEffects.concatenate(batch.effects[site] for batch in batches) for site in run.sites}
    if only is not None:
        effects = {site: effects_of(of_site, only.get(site)) for site, of_site in effects.items()}
    aggregation, prompts = run.options.aggregation, run.prompts
    nodes = aggregate(
        effects, n_examples=len(prompts), n_positions=prompts.clean.n_positions, aggregation=aggregation,
        spans=prompts.spans if aggregation == "spans" else (),
    )  # fmt: skip
    return effects, nodes


def _round(run: DiscoveryRun, indices: Sequence[Tensor], bar: ProgressBar) -> list[Attribution]:
    """The node effects of the batches of one round."""
    options = run.options
    gradient = options.method in GRADIENT_AT_CLEAN
    batches = [capture_activations(run.setting, run.prompts[index], gradient=gradient) for index in indices]
    active = options.edge_active if options.edge_nodes else None
    results = attribute_batches(batches, options, max_rows=run.rows, active=active, progress=lambda site: bar.update())
    return [result.stored(index) for index, result in zip(indices, results, strict=True)]
