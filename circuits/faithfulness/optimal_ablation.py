"""Optimal ablation: the constants with which the ablated model does best (Li & Janson 2024, arXiv 2409.09951).

A mean is a poor stand-in where the model is not linear: what follows may never see an input like it, and the damage is
then charged to what was ablated. The optimal constant takes the information away and does no other harm.

Legend: d model width, n chosen features of a site, V vocabulary.

1. Every node has one constant in every group of positions (circuits.prompts.alignment: template and position): a
   number f0_i for a feature, a vector e0 [d] for an error. x0 = f0 W_dec + b_dec + e0 follows from them, so that a
   model that keeps every node is the model itself. What is no node keeps its mean.
2. With M(x) the model's distribution after the prompt x and M_C(x; c) that of the model that keeps the circuit C and
   sets all other nodes to the constants c, c minimises the paper's loss

       L(c) = E_x E_C KL(M(x) || M_C(x; c))

   over the reference prompts x, clean and patch alike (were the clean prompts all of one kind, a constant could give
   the answer away), by Adam from the means, the learning rate falling to a tenth.
3. The paper has constants for one circuit. Here one set serves a curve over sizes: C is drawn uniformly from the
   curve's circuits *and the empty one*, so that m(C) at every size and m(empty) are measured with the same constants,
   and f = 0 means that nothing is kept. Random circuits and complements borrow these constants, optimal for neither.

With no node kept the model says the same after every prompt of a template; the best it can say is the mean of
M(x), and L is then the mean divergence from that mean: this is what the tests check.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from circuits.attribution.activations import Setting
from circuits.attribution.nodes import Nodes
from circuits.faithfulness.ablation import AblationValues, NodeTable, SiteValues, Values, ablation_edits
from circuits.metrics.metrics import kl, last_logits
from circuits.options import Ablation
from circuits.prompts.dataset import PromptSet
from sae._progress import ProgressBar
from sae.model.forward import with_gradients
from sae.model.language_model import LanguageModel, Tokens

NodeSet = tuple[Nodes, bool]
"""Nodes, and whether they are kept (all others ablated) or removed."""


STEP_PROMPTS = 64
"""Prompts of a step."""


@dataclass(frozen=True)
class FitOptions:
    """How constants are fitted."""

    steps: int = 150
    """Steps of gradient descent."""
    batch_size: int = 64
    """Prompts that go through the model at once; what is fitted does not depend on it."""
    learning_rate: float = 0.0015
    """Of Adam, in units of a group's mean activation (root mean square), falling to a tenth over the steps."""
    seed: int = 0
    """Seed of prompts and circuits."""


class OptimalValues:
    """Constants under training: what is added to the means, in units of the group's mean activation."""

    def __init__(self, values: AblationValues) -> None:
        self.values = values
        self.unit = {site: mean.x.square().mean(-1, keepdim=True).sqrt() for site, mean in values.tables.items()}
        self.shift = {
            site: [torch.zeros_like(x) for x in (mean.features, mean.error, mean.skip) if x is not None]
            for site, mean in values.tables.items()
        }  # features [groups, n], error [groups, d], and a skip connection's part [groups, d]

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The tensors that gradient descent moves; asks for their gradients."""
        return [tensor.requires_grad_(True) for of_site in self.shift.values() for tensor in of_site]

    def tables(self) -> Values:
        """x0 and e0 [groups, d] and f0 [groups, n] of every site."""
        tables = {}
        for site, mean in self.values.tables.items():
            features, error, *skip = (shift * self.unit[site] for shift in self.shift[site])
            decoder = self.values.setting.saes[site].W_dec[self.values.table.index[site]]
            x = mean.x + features @ decoder + error + sum(skip)
            shifted = mean.skip if mean.skip is None else mean.skip + skip[0]
            tables[site] = SiteValues(x, mean.error + error, mean.features + features, shifted)
        return tables

    def __call__(self, prompts: PromptSet) -> Values:
        """Values for a batch, through which gradients flow to the parameters."""
        return self.values.at_groups(prompts, self.tables())

    @torch.no_grad()
    def fixed(self) -> AblationValues:
        """Ablation values with these constants."""
        return self.values.with_tables(self.tables())


def ablation_values(
    setting: Setting,
    kind: Ablation,
    circuits: Sequence[NodeSet],
    *,
    nodes: Nodes,
    named: Sequence[Nodes] = (),
    reference: PromptSet,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> AblationValues:
    """Ablation values of a kind, for the circuits that are going to be measured (see 3.); `named`: further sets of
    nodes that are measured with them.
    """
    sets = [nodes] if kind == "optimal" else [*(one for one, _ in circuits), *named]
    table = NodeTable(setting.saes, sets, sites=list(nodes))
    values = AblationValues(setting, table, kind, reference=reference, seed=seed, batch_size=batch_size)
    if kind == "optimal":
        options = FitOptions(seed=seed, batch_size=batch_size)
        return fit_optimal_values(values, circuits, reference, options, progress=progress)
    return values


class Descent:
    """Adam on constants: `step` per loss, with the values of the moment for any batch."""

    def __init__(self, values: OptimalValues, *, learning_rate: float = FitOptions.learning_rate) -> None:
        self.values, self.learning_rate = values, learning_rate
        self.parameters = values.parameters
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate, betas=(0.9, 0.95))

    def __call__(self, prompts: PromptSet) -> Values:
        return self.values(prompts)

    def gradients(self, loss: torch.Tensor) -> list[torch.Tensor]:
        """The gradients of a loss in the parameters."""
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(self.parameters, gradients, strict=True)]

    def step(self, gradients: Sequence[torch.Tensor], done: float) -> None:
        """One step down the gradients; done: the share of all steps that went before."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * 0.1**done
        self.optimizer.step()


@with_gradients
def fit_optimal_values(
    values: AblationValues,
    circuits: Sequence[NodeSet],
    reference: PromptSet,
    options: FitOptions | None = None,
    *,
    progress: bool = True,
) -> AblationValues:
    """The ablation values that minimise L over the reference prompts and circuits (2.), from those given."""
    options = options or FitOptions()
    prompts = both_ends(reference, values.setting.model, batch_size=options.batch_size)
    descent = Descent(OptimalValues(values), learning_rate=options.learning_rate)
    generator = torch.Generator().manual_seed(options.seed)
    draw = dealer(len(circuits), generator)
    deal = dealer(len(prompts), generator, size=STEP_PROMPTS)
    bar = ProgressBar(range(options.steps), desc="optimal constants", unit="step", disable=not progress)
    for step in bar:
        nodes, keep = circuits[int(draw())]
        dealt, loss = deal(), 0.0
        total: list[torch.Tensor] = []
        for index in dealt.split(options.batch_size):
            batch = prompts[index]
            share = divergence(values, descent(batch), batch, nodes, keep=keep, grad=True).sum() / len(dealt)
            gradients = descent.gradients(share)
            total = [a + b for a, b in zip(total, gradients, strict=True)] if total else gradients
            loss += share.item()
        descent.step(total, step / options.steps)
        bar.set_postfix(kl=f"{loss:.3f}", refresh=False)
    return descent.values.fixed()


def divergence(
    values: AblationValues, ablated: Values, prompts: PromptSet, nodes: Nodes, *, keep: bool = True, grad: bool = False
) -> torch.Tensor:
    """KL(M(x) || M_C(x)) of every prompt, [B], with the ablation values `ablated` of the batch."""
    edits = ablation_edits(values.setting.saes, values.table, nodes, ablated, prompts, keep=keep)
    run = values.setting.model.run(prompts.clean, edits=edits, grad=grad, last_only=True)
    return kl(run.logits[:, -1], prompts)


@torch.no_grad()
def mean_divergence(
    values: AblationValues, circuits: Sequence[NodeSet], prompts: PromptSet, *, batch_size: int = 64
) -> float:
    """L of the ablation values on some prompts, in nats."""
    prompts = both_ends(prompts, values.setting.model, batch_size=batch_size)
    total = 0.0
    for batch in prompts.batches(batch_size):
        ablated = values(batch)
        total += sum(divergence(values, ablated, batch, nodes, keep=keep).sum().item() for nodes, keep in circuits)
    return total / len(prompts) / len(circuits)


@dataclass(frozen=True)
class Gain:
    """KL(M(x) || M_C(x)) in nats, mean over prompts and over the circuits of a curve, the empty one among them."""

    means: float
    """With the means the constants started from."""
    optimal: float
    """With the constants fitted."""

    def __str__(self) -> str:
        return f"KL to the whole model over these circuits {self.optimal:.3f} nats, {self.means:.3f} with means"


def gain(values: AblationValues, circuits: Sequence[NodeSet], prompts: PromptSet, *, batch_size: int = 64) -> Gain:
    """The loss that fitted constants save on prompts they were not fitted on (their clean ends)."""
    clean = replace(prompts, patch=None, patch_answers=None)
    at_first = values.with_tables(values.means)
    return Gain(*(mean_divergence(one, circuits, clean, batch_size=batch_size) for one in (at_first, values)))


def both_ends(prompts: PromptSet, model: LanguageModel, *, batch_size: int) -> PromptSet:
    """Clean prompts, then patch prompts, each with the model's own distribution after it as the reference of `kl`."""
    both = replace(prompts, patch=None, patch_answers=None)
    if prompts.patch is not None:
        clean, patch = prompts.clean, prompts.patch
        tokens = Tokens(
            torch.cat([clean.input_ids, patch.input_ids]), torch.cat([clean.attention_mask, patch.attention_mask])
        )
        both = replace(both[[*range(len(prompts))] * 2], clean=tokens)
    return replace(both, reference=last_logits(model, both, batch_size=batch_size).log_softmax(-1))


def dealer(n: int, generator: torch.Generator, *, size: int = 1) -> Callable[[], torch.Tensor]:
    """A function that deals `size` of n numbers at a time, shuffling anew when none is left."""
    left = torch.empty(0, dtype=torch.long)

    def deal() -> torch.Tensor:
        nonlocal left
        if not len(left):
            left = torch.randperm(n, generator=generator)
        dealt, left = left[:size], left[size:]
        return dealt

    return deal
