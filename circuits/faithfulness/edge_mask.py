"""Learned masks on edges: which edges to keep, learned jointly with the nodes they join.

As `circuits.faithfulness.learned_mask`, whose budgets, gates, loss and descent these are (there 1 to 5), with a gate at
every edge that has a weight (Edge Pruning, Bhaskar et al. 2024, arXiv 2406.16778, has gates at edges and nodes):

1. The model with gates on edges is that of `circuits.faithfulness.edge_run`, which also measures how faithful a set of
   edges is: what node d sees of node u is g(u, d) (a_u - a0_u). Open gates are the circuit with all its edges, closed
   ones the model with every node ablated.
2. The score of an edge is its own plus a part of those of the nodes it joins, s(u, d) = s_ud + c (s_u + s_d), all of
   them learned: a node that is not needed takes its edges down together, and one that is brings them up. With c = 1
   nodes move their edges faster than these find their own order, and planted circuits are lost again.
3. A budget is a number of edges. Scores of edges start at -ln(rank) by |weight|, or all alike; those of nodes at 0.
4. A step runs every node once for each of its prompts, from its parents on alone: it takes about as long as one of a
   mask on nodes times the nodes of a site, and keeps as much more in memory.

Legend: B prompts, V vocabulary, E edges, N nodes, U upstream and D downstream nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from circuits._results import format_table
from circuits._tensors import flatten
from circuits.attribution.activations import Setting
from circuits.attribution.edges import Edges
from circuits.attribution.nodes import Nodes, count, masked_nodes
from circuits.circuit import Circuit
from circuits.faithfulness.ablation import AblationValues, NodeTable, Values
from circuits.faithfulness.edge_run import EdgeGates, EdgeRun, EdgeStudy, reaching
from circuits.faithfulness.edges import edges_from, strongest_edges
from circuits.faithfulness.learned_mask import discovered_again
from circuits.faithfulness.mask_descent import Task, descend, measure_behaviour
from circuits.faithfulness.nodes import aligned
from circuits.metrics.metrics import kl, prepare
from circuits.options import MaskOptions
from circuits.prompts.dataset import PromptSet
from sae._files import write_tensors
from sae._frames import Result
from sae._run.outputs import check_output, has_header
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.sites import Site

METRIC = "metric"
NODE_SHARE = 0.25
"""c of 2."""


@dataclass(frozen=True)
class LearnedEdges(Result):
    """A learned mask on edges."""

    edges: Edges
    """[D, U] per pair of sites: 1 for the edge of highest score, falling evenly towards 0; 0 where the circuit has no
    weight, so that whatever takes the strongest edges takes the mask's.
    """
    nodes: Nodes
    """The nodes that these join; `effect` is the weight of the edge with which a node comes to have a path of kept
    edges to the metric, 0 where it never has.
    """
    losses: list[float]
    """Loss of every step: squared shortfall in units of the behaviour."""
    options: dict[str, Any]
    """Options that it was learned with."""

    def to_frame(self) -> pd.DataFrame:
        """One row an edge, those kept longest first: upstream, downstream, and its rank from 1."""
        names = {site: nodes.ids(site) for site, nodes in self.nodes.items()}
        rows = [
            (names[up][u], METRIC if down is None else names[down][d], weights[d, u].item())
            for (up, down), weights in self.edges.items()
            for d, u in weights.nonzero().tolist()
        ]
        frame = pd.DataFrame(rows, columns=["upstream", "downstream", "weight"])
        frame = frame.sort_values("weight", ascending=False, kind="stable", ignore_index=True)
        return frame.drop(columns="weight").assign(rank=range(1, len(frame) + 1))

    def text(self) -> str:
        """The edges kept longest, and the last loss."""
        strongest = self.to_frame().head(20).set_index("rank").rename_axis(None)
        return f"loss {self.losses[-1]:.3f} after {len(self.losses)} steps\n{format_table(strongest)}"

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write edges and nodes with their ranks as .safetensors, whose header says `kind: edge_mask`; `overwrite` as
        in `Result`.
        """
        path = Path(path)
        check_output(path, has_header(kind="edge_mask"), overwrite=overwrite)
        tensors = flatten({"edges": self.edges, "nodes": self.nodes})
        write_tensors(path, {name: x.clone() for name, x in tensors.items()}, metadata={"kind": "edge_mask"})
        return path


def learn_edge_mask(
    circuit: Circuit,
    prompts: PromptSet | None = None,
    options: MaskOptions | None = None,
    *,
    reference: PromptSet | None = None,
    progress: bool = True,
) -> LearnedEdges:
    """Rank the edges of a circuit by which of them to keep, learned for all of them together and with their nodes.

    Args:
        circuit: A circuit with edges, whose model, SAEs and metric are used.
        prompts: What to learn on; the prompts the circuit was found on by default.
        options: Steps, ablation, start site and what has to match; budgets are numbers of edges, and errors are nodes.
        reference: Prompts whose means or values ablated inputs take, `prompts` by default.
        progress: Whether to show a progress bar.

    Returns:
        The ranking; `edge_faithfulness` measures `replace(circuit, edges=ranking.edges)`.

    Raises:
        UserError: If the circuit has no edges from the start site on, errors are no nodes, or ablating every input
            changes nothing.
    """
    options = options or MaskOptions()
    if options.errors != "nodes":
        raise UserError(f"errors is {options.errors!r}: edges are learned with errors as nodes")
    setting = circuit.setting()
    prompts = setting.prepare(circuit.prompts if prompts is None else prompts)
    nodes, edges = edges_from(circuit, options.start_site)
    reference, prompts, _ = aligned(prompts if reference is None else reference, prompts, options.ablation)
    gates = GatedEdges(setting, nodes, edges)
    values = AblationValues(
        setting, gates.table, options.ablation, reference=reference, seed=options.seed, batch_size=options.batch_size
    )
    behaviour = measure_behaviour(gates, values, prompts, batch_size=options.batch_size)
    parameters = gates.start(options.start).to(setting.model.device).requires_grad_(True)
    if options.ablation == "optimal":
        prompts = prepare(prompts, setting.model, kl)
    losses = descend(Task(gates, values, prompts, behaviour, options, parameters), progress=progress)
    with torch.no_grad():
        ranks = gates.ranks(gates.scores(parameters).cpu())
    return LearnedEdges(ranks, _entered(nodes, ranks), losses, asdict(options))


def edge_mask_circuit(circuit: Circuit, mask: LearnedEdges, n: int, *, progress: bool = True) -> Circuit:
    """The n edges that a mask keeps longest, without those that lead nowhere, as a circuit like any other: these edges
    with their weights, and the nodes they join with their effects.

    The prompts are gone through once more, as when the circuit was found. Raises UserError where none of the edges is
    on a path to the metric.
    """
    chosen = strongest_edges(mask.edges, n)
    living = reaching(chosen, mask.nodes)
    joined = {site: torch.zeros_like(alive) for site, alive in living.items()}
    for (up, down), keep in chosen.items():
        into = keep if down is None else keep * living[down][:, None]
        joined[up] |= into.any(0)
        if down is not None:
            joined[down] |= into.any(1)
    nodes = masked_nodes(mask.nodes, torch.cat(list(joined.values())))
    if not count(nodes):
        raise UserError(f"none of the {n} edges kept longest is on a path to the metric: keep more")
    again = discovered_again(circuit, nodes, {"edges": n, **mask.options}, progress=progress)
    names = {(ids[0], ids[1]) for ids in mask.to_frame().head(n)[["upstream", "downstream"]].to_numpy().tolist()}
    of_site = {site: site_nodes.ids(site) for site, site_nodes in again.edge_nodes.items()}
    weights = {}
    for (up, down), of_pair in again.edges.items():
        ends = [METRIC] if down is None else of_site[down]
        weights[up, down] = of_pair * torch.tensor([[(u, d) in names for u in of_site[up]] for d in ends]).view_as(
            of_pair
        )
    return replace(again, edges=weights, edge_samples={}, edge_cases={})


class GatedEdges:
    """The model with a gate at every edge that has a weight (`mask_descent.Gated`): E edges in one vector, and behind
    the scores of edges those of the N nodes they join.
    """

    def __init__(self, setting: Setting, nodes: Nodes, edges: Edges) -> None:
        self.nodes, self.edges = nodes, edges
        self.table = NodeTable(setting.saes, [nodes], sites=list(nodes))
        self.study = EdgeStudy(setting, self.table, nodes, max_rows=0)
        device = setting.model.device
        self._entries = {pair: weights.flatten().nonzero()[:, 0].to(device) for pair, weights in edges.items()}
        self._weights = torch.cat([weights[weights != 0].abs() for weights in edges.values()])
        self.n = len(self._weights)
        first = dict(
            zip(nodes, [0, *torch.tensor([len(site) for site in nodes.values()]).cumsum(0).tolist()], strict=False)
        )
        ends: list[Tensor] = []  # numbers of the two nodes of every edge; N for the metric
        for (up, down), entry in self._entries.items():
            width = edges[up, down].shape[1]
            end = torch.full_like(entry, count(nodes)) if down is None else entry // width + first[down]
            ends.append(torch.stack([entry % width + first[up], end]))
        self._ends = torch.cat(ends, dim=1)  # [2, E]

    def start(self, start: str) -> Tensor:
        """[E + N]: -ln(rank) by |weight| of every edge, or 0; 0 of every node."""
        by_weight = torch.zeros(self.n)
        if start != "equal":
            order = self._weights.cpu().argsort(descending=True, stable=True)
            by_weight[order] = -torch.arange(1.0, self.n + 1).log()
        return torch.cat([by_weight, torch.zeros(count(self.nodes))])

    def scores(self, parameters: Tensor) -> Tensor:
        """[E + N] -> [E]: of an edge and its two nodes together; the metric has no score of its own."""
        of_nodes = torch.cat([parameters[self.n :], parameters.new_zeros(1)])
        return parameters[: self.n] + NODE_SHARE * of_nodes[self._ends].sum(0)

    def ranks(self, scores: Tensor) -> Edges:
        """[D, U] per pair: 1 for the edge of highest score, falling evenly towards 0; 0 for what is no edge."""
        weight = torch.empty(self.n)
        weight[scores.argsort(descending=True, stable=True)] = torch.arange(self.n, 0, -1) / self.n
        return {pair: gate[:, 0].cpu() for pair, gate in self._gates(weight[None].to(self._ends.device)).items()}

    def clean_sites(self, model: LanguageModel) -> list[Site]:
        """The sites without parents among the nodes, what is read for them, and the parents that no node is at."""
        saes = self.study.setting.saes
        sites: set[Site] = set()
        for site in (*self.nodes, Site("resid", model.n_layers)):
            parents = set(model.parents(site, [other for other in saes if other < site]).values())
            sites |= parents - set(self.nodes)
            if site in self.nodes and not parents & set(self.nodes):
                sites |= {site, saes.config(site).read_site(site)}
        return sorted(sites)

    def logits(
        self, model: LanguageModel, openings: Tensor, prompts: PromptSet, ablated: Values,
        clean: Mapping[Site, Tensor], *, grad: bool,
    ) -> Tensor:  # fmt: skip
        """Logits after every prompt [B, V] with these openings of the edges [B or 1, E]."""
        return EdgeRun(self.study, self._gates(openings), prompts, clean, ablated, grad=grad).logits()

    def _gates(self, openings: Tensor) -> EdgeGates:
        """[B or 1, E] -> [D, B or 1, U] per pair of sites; 0 for what is no edge."""
        sizes = [len(entry) for entry in self._entries.values()]
        gates = {}
        for (pair, entry), of_pair in zip(self._entries.items(), openings.split(sizes, dim=1), strict=True):
            shape = self.edges[pair].shape
            grid = openings.new_zeros(len(openings), shape[0] * shape[1]).index_copy(1, entry, of_pair)
            gates[pair] = grid.view(len(openings), *shape).transpose(0, 1)
        return gates


def _entered(nodes: Nodes, ranks: Edges) -> Nodes:
    """The nodes, each with the weight of the last edge that it takes to join it to the metric as edges come in by rank:
    the largest over its paths of the smallest weight on them.
    """
    effect = {site: torch.zeros(len(site_nodes)) for site, site_nodes in nodes.items()}
    for site in reversed(list(nodes)):
        for (up, down), weights in ranks.items():
            if up == site:
                through = weights if down is None else torch.minimum(weights, effect[down][:, None])
                if len(through):
                    effect[site] = torch.maximum(effect[site], through.max(0).values)
    return {site: replace(site_nodes, effect=effect[site]) for site, site_nodes in nodes.items()}
