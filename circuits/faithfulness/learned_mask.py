"""Learned masks: which nodes to keep, by gradient descent on the behaviour of what is kept.

Attribution scores nodes one by one; a mask is learned for all of them together, so nodes that only matter jointly
are kept and redundant ones are not (Cao et al. 2021, arXiv 2104.03514; Bhaskar et al. 2024, arXiv 2406.16778; for
latents of sparse autoencoders Caples et al. 2025).

Legend: B prompts, S positions, d model width, N nodes, n chosen features of a site.

1. A node has one score s. At a budget of k nodes its gate is sigmoid((s - s_(k)) / T), with s_(k) between the k-th
   highest score and the next, and T cooled from `temperature` to a fiftieth of it, so that in the end all but
   the nodes ranked close to k are open or closed (annealed sigmoids as in Savarese et al. 2020, arXiv 1912.04427).
2. At every site from the start site on, with the ablation values x0, f0, e0 of `circuits.faithfulness.ablation`,
   x' = x0 + sum_i gate_i (f_i - f0_i) W_dec[i] + gate_err (e - e0).
3. Every prompt of a batch draws its own budget, log-uniformly. One run so serves all sizes: no penalty on the number
   of nodes has to be tuned, and the order of the scores is a nested ranking (the idea of Matryoshka
   representations, Kusupati et al. 2022, arXiv 2205.13147).
4. Loss: ((m(C) - m(M)) / scale)^2, scale the distance of mean m from the whole model M to no node; overshooting costs
   as much as falling short. Faithfulness is a ratio of means, so m is averaged first, over `GROUP` prompts of one case
   with neighbouring budgets (`match` cases): were cases averaged together, too much of one could pay for too little
   of another. To match every prompt by itself (`match` prompts) takes about twice as many nodes.
5. With optimal ablation the constants (circuits.faithfulness.optimal_ablation) are learned in the same steps, by their
   own loss.
6. Scores start at -ln(rank) by |effect|, so that a budget's threshold is about -ln(k), or all alike.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from circuits._results import format_table
from circuits._tensors import flatten
from circuits.attribution.activations import Setting
from circuits.attribution.nodes import Nodes, count, select_nodes
from circuits.circuit import Circuit
from circuits.discovery.discover import discover
from circuits.faithfulness.ablation import AblationValues
from circuits.faithfulness.mask_descent import Task, descend, measure_behaviour
from circuits.faithfulness.mask_gates import Gates
from circuits.faithfulness.nodes import set_up
from circuits.metrics.metrics import kl, prepare
from circuits.options import DiscoverOptions, MaskOptions
from circuits.prompts.dataset import PromptSet
from sae._files import write_tensors
from sae._frames import Result
from sae._run.outputs import check_output, has_header
from sae.model.sites import Site

FOUND_WITH = ("model", "saes", "saes_fingerprint", "prompts", "prompts_fingerprint", "examples", "site_paths",
              "span_template", "need_spans", "title")  # fmt: skip
"""Metadata that say where a circuit comes from."""


@dataclass(frozen=True)
class LearnedMask(Result):
    """A learned mask on nodes."""

    nodes: Nodes
    """The masked nodes, in each site first those kept longest; `effect` is 1 for the node of highest score over all
    sites and falls evenly towards 0, so that whatever takes the strongest nodes takes the mask's.
    """
    scores: dict[Site, torch.Tensor]
    """[n] per site in the order of `nodes`; only differences mean something."""
    losses: list[float]
    """Loss of every step: squared shortfall in units of the behaviour."""
    options: dict[str, Any]
    """Options that it was learned with."""

    def to_frame(self) -> pd.DataFrame:
        """One row a node, those kept longest first: node, site, score, and its rank from 1."""
        rows = [
            {"node": name, "site": site.name, "score": score}
            for site, nodes in self.nodes.items()
            for name, score in zip(nodes.ids(site), self.scores[site].tolist(), strict=True)
        ]
        ranking = pd.DataFrame(rows).sort_values("score", ascending=False, kind="stable", ignore_index=True)
        return ranking.assign(rank=range(1, len(ranking) + 1))

    def text(self) -> str:
        """The nodes kept longest, and the last loss."""
        strongest = self.to_frame().head(20).set_index("node").rename_axis(None)[["score"]].map("{:.3f}".format)
        return f"loss {self.losses[-1]:.3f} after {len(self.losses)} steps\n{format_table(strongest)}"

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write nodes, ranks and scores as .safetensors, whose header says `kind: mask`; `overwrite` as in `Result`."""
        path = Path(path)
        check_output(path, has_header(kind="mask"), overwrite=overwrite)
        tensors = flatten(self.nodes) | {f"{site}/score": scores for site, scores in self.scores.items()}
        write_tensors(path, tensors, metadata={"kind": "mask"})
        return path


def learn_mask(
    circuit: Circuit,
    prompts: PromptSet | None = None,
    options: MaskOptions | None = None,
    *,
    reference: PromptSet | None = None,
    progress: bool = True,
) -> LearnedMask:
    """Rank the nodes of a circuit by which of them to keep, learned for all of them together.

    Args:
        circuit: The circuit, whose model, SAEs, nodes and metric are used.
        prompts: What to learn on; the prompts the circuit was found on by default.
        options: Steps, ablation, start site and what has to match.
        reference: Prompts whose means or values masked nodes take, `prompts` by default.
        progress: Whether to show a progress bar.

    Returns:
        The ranking; `measure_faithfulness` takes its `nodes`.

    Raises:
        UserError: If ablating every node changes nothing.
    """
    prompts = circuit.prompts if prompts is None else prompts
    return learn_node_mask(circuit.setting(), circuit.nodes, prompts, options, reference=reference, progress=progress)


def mask_circuit(circuit: Circuit, mask: LearnedMask, n: int, *, progress: bool = True) -> Circuit:
    """The n nodes that a mask keeps longest as a circuit like any other: with their effects, and edges among them.

    The prompts are gone through once more, as when the circuit was found.
    """
    return discovered_again(circuit, select_nodes(mask.nodes, top=n), {"nodes": n, **mask.options}, progress=progress)


def discovered_again(circuit: Circuit, nodes: Nodes, mask: dict[str, Any], *, progress: bool) -> Circuit:
    """A circuit of these nodes of another alone, with edges among all of them; `mask`: how they were chosen."""
    metadata = circuit.metadata
    options = {field.name: metadata["options"][field.name] for field in fields(DiscoverOptions)
               if field.name in metadata["options"]}  # fmt: skip
    provenance = {key: metadata[key] for key in FOUND_WITH if key in metadata}
    again = discover(
        circuit.model, circuit.saes, circuit.prompts, DiscoverOptions(**{**options, "edge_nodes": count(nodes)}),
        metric=circuit.metric, provenance={**provenance, "mask": mask},
        only=nodes, progress=progress,
    )  # fmt: skip
    named = {**again.metadata["options"], "metric": metadata["options"]["metric"]}
    return replace(again, features=circuit.features, metadata={**again.metadata, "options": named})


def learn_node_mask(
    setting: Setting,
    nodes: Nodes,
    prompts: PromptSet,
    options: MaskOptions | None = None,
    *,
    reference: PromptSet | None = None,
    progress: bool = True,
) -> LearnedMask:
    """`learn_mask` of any nodes with effects, as `Circuit.nodes`."""
    options = options or MaskOptions()
    nodes, prompts, reference, _ = set_up(setting, nodes, prompts, reference, options)
    gates = Gates(setting.saes, nodes, errors=options.errors)
    values = AblationValues(
        setting, gates.table, options.ablation, reference=reference, seed=options.seed, batch_size=options.batch_size
    )
    behaviour = measure_behaviour(gates, values, prompts, batch_size=options.batch_size)
    scores = starting_scores(nodes, options.start).to(setting.model.device).requires_grad_(True)
    if options.ablation == "optimal":
        prompts = prepare(prompts, setting.model, kl)
    losses = descend(Task(gates, values, prompts, behaviour, options, scores), progress=progress)
    return _ranked(nodes, scores.detach().cpu(), losses, options)


def starting_scores(nodes: Nodes, start: str) -> torch.Tensor:
    """[N]: -ln(rank) by |effect| over all sites, or the same for all nodes."""
    effect = torch.cat([of_site.effect.abs() for of_site in nodes.values()])
    if start == "equal":
        return torch.zeros(len(effect))
    rank = torch.empty(len(effect))
    rank[effect.argsort(descending=True, stable=True)] = torch.arange(1.0, len(effect) + 1)
    return -rank.log()


def _ranked(nodes: Nodes, scores: torch.Tensor, losses: list[float], options: MaskOptions) -> LearnedMask:
    """Nodes and scores sorted within each site, effects by rank over all sites."""
    n = len(scores)
    effect = torch.empty(n)
    effect[scores.argsort(descending=True, stable=True)] = torch.arange(n, 0, -1) / n
    ranked, sorted_scores = {}, {}
    sizes = [len(of_site) for of_site in nodes.values()]
    by_site = zip(nodes.items(), effect.split(sizes), scores.split(sizes), strict=True)
    for (site, of_site), effects, site_scores in by_site:
        order = effects.argsort(descending=True)
        ranked[site] = replace(of_site[order], effect=effects[order])
        sorted_scores[site] = site_scores[order]
    return LearnedMask(ranked, sorted_scores, losses, asdict(options))
