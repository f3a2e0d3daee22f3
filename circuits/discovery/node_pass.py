"""The node pass of a discovery: activations, gradients and sparse effects of all nodes, batch by batch.

The results of a batch go to the `ResumeFolder`, if there is one, and are taken from there where an interrupted
discovery goes on. Everything the edges need of the node pass is among them, so that edges come out the same to the bit.

Where several processes share the work, each makes rounds of batches until there are none left, and reads those of the
others from their files.

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
from sae.errors import UserError
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
    indices, n_sites, processes = run.batches(), len(run.sites), run.processes
    names = [f"nodes-{first + number:04}" for number in range(len(indices))]
    results: dict[int, Attribution] = {}
    for number, index in enumerate(indices):
        if (batch := _stored(run, names[number], index)) is not None:
            results[number] = batch
    budget = run.options.memory * GIB - sum(batch.n_bytes_for_edges for batch in results.values())
    budget /= processes.size
    if any(not batch.edge_inputs for batch in results.values()):
        budget = -1.0  # it was used up before
    unfinished = processes.by_first(lambda: [number for number in range(len(indices)) if number not in results])
    rounds, n_finished = run.rounds(unfinished), len(indices) - len(unfinished)
    with ProgressBar(
        total=len(indices) * n_sites, initial=n_finished * n_sites,
        desc=f"nodes ({run.options.method})", unit="site", disable=not run.progress,
    ) as bar:  # fmt: skip
        for turn in processes.dealt(len(rounds), names[0]):
            numbers = rounds[turn]
            bar.update((n_finished + unfinished.index(numbers[0])) * n_sites - bar.n)  # what others have taken
            for number, made in zip(numbers, _round(run, [indices[n] for n in numbers], bar), strict=True):
                budget -= made.n_bytes_for_edges
                batch = made if budget >= 0 else made.without_edge_inputs()
                if run.files is not None:
                    run.files.put(names[number], flatten(batch))
                    batch = _finished(run, names[number], indices[number])
                results[number] = batch
        processes.gathered(None)
        bar.update(len(indices) * n_sites - bar.n)
    results |= {n: _finished(run, names[n], indices[n]) for n in unfinished if n not in results}  # by others
    return [results[number] for number in range(len(indices))]


def _stored(run: DiscoveryRun, name: str, index: Tensor) -> Attribution | None:
    """A batch from its file; None where it is not finished."""
    tensors = None if run.files is None else run.files.get(name)
    return None if tensors is None else unflatten(Attribution, tensors, setting=run.setting, prompts=run.prompts[index])


def _finished(run: DiscoveryRun, name: str, index: Tensor) -> Attribution:
    batch = _stored(run, name, index)
    if batch is None:
        raise UserError(
            f"the finished batch {name!r} cannot be read again: the run must lie on a file system that all processes "
            "share"
        )
    return batch


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
