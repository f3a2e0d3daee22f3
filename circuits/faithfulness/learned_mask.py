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

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.nn.functional import pad

from circuits._results import Result, format_table
from circuits.attribution.nodes import Nodes
from circuits.circuit import Circuit
from circuits.faithfulness.ablation import AblationValues
from circuits.faithfulness.mask_gates import Gates, budget_gates, mask_loss, masked_logits
from circuits.faithfulness.nodes import aligned, from_start_site
from circuits.faithfulness.optimal_ablation import Constants, Descent, dealer
from circuits.faithfulness.options import MaskOptions
from circuits.metrics.metrics import Metric, get_metric, kl, prepare
from circuits.metrics.probe import read_by
from circuits.prompts.dataset import PromptSet
from sae._files import write_tensors
from sae._progress import ProgressBar
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.splice import ensure_checked

STEP_PROMPTS = 64
"""Prompts of a step."""
COLDEST, SLOWEST = 0.02, 0.1
"""What is left of temperature and learning rate at the end."""


@dataclass(frozen=True)
class LearnedMask(Result):
    """What was learned."""

    nodes: Nodes
    """The masked nodes, in each site first those kept longest; `effect` is 1 for the node of highest score over all
    sites and falls evenly towards 0, so that whatever takes the strongest nodes takes the mask's.
    """
    scores: dict[Site, torch.Tensor]
    """[n] per site in the order of `nodes`; only differences mean something."""
    losses: list[float]
    """Loss of every step: squared shortfall in units of the behaviour."""
    options: dict[str, Any]
    """What it was learned with."""

    def to_frame(self) -> pd.DataFrame:
        """One row a node, those kept longest first: node, site, score, and its rank from 1."""
        rows = [
            {"node": name, "site": site.name, "score": score}
            for site, nodes in self.nodes.items()
            for name, score in zip(nodes.ids(site), self.scores[site].tolist(), strict=True)
        ]
        frame = pd.DataFrame(rows).sort_values("score", ascending=False, kind="stable", ignore_index=True)
        return frame.assign(rank=range(1, len(frame) + 1))

    def text(self) -> str:
        """The nodes kept longest, and the last loss."""
        strongest = self.to_frame().head(20).set_index("node").rename_axis(None)[["score"]].map("{:.3f}".format)
        return f"loss {self.losses[-1]:.3f} after {len(self.losses)} steps\n{format_table(strongest)}"

    def save(self, path: str | Path) -> Path:
        """Write nodes, ranks and scores as .safetensors, whose header says `kind: mask`."""
        path = Path(path)
        tensors: dict[str, torch.Tensor] = {}
        for site, nodes in self.nodes.items():
            named = {"feature": nodes.feature, "position": nodes.position, "effect": nodes.effect}
            tensors |= {f"{site.name}/{name}": tensor for name, tensor in named.items()}
            tensors[f"{site.name}/score"] = self.scores[site]
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
    return learn_node_mask(
        circuit.model, circuit.saes, circuit.nodes, prompts, options, reference=reference, metric=circuit.metric,
        progress=progress,
    )  # fmt: skip


def learn_node_mask(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    nodes: Nodes,
    prompts: PromptSet,
    options: MaskOptions | None = None,
    *,
    reference: PromptSet | None = None,
    metric: str | Metric = "logit_difference",
    progress: bool = True,
) -> LearnedMask:
    """`learn_mask` of any nodes with effects, as `Circuit.nodes`."""
    options = options or MaskOptions()
    m = get_metric(metric)
    ensure_checked(model, saes, nodes)
    prompts = prepare(prompts, model, m)
    model = read_by(model, m)
    nodes = from_start_site(nodes, options.start_site, errors=options.errors)
    reference, prompts, _ = aligned(reference or prompts, prompts, options.ablation)
    gates = Gates(saes, nodes, errors=options.errors)
    values = AblationValues(
        model, saes, gates.table, options.ablation, reference=reference, seed=options.seed,
        batch_size=options.batch_size,
    )  # fmt: skip
    target, scale, before = whole_and_empty(model, gates, values, prompts, m, options.batch_size)
    scores = starting_scores(nodes, options.start).to(model.device).requires_grad_(True)
    if options.ablation == "optimal":
        prompts = prepare(prompts, model, kl)
    losses = _descend(gates, scores, prompts, values, target, before, m, scale, options, progress=progress)
    return _ranked(nodes, scores.detach().cpu(), losses, options)


def starting_scores(nodes: Nodes, start: str) -> torch.Tensor:
    """[N]: -ln(rank) by |effect| over all sites, or the same for all nodes."""
    effect = torch.cat([here.effect.abs() for here in nodes.values()])
    if start == "equal":
        return torch.zeros(len(effect))
    rank = torch.empty(len(effect))
    rank[effect.argsort(descending=True, stable=True)] = torch.arange(1.0, len(effect) + 1)
    return -rank.log()


def budget_range(n: int, options: MaskOptions) -> tuple[int, int]:
    """Smallest and largest budget of n nodes: what the options say, as far as there are nodes."""
    largest = min(n, options.largest or max(1, n // 3, options.smallest or 1))
    return min(largest, options.smallest or max(1, n // 50)), largest


def draw_budgets(n: int, *, smallest: int, largest: int, generator: torch.Generator) -> torch.Tensor:
    """n numbers of nodes, one from each of n equal parts of [ln smallest, ln largest], in random order."""
    share = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    share = share[torch.randperm(n, generator=generator)]
    log = math.log(smallest) + share * (math.log(largest) - math.log(smallest))
    return log.exp().round().long().clamp(smallest, largest)


@torch.no_grad()
def whole_and_empty(
    model, gates, values, prompts, metric, batch_size
) -> tuple[torch.Tensor, float, dict[Site, torch.Tensor]]:
    """m(M) of every prompt [B], the mean distance from m(M) to m(no node), and what no mask changes: clean
    activations [B, S, d] of the sites a run has to be given to begin at the first masked site.
    """
    whole, empty, before = [], [], []
    none = torch.zeros(1, gates.n, device=model.device)
    first = gates.table.sites[0]
    earlier = [site for site in model.sites if site < first]
    blocks = [site for site in earlier if site.kind == "resid"]
    needed = [*blocks[-1:], *(site for site in earlier if not blocks or site > blocks[-1])]
    for batch in prompts.batches(batch_size):
        run = model.run(batch.clean, capture=needed, last_only=True)
        whole.append(metric(run.logits[:, -1], batch))
        before.append(run.activations)
        run = model.run(batch.clean, edits=gates.edits(none, values(batch), batch), last_only=True)
        empty.append(metric(run.logits[:, -1], batch))
    target = torch.cat(whole)
    scale = (torch.cat(empty) - target).mean().abs().item()
    if scale < 1e-9:
        raise UserError("ablating every node leaves the metric as it is: there is nothing to learn a mask for")
    longest = prompts.clean.n_positions  # a batch is trimmed to its own longest prompt
    padded = [{site: pad(x, (0, 0, longest - x.shape[1], 0)) for site, x in part.items()} for part in before]
    return target, scale, {site: torch.cat([part[site] for part in padded]) for site in needed}


@torch.enable_grad()
def _descend(
    gates, scores, prompts, values: AblationValues, target, before, metric, scale, options: MaskOptions, *, progress
) -> list[float]:
    """Adam on the scores, in place; the loss of every step."""
    generator = torch.Generator().manual_seed(options.seed)
    optimiser = torch.optim.Adam([scores], lr=options.learning_rate, betas=(0.9, 0.95))
    constants = Descent(Constants(values)) if options.ablation == "optimal" else None
    smallest, largest = budget_range(gates.n, options)
    losses, deal = [], dealer(len(prompts), generator, size=STEP_PROMPTS)
    bar = ProgressBar(range(options.steps), desc="mask", unit="step", disable=not progress)
    for step in bar:
        done = step / options.steps
        optimiser.param_groups[0]["lr"] = options.learning_rate * SLOWEST**done
        index = deal()
        budgets = draw_budgets(len(index), smallest=smallest, largest=largest, generator=generator).to(scores.device)
        temperature = options.temperature * COLDEST**done
        parts = _Parts(gates, scores, prompts, index, budgets, temperature, values, target, before, metric, scale)
        loss, gradients = parts.loss_and_gradients(options, constants)
        scores.grad = gradients[0]
        optimiser.step()
        if constants:
            constants.step(gradients[1:], done)
        losses.append(loss)
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


@dataclass(frozen=True)
class _Parts:
    """The prompts of a step, which go through the model in parts of a batch."""

    gates: Gates
    scores: torch.Tensor
    prompts: PromptSet
    index: torch.Tensor
    """[B] the prompts of the step."""
    budgets: torch.Tensor
    """[B] how many nodes each is given."""
    temperature: float
    values: AblationValues
    target: torch.Tensor
    before: Mapping[Site, torch.Tensor]
    metric: Metric
    scale: float

    def loss_and_gradients(self, options: MaskOptions, constants: Descent | None) -> tuple[float, list[torch.Tensor]]:
        """The loss of all prompts of the step; its gradient in the scores, then that of the mean divergence in the
        constants.

        Prompts are averaged before they are squared, so where there are several parts a run without gradients says
        first how much each prompt weighs. Random ablation values are the same in both.
        """
        parts = list(torch.arange(len(self.index)).split(options.batch_size))
        drawn = self.values.draw_state()
        if len(parts) == 1:
            off, divergence = self._run(parts[0], constants)
            loss = self._loss(off, options)
            gradients = torch.autograd.grad(loss, self.scores, retain_graph=constants is not None)
            return loss.item(), [*gradients, *(constants.gradients(divergence.mean()) if constants else ())]
        with torch.no_grad():
            off = torch.cat([self._run(rows, constants)[0] for rows in parts])
        with torch.enable_grad():
            off = off.requires_grad_(True)
            loss = self._loss(off, options)
            (weight,) = torch.autograd.grad(loss, off)  # [B]
        self.values.draw_state(drawn)
        total: list[torch.Tensor] = []
        for rows in parts:
            part, divergence = self._run(rows, constants)
            keep = constants is not None
            found = [*torch.autograd.grad((part * weight[rows]).sum(), self.scores, retain_graph=keep)]
            found += constants.gradients(divergence.sum() / len(self.index)) if constants else []
            total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        return loss.item(), total

    def _loss(self, off: torch.Tensor, options: MaskOptions) -> torch.Tensor:
        cases = [self.prompts.cases[row] for row in self.index.tolist()]
        return mask_loss(off, self.budgets, cases, match=options.match)

    def _run(self, rows: torch.Tensor, constants: Descent | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(m(C) - m(M)) / scale of the prompts `rows` of the step, and their divergence where constants are learned."""
        model, first, index = self.values.model, self.gates.table.sites[0], self.index[rows]
        batch = self.prompts[index]
        at = budget_gates(self.scores, self.budgets[rows.to(self.budgets.device)], temperature=self.temperature)
        chosen, width = index.to(self.target.device), batch.clean.n_positions
        skip = model.resume_from(first, {site: x[chosen, -width:] for site, x in self.before.items()})
        logits = masked_logits(model, self.gates, at, batch, (constants or self.values)(batch), skip=skip)
        off = (self.metric(logits, batch) - self.target[chosen]) / self.scale
        return off, kl(logits, batch) if constants else off.detach()


def _ranked(nodes: Nodes, scores: torch.Tensor, losses: list[float], options: MaskOptions) -> LearnedMask:
    """Nodes and scores sorted within each site, effects by rank over all sites."""
    n = len(scores)
    effect = torch.empty(n)
    effect[scores.argsort(descending=True, stable=True)] = torch.arange(n, 0, -1) / n
    ranked, sorted_scores = {}, {}
    sizes = [len(here) for here in nodes.values()]
    for (site, here), effects, part in zip(nodes.items(), effect.split(sizes), scores.split(sizes), strict=True):
        order = effects.argsort(descending=True)
        ranked[site] = replace(here[order], effect=effects[order])
        sorted_scores[site] = part[order]
    return LearnedMask(ranked, sorted_scores, losses, asdict(options))
