"""Choosing which features to edit: those that remove the behaviour in every case and cost little elsewhere.

A set of features is worth, on training prompts and training text,

    left + penalty * cost,   left = rms over cases of |m after| / rms over cases of |m before|,

cost being what the edit adds to the cross-entropy at predictions that are none of the behaviour's, in nats. The root
mean square over cases grows when a case turns round or is left over, so that "always plural" counts for nothing.

1. Candidates: of the features of largest |effect|, those with most |effect| beyond `penalty` times their side effect to
   first order, the mean over tokens of |(f' - f) W_dec . dCE/dx|.
2. Each is tried alone, and the best in pairs: two features often hold one quantity between them.
3. The set grows greedily from the best of these: in each round the candidates that gained most when they were last
   tried are tried beside the set, and the best one joins it. After that, features without which it does as well leave.
4. Several sets are tried in one pass, as copies of the batch with edits of their own.
5. Features set to their mean take away what they hold, and errors and other features hold some of it as well: the
   chosen set is tried at other strengths (beyond 1 it is mirrored about the mean a little), and the best one is taken.

6. Where nothing surgical can be had, because a late feature writes what much else needs as well, features before it
   may still be had for almost nothing: a set of them is grown in the same way at `CHEAP` times the penalty. It is
   chosen where it is worth more, else the report names it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import combinations

import torch

from circuits.circuit import Circuit
from circuits.editing.applied import FeatureEdits, with_references
from circuits.editing.declaration import Edit
from circuits.editing.measures import answers_of, rows_by_case
from circuits.editing.records import Choice, Step
from circuits.editing.site_edit import FeatureReader
from circuits.editing.text_cost import OtherText, Standing, copies, run_copies
from circuits.metrics.metrics import Metric, has_shares, prepare
from circuits.metrics.probe import Probe
from circuits.options import Operation
from circuits.prompts.dataset import PromptSet
from sae._progress import ProgressBar
from sae.autoencoder import SparseAutoencoder
from sae.data.batches import token_batches
from sae.errors import UserError
from sae.model.forward import with_gradients
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.saes import as_saes

PENALTY = 3.0
"""Weight of a nat elsewhere: a hundredth of a nat is worth three hundredths of the behaviour."""
CHEAP = 10
"""How many times more it weighs for the features before the dearest."""
STRONGEST, CANDIDATES, PAIRED, TRIED, MOST = 200, 30, 6, 8, 16
"""Features whose side effect is estimated; those tried alone; in pairs; in each round; and how many are chosen."""
GAIN = 0.005
"""Share of the behaviour that a step has to gain."""
STRENGTHS = (0.75, 1.25, 1.5)
"""Strengths at which means are tried beside 1."""
BATCH_SIZE = 64


def choose_surgical(
    circuit: Circuit,
    prompts: PromptSet | None = None,
    *,
    texts: Sequence[str],
    operation: Operation = "mean",
    penalty: float = PENALTY,
    answers: Sequence[int] = (),
    progress: bool = True,
) -> tuple[Edit, Choice]:
    """Choose features of a circuit whose edit removes the behaviour in every case at little cost elsewhere.

    Args:
        circuit: The circuit, whose model, SAEs, effects and metric are used.
        prompts: What to choose on; those the circuit was found on by default. Measure on others.
        texts: Other text to choose on, and to take means from. Measure on other text.
        operation: What the features become: `mean`, `zero` or `resample`.
        penalty: What a nat of cross-entropy elsewhere weighs against all of the behaviour.
        answers: Further tokens that answer the behaviour, beside those of the prompts: not elsewhere.
        progress: Whether a bar counts the sets that were tried.

    Returns:
        The edit, with what it refers to, and how it was chosen.

    Raises:
        UserError: Where the metric says nothing of what is left, the prompts show nothing of the behaviour, or the
            circuit has no feature.
    """
    prompts = circuit.prompts if prompts is None else prompts
    model, saes, metric = circuit.model, circuit.saes, circuit.metric
    if not has_shares(metric) or isinstance(metric, Probe):
        raise UserError("features are chosen by the share of the behaviour that is left: this metric has no such share")
    strongest = effect_by_feature(circuit, STRONGEST)
    if not strongest:
        raise UserError("no feature of this circuit has an effect: there is nothing to edit")
    begin = time.perf_counter()
    batches = list(token_batches(model, sorted(texts, key=len), max_tokens=None, batch_size=BATCH_SIZE))
    text = OtherText(model, batches, [*answers_of(prompts), *answers])
    bar = ProgressBar(desc="choose", unit="set", disable=not progress)
    search = _Search(model, saes, prepare(prompts, model, metric), metric, text, penalty, bar)
    edit = with_references(model, saes, Edit(list(strongest), operation), texts=batches)
    search.numbers = {name: _alone(edit, name) for name in strongest}
    candidates = search.screened(strongest)
    with bar:
        chosen, dearest, earlier = search.chosen(candidates, strongest)
        strength = search.strengthened(chosen) if operation == "mean" else 1.0
    choice = Choice(
        chosen, search.steps, penalty, len(candidates), len(search.trials), time.perf_counter() - begin, earlier,
        dearest,
    )  # fmt: skip
    reference = {name: number for name, number in edit.reference.items() if name in chosen}
    return Edit(chosen, operation, strength=strength, reference=reference), choice


def effect_by_feature(circuit: Circuit, n: int) -> dict[str, float]:
    """The n features of largest |effect|, summed over the positions or spans where the circuit keeps these apart."""
    effect: dict[str, float] = {}
    for site, nodes in circuit.nodes.items():
        features = nodes[nodes.is_feature]
        for index, value in zip(features.feature.tolist(), features.effect.tolist(), strict=True):
            name = f"{site.name}/{index}"
            effect[name] = effect.get(name, 0.0) + abs(value)
    return dict(sorted(effect.items(), key=lambda item: -item[1])[:n])


def before(name: str, effect: Mapping[str, float]) -> dict[str, float]:
    """The features at earlier sites than a feature's, with their effects."""
    site = Site.parse(name.partition("/")[0])
    return {other: value for other, value in effect.items() if Site.parse(other.partition("/")[0]) < site}


def _alone(edit: Edit, name: str) -> Edit:
    reference = {name: edit.reference[name]} if name in edit.reference else {}
    return Edit([name], edit.operation, edit.value, reference=reference)


@dataclass
class _Search:
    """A search: what it may try, and the results so far."""

    model: LanguageModel
    saes: Mapping[Site, SparseAutoencoder]
    prompts: PromptSet
    metric: Metric
    text: OtherText
    penalty: float
    bar: ProgressBar
    numbers: dict[str, Edit] = field(default_factory=dict)
    """The edit of each feature alone."""
    trials: dict[frozenset[str], tuple[float, float]] = field(default_factory=dict)
    """Share left by each set that was tried, and its cost elsewhere."""
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.size = self._sizes([{}])[0]
        self.ce = float(self.text.elsewhere([{}])[0])
        if self.size < 1e-9:
            raise UserError("these prompts show nothing of the behaviour: there is nothing to remove")
        self.trials[frozenset()] = (1.0, 0.0)

    def score(self, names: frozenset[str]) -> float:
        """left + penalty * cost of a set that was tried."""
        left, cost = self.trials[names]
        return left + self.penalty * max(cost, 0.0)

    @torch.no_grad()
    def _sizes(self, several: Sequence[Standing]) -> list[float]:
        """Root mean square over cases of the mean metric under each of several edits."""
        values: list[list[torch.Tensor]] = [[] for _ in several]
        for batch in self.prompts.batches(BATCH_SIZE):
            for start, chunk in copies(self.model, several, batch.clean, last_only=True):
                logits = run_copies(self.model, batch.clean, chunk, last_only=True)[:, :, -1].float()
                for number, of_copy in enumerate(logits):
                    values[start + number].append(self.metric(of_copy, batch).cpu().double())
        cases = rows_by_case(self.prompts).values()
        by_case = [[torch.cat(of_edit)[rows].mean() for rows in cases] for of_edit in values]
        return [torch.stack(of_edit).square().mean().sqrt().item() for of_edit in by_case]

    def tried(self, sets: Sequence[frozenset[str]]) -> list[frozenset[str]]:
        """The sets, after those that are new have been tried."""
        new = [names for names in dict.fromkeys(sets) if names not in self.trials]
        if new:
            self.trials |= zip(new, self._measured([(names, 1.0) for names in new]), strict=True)
        return list(sets)

    def _measured(self, sets: Sequence[tuple[frozenset[str], float]]) -> list[tuple[float, float]]:
        """The share left and the cost elsewhere of sets of features, each at a strength."""
        edits = [
            FeatureEdits(self.model, self.saes, [self.numbers[name] for name in sorted(names)], strength=strength)
            for names, strength in sets
        ]
        standing = [edit.standing() for edit in edits]
        lefts, costs = self._sizes(standing), self.text.elsewhere(standing).tolist()
        self.bar.update(len(sets))
        return [(left / self.size, cost - self.ce) for left, cost in zip(lefts, costs, strict=True)]

    def strengthened(self, names: Sequence[str]) -> float:
        """The strength at which a set is worth most, 1 unless another gains."""
        chosen = frozenset(names)
        measured = self._measured([(chosen, strength) for strength in STRENGTHS])
        scores = [left + self.penalty * max(cost, 0.0) for left, cost in measured]
        best = min(range(len(scores)), key=lambda number: scores[number])
        if scores[best] > self.score(chosen) - GAIN:
            return 1.0
        self.steps.append(Step([], [], *measured[best], strength=STRENGTHS[best]))
        return STRENGTHS[best]

    def screened(self, effect: Mapping[str, float]) -> list[str]:
        """The candidates, best first by |effect| beyond the penalty for their side effect to first order."""
        side, largest = self._side_effects(list(effect)), 2 * self.size
        worth = {name: effect[name] / largest - self.penalty * side[name] for name in effect}
        return sorted(worth, key=lambda name: -worth[name])[:CANDIDATES]

    @with_gradients
    def _side_effects(self, names: Sequence[str]) -> dict[str, float]:
        """Mean over tokens of |(f' - f) W_dec . dCE/dx|, with CE at predictions that are none of the behaviour's."""
        by_site: dict[Site, list[str]] = {}
        for name in names:
            by_site.setdefault(Site.parse(name.partition("/")[0]), []).append(name)
        total, n_tokens = dict.fromkeys(names, 0.0), 0
        for number, tokens in enumerate(self.text.batches):
            reads = as_saes(self.saes).read_sites(by_site)
            run = self.model.run(tokens, capture={*by_site, *reads.values()}, grad=True)
            other, scored = ~self.text.is_answer[number], self.text.scored[number]
            log_p = run.logits[:, :-1][scored][other].float().log_softmax(-1)
            loss = -log_p.gather(1, self.text.targets[number][other][:, None]).sum()
            gradients = run.gradients(loss, list(by_site), allow_unused=True)
            real = tokens.attention_mask.bool()
            n_tokens += int(other.sum())
            for (site, of_site), gradient in zip(by_site.items(), gradients, strict=True):
                if gradient is None:
                    continue
                index = torch.tensor([int(name.partition("/")[2]) for name in of_site])
                f = FeatureReader(self.saes[site], index)(run.activations[reads[site]].detach()[real])  # [N, m]
                slope = gradient[real].float() @ self.saes[site].W_dec[index.to(f.device)].T  # [N, m]
                change = ((self._targets(of_site).to(f) - f) * slope).abs().sum(0)
                for name, value in zip(of_site, change.tolist(), strict=True):
                    total[name] += value
        return {name: value / max(n_tokens, 1) for name, value in total.items()}

    def _targets(self, names: Sequence[str]) -> torch.Tensor:
        """[m] what each feature becomes: its mean, or that of what is drawn."""
        numbers = [self.numbers[name].reference.get(name, 0.0) for name in names]
        return torch.tensor([sum(n) / len(n) if isinstance(n, Sequence) else n for n in numbers])

    def grown(self, candidates: Sequence[str]) -> list[str]:
        """The chosen features, in the order in which they joined."""
        nothing: frozenset[str] = frozenset()
        alone = sorted(self.tried([frozenset([name]) for name in candidates]), key=self.score)
        pairs = self.tried([a | b for a, b in combinations(alone[:PAIRED], 2)])
        best = min([*alone, *pairs], key=self.score)
        chosen, order = best, sorted(best, key=lambda name: self.score(frozenset([name])))
        self._note(best, added=order)
        gain = {next(iter(single)): self.score(nothing) - self.score(single) for single in alone}
        while len(chosen) < MOST:
            waiting = sorted(gain.keys() - chosen, key=lambda name: -gain[name])[:TRIED]
            sets = self.tried([chosen | {name} for name in waiting])
            gain |= {name: self.score(chosen) - self.score(names) for name, names in zip(waiting, sets, strict=True)}
            name = max(waiting, key=lambda name: gain[name], default="")
            if not waiting or gain[name] < GAIN:
                break
            chosen = chosen | {name}
            order.append(name)
            self._note(chosen, added=[name])
        while len(chosen) > 1:
            fewer = min(self.tried([chosen - {name} for name in order]), key=self.score)
            if self.score(fewer) > self.score(chosen):
                break
            self._note(fewer, dropped=sorted(chosen - fewer))
            chosen, order = fewer, [name for name in order if name in fewer]
        return order

    def chosen(self, candidates: Sequence[str], effect: Mapping[str, float]) -> tuple[list[str], str, Step | None]:
        """The chosen features, that of them which costs most elsewhere alone, and what features before it can do at
        little cost; these are chosen instead where they are worth more.
        """
        chosen = self.grown(candidates)
        while True:
            dearest = max(chosen, key=lambda name: self.trials[frozenset([name])][1])
            earlier, steps = self.cheapest(before(dearest, effect))
            if earlier is None or self.score(frozenset(earlier.added)) >= self.score(frozenset(chosen)):
                return chosen, dearest, earlier
            chosen, self.steps = earlier.added, steps

    def cheapest(self, effect: Mapping[str, float]) -> tuple[Step | None, list[Step]]:
        """The result of a set of these features grown at `CHEAP` times the penalty, None where that is nothing, and the
        steps to it.
        """
        search = copy(self)
        search.penalty, search.steps = CHEAP * self.penalty, []
        names = search.grown(search.screened(effect)) if effect else []
        left, cost = self.trials[frozenset(names)]
        gains = search.score(frozenset(names)) < search.score(frozenset()) - GAIN
        return Step(names, [], left, cost) if gains else None, search.steps

    def _note(self, names: frozenset[str], *, added: Sequence[str] = (), dropped: Sequence[str] = ()) -> None:
        left, cost = self.trials[names]
        self.steps.append(Step(list(added), list(dropped), left, cost))
