"""Descent on the gates of a mask: steps 1 to 5 of `learned_mask`, whatever the gates are at.

Legend: B prompts, S positions, d model width, V vocabulary, N gates, P learned numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import pad

from circuits.faithfulness.ablation import AblationValues, Values
from circuits.faithfulness.mask_gates import budget_gates, mask_loss
from circuits.faithfulness.optimal_ablation import Descent, OptimalValues, dealer
from circuits.metrics.metrics import kl
from circuits.options import MaskOptions
from circuits.prompts.dataset import PromptSet
from sae._progress import ProgressBar
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.sites import Site

STEP_PROMPTS = 64
"""Prompts of a step."""
COLDEST, SLOWEST = 0.02, 0.1
"""Factors of temperature and learning rate at the end."""


class Gated(Protocol):
    """A model with N gates, at nodes or at edges."""

    n: int
    """N."""

    def scores(self, parameters: torch.Tensor) -> torch.Tensor:
        """The score of every gate [N], from what is learned [P]."""

    def clean_sites(self, model: LanguageModel) -> list[Site]:
        """The sites whose clean activations a run is given."""

    def logits(
        self, model: LanguageModel, openings: torch.Tensor, prompts: PromptSet, ablated: Values,
        clean: Mapping[Site, torch.Tensor], *, grad: bool,
    ) -> torch.Tensor:  # fmt: skip
        """Logits after every prompt [B, V] with these openings of the gates [B or 1, N]."""


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


@dataclass(frozen=True)
class Behaviour:
    """The behaviour to be reached with what stays, and the values that no mask changes."""

    target: torch.Tensor
    """[B] m(M) of every prompt."""
    scale: float
    """Mean distance from m(M) to m with nothing kept."""
    clean: dict[Site, torch.Tensor]
    """Clean activations [B, S, d] of the sites that `Gated.clean_sites` names."""


@torch.no_grad()
def measure_behaviour(gates: Gated, values: AblationValues, prompts: PromptSet, *, batch_size: int) -> Behaviour:
    """Run the whole model, and the model with every gate closed, on all prompts."""
    of_model, of_none, clean = [], [], []
    model, metric, needed = values.setting.model, values.setting.metric, gates.clean_sites(values.setting.model)
    none = torch.zeros(1, gates.n, device=model.device)
    for batch in prompts.batches(batch_size):
        run = model.run(batch.clean, capture=needed, last_only=True)
        of_model.append(metric(run.logits[:, -1], batch))
        clean.append(run.activations)
        of_none.append(metric(gates.logits(model, none, batch, values(batch), run.activations, grad=False), batch))
    target = torch.cat(of_model)
    scale = (torch.cat(of_none) - target).mean().abs().item()
    if scale < 1e-9:
        raise UserError("with nothing kept the metric is as it is: there is nothing to learn a mask for")
    longest = prompts.clean.n_positions  # a batch is trimmed to its own longest prompt
    padded = [{site: pad(x, (0, 0, longest - x.shape[1], 0)) for site, x in batch.items()} for batch in clean]
    return Behaviour(target, scale, {site: torch.cat([batch[site] for batch in padded]) for site in needed})


@dataclass(frozen=True)
class Task:
    """The setting of all steps of a descent, and the numbers that are learned."""

    gates: Gated
    values: AblationValues
    prompts: PromptSet
    behaviour: Behaviour
    options: MaskOptions
    parameters: torch.Tensor
    """[P] what scores are made of."""


@torch.enable_grad()
def descend(task: Task, *, progress: bool) -> list[float]:
    """Adam on the parameters, in place; the loss of every step."""
    options, parameters = task.options, task.parameters
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.Adam([parameters], lr=options.learning_rate, betas=(0.9, 0.95))
    optimal = Descent(OptimalValues(task.values)) if options.ablation == "optimal" else None
    smallest, largest = budget_range(task.gates.n, options)
    losses, deal = [], dealer(len(task.prompts), generator, size=STEP_PROMPTS)
    bar = ProgressBar(range(options.steps), desc="mask", unit="step", disable=not progress)
    for step in bar:
        done = step / options.steps
        optimizer.param_groups[0]["lr"] = options.learning_rate * SLOWEST**done
        index = deal()
        budgets = draw_budgets(len(index), smallest=smallest, largest=largest, generator=generator).to(
            parameters.device
        )
        drawn = _Step(task, index, budgets, options.temperature * COLDEST**done)
        loss, gradients = drawn.loss_and_gradients(optimal)
        parameters.grad = gradients[0]
        optimizer.step()
        if optimal:
            optimal.step(gradients[1:], done)
        losses.append(loss)
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


@dataclass(frozen=True)
class _Step:
    """The prompts of a step with what each is given."""

    task: Task
    index: torch.Tensor
    """[B] the prompts of the step."""
    budgets: torch.Tensor
    """[B] how many nodes, or edges, each is given."""
    temperature: float

    def loss_and_gradients(self, optimal: Descent | None) -> tuple[float, list[torch.Tensor]]:
        """The loss of all prompts of the step; its gradient in the parameters, then that of the mean divergence in the
        optimal ablation values, where these are learned.
        """
        batches = list(torch.arange(len(self.index)).split(self.task.options.batch_size))
        if len(batches) > 1:
            return self._by_batches(batches, optimal)
        shortfall, divergence = self._run(batches[0], optimal)
        loss = self._loss(shortfall)
        gradients = torch.autograd.grad(loss, self.task.parameters, retain_graph=optimal is not None)
        return loss.item(), [*gradients, *(optimal.gradients(divergence.mean()) if optimal else ())]

    def _by_batches(self, batches: list[torch.Tensor], optimal: Descent | None) -> tuple[float, list[torch.Tensor]]:
        """The same in batches that fit the model.

        Prompts are averaged before they are squared, so that the gradient of one depends on all others. A run without
        gradients gives every prompt's shortfall; the gradient of the loss in these, [B], is the weight with which each
        prompt enters a second run, batch by batch. Random ablation values are the same in both.
        """
        random_state = self.task.values.draw_state()
        with torch.no_grad():
            shortfall = torch.cat([self._run(rows, optimal)[0] for rows in batches])
        with torch.enable_grad():
            loss = self._loss(shortfall.requires_grad_(True))
            (weight,) = torch.autograd.grad(loss, shortfall)  # [B]
        self.task.values.draw_state(random_state)
        total: list[torch.Tensor] = []
        for rows in batches:
            of_batch, divergence = self._run(rows, optimal)
            weighted = (of_batch * weight[rows]).sum()
            gradients = [*torch.autograd.grad(weighted, self.task.parameters, retain_graph=optimal is not None)]
            gradients += optimal.gradients(divergence.sum() / len(self.index)) if optimal else []
            total = [a + b for a, b in zip(total, gradients, strict=True)] if total else gradients
        return loss.item(), total

    def _loss(self, shortfall: torch.Tensor) -> torch.Tensor:
        cases = [self.task.prompts.cases[row] for row in self.index.tolist()]
        return mask_loss(shortfall, self.budgets, cases, match=self.task.options.match)

    def _run(self, rows: torch.Tensor, optimal: Descent | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(m(C) - m(M)) / scale of the prompts `rows` of the step, and their divergence where values are learned."""
        task, behaviour, index = self.task, self.task.behaviour, self.index[rows]
        batch = task.prompts[index]
        scores, budgets = task.gates.scores(task.parameters), self.budgets[rows.to(self.budgets.device)]
        openings = budget_gates(scores, budgets, temperature=self.temperature)
        chosen, width = index.to(behaviour.target.device), batch.clean.n_positions
        clean = {site: x[chosen, -width:] for site, x in behaviour.clean.items()}
        model, metric = task.values.setting.model, task.values.setting.metric
        logits = task.gates.logits(model, openings, batch, (optimal or task.values)(batch), clean, grad=True)
        shortfall = (metric(logits, batch) - behaviour.target[chosen]) / behaviour.scale
        return shortfall, kl(logits, batch) if optimal else shortfall.detach()
