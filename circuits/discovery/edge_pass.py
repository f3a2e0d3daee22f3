"""The edge pass of a discovery: the cut graph of every batch, after what the edges need of every site.

Finished batches go to the `ResumeFolder`, if there is one, as in the node pass. Where several processes share the work,
each makes rounds of batches until there are none left; then every one adds up all of them, in their order, from the
files: the sums are those of one process to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from circuits._tensors import flatten, unflatten
from circuits.attribution.activations import capture_activations
from circuits.attribution.edges import Edges, edge_effects, node_vectors
from circuits.attribution.node_effects import Attribution
from circuits.attribution.nodes import Nodes, count
from circuits.discovery.batching import DiscoveryRun, lanes_rows
from sae._progress import ProgressBar
from sae.model.sites import Site

SAMPLE_BYTES = 2**28
"""Most that the edge weights of single examples take; they are kept for intervals."""


def edge_pass(run: DiscoveryRun, batches: Sequence[Attribution], nodes: Nodes) -> tuple[Edges, Edges]:
    """Mean edge weights over all examples, [D, U], and those of each example, [N, D, U], where they fit into
    SAMPLE_BYTES (else none).
    """
    indices = run.batches()
    total: Edges = {}
    samples: dict[tuple[Site, Site | None], list[Tensor]] = {}
    with ProgressBar(total=len(indices), desc="edges", unit="batch", disable=not run.progress) as bar:
        if run.processes.size > 1:
            _share_out(run, indices, batches, nodes, bar)
        for numbers in run.rounds(range(len(indices))):
            for edges in _round(run, numbers, [indices[n] for n in numbers], batches, nodes):
                for pair, weights in edges.items():
                    if weights.ndim == 3:
                        samples.setdefault(pair, []).append(weights)
                        weights = weights.sum(0)
                    total[pair] = total[pair] + weights if pair in total else weights
                bar.update(int(bar.n < len(indices)))
    order = torch.cat(indices).argsort()  # from the order of the batches to that of the prompts
    mean = {pair: weights / len(run.prompts) for pair, weights in total.items()}
    return mean, {pair: torch.cat(of_batches)[order] for pair, of_batches in samples.items()}


def _share_out(
    run: DiscoveryRun, indices: Sequence[Tensor], batches: Sequence[Attribution], nodes: Nodes, bar: ProgressBar
) -> None:
    """Write the files of all batches, this process those that it is the first to ask for."""
    assert run.files is not None
    files, processes = run.files, run.processes
    unfinished = processes.by_first(lambda: [n for n in range(len(indices)) if files.get(f"edges-{n:04}") is None])
    rounds, n_finished = run.rounds(unfinished), len(indices) - len(unfinished)
    for turn in processes.dealt(len(rounds), "edges"):
        bar.update(n_finished + unfinished.index(rounds[turn][0]) - bar.n)
        for _ in _round(run, rounds[turn], [indices[n] for n in rounds[turn]], batches, nodes):
            bar.update()
    processes.gathered(None)


def by_case(samples: Edges, cases: Sequence[str]) -> Edges:
    """Mean edge weights over the examples of each case, [D, U, C], from those of each example, [N, D, U]; none where
    there is one case. Each case counts by its share of the prompts in the mean over all.
    """
    names = [case or "prompts" for case in cases]
    members = {name: torch.tensor([other == name for other in names]) for name in dict.fromkeys(names)}
    if len(members) < 2:
        return {}
    return {
        pair: torch.stack([weights[rows].mean(0) for rows in members.values()], dim=-1)
        for pair, weights in samples.items()
    }


def keeps_examples(n_nodes: int, n_examples: int) -> bool:
    """Whether the weights of every example, at most n^2 / 2 edges each, fit into SAMPLE_BYTES."""
    return 4 * n_examples * n_nodes * (n_nodes + 1) / 2 <= SAMPLE_BYTES


def _round(
    run: DiscoveryRun, numbers: Sequence[int], indices: Sequence[Tensor], batches: Sequence[Attribution], nodes: Nodes
) -> Iterator[Edges]:
    """The edges of the batches of one round, in order; those that are finished from their files."""
    finished = {n: run.files.get(f"edges-{n:04}") for n in numbers} if run.files is not None else {}
    unfinished = {
        number: ready_for_edges(run, batches[number], index, nodes)
        for number, index in zip(numbers, indices, strict=True)
        if finished.get(number) is None
    }
    of_batches = node_vectors(list(unfinished.values()), nodes, active=run.options.edge_active)
    vectors = dict(zip(unfinished, of_batches, strict=True))
    for number in numbers:
        if (tensors := finished.get(number)) is not None:
            yield unflatten(Edges, _copied(tensors))
            continue
        batch = unfinished[number]
        edges = edge_effects(
            batch, nodes, vectors=vectors[number],
            max_rows=lanes_rows(run.rows, batch.states.mask.shape[1], run.setting.model.device),
            per_example=keeps_examples(count(nodes), len(run.prompts)),
        )  # fmt: skip
        if run.files is not None:
            run.files.put(f"edges-{number:04}", flatten(edges))
        yield edges


def ready_for_edges(run: DiscoveryRun, batch: Attribution, index: Tensor, nodes: Nodes) -> Attribution:
    """A batch with the activations that its edges need: off the disk, and computed again where none were kept."""
    prompts = run.prompts[index]
    if run.files is not None:
        batch = unflatten(Attribution, _copied(flatten(batch)), setting=run.setting, prompts=prompts)
    if batch.edge_inputs:
        return batch
    return replace(batch, states=capture_activations(run.setting, prompts, sites=list(nodes)))


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in memory of their own: mapped ones lie elsewhere in a cache line, and sums end in other bits."""
    return {name: x.clone() for name, x in tensors.items()}
