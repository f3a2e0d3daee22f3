"""Choosing an edit that turns answers round: features of one site, mirrored about their mean.

    f' = f + s (mean - f):   s = 0 leaves a feature as it is, s = 1 takes what it says away, s = 2 says the opposite.

All features are of one site, since a later one reads what the edit made of the stream already, and would turn it back.

1. At the sites whose strongest features have most |effect| together, the n strongest for several n and s are tried. A
   pair is flipped where the patch answer is ahead of the clean one; of the cases the one that flips least counts.
2. Of the edits that flip `ENOUGH` of every case, or all but as many as the best one does, the one that costs least in
   cross-entropy elsewhere is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from circuits.circuit import Circuit
from circuits.editing.applied import FeatureEdits, with_references
from circuits.editing.declaration import Edit
from circuits.editing.measures import answers_of, rows_by_case
from circuits.editing.surgical import effect_by_feature
from circuits.editing.text_cost import OtherText, Standing, copies, run_copies
from circuits.metrics.metrics import logit_difference
from circuits.prompts.dataset import PromptSet
from sae.data.batches import token_batches
from sae.errors import UserError
from sae.model.language_model import LanguageModel

STRONGEST, SITES, COUNTS, STRENGTHS = 200, 6, (1, 2, 4, 8), (1.5, 2.0, 2.5, 3.0)
"""Features that are looked at; sites that are tried; how many features at each, and how strongly."""
ENOUGH, NEAR = 0.97, 0.02
"""Share of every case that has to flip; and how much less than the best one where none flips as many."""
BATCH_SIZE = 64


def choose_flipping(
    circuit: Circuit, prompts: PromptSet | None = None, *, texts: Sequence[str], answers: Sequence[int] = ()
) -> Edit:
    """Choose an edit under which the model gives the other answer of every pair.

    Args:
        circuit: The circuit, whose model, SAEs and effects are used; its metric is the logit difference.
        prompts: Pairs to choose on; those the circuit was found on by default. Measure on others.
        texts: Other text to choose on, and to take means from. Measure on other text.
        answers: Further tokens that answer the behaviour, beside those of the prompts: not elsewhere.

    Returns:
        The edit: operation `mean` at a strength above 1, with the means.

    Raises:
        UserError: Where prompts have no other answer, or the circuit no feature.
    """
    prompts = circuit.prompts if prompts is None else prompts
    if prompts.patch_answers is None or circuit.metric is not logit_difference:
        raise UserError("an answer is flipped where the other one of a pair is ahead: give prompts with both answers")
    model, saes = circuit.model, circuit.saes
    by_site: dict[str, list[tuple[str, float]]] = {}
    for name, effect in effect_by_feature(circuit, STRONGEST).items():
        by_site.setdefault(name.partition("/")[0], []).append((name, effect))
    if not by_site:
        raise UserError("no feature of this circuit has an effect: there is nothing to flip an answer with")
    most = max(COUNTS)
    first = sorted(by_site, key=lambda site: -sum(effect for _, effect in by_site[site][:most]))[:SITES]
    batches = list(token_batches(model, sorted(texts, key=len), max_tokens=None, batch_size=BATCH_SIZE))
    edits = []
    for site in first:
        names = [name for name, _ in by_site[site][:most]]
        means = with_references(model, saes, Edit(names, "mean"), texts=batches).reference
        for n in sorted({min(n, len(names)) for n in COUNTS}):
            reference = {name: means[name] for name in names[:n]}
            edits += [Edit(names[:n], "mean", strength=s, reference=reference) for s in STRENGTHS]
    standing = [FeatureEdits(model, saes, [edit]).standing() for edit in edits]
    flipped = flipped_shares(model, prompts, standing)
    enough = [number for number, share in enumerate(flipped) if share >= min(ENOUGH, max(flipped) - NEAR)]
    text = OtherText(model, batches, [*answers_of(prompts), *answers])
    costs = text.elsewhere([standing[number] for number in enough]).tolist()
    return edits[min(zip(costs, enough, strict=True))[1]]


@torch.no_grad()
def flipped_shares(model: LanguageModel, prompts: PromptSet, several: Sequence[Standing]) -> list[float]:
    """For each of several edits, the share of pairs with the patch answer ahead, in the case where that is least."""
    ahead: list[list[torch.Tensor]] = [[] for _ in several]
    for batch in prompts.batches(BATCH_SIZE):
        for start, chunk in copies(model, several, batch.clean, last_only=True):
            logits = run_copies(model, batch.clean, chunk, last_only=True)[:, :, -1].float()
            for number, of_copy in enumerate(logits):
                ahead[start + number].append((logit_difference(of_copy, batch) > 0).cpu())
    cases = rows_by_case(prompts).values()
    return [min(torch.cat(of_edit)[rows].float().mean().item() for rows in cases) for of_edit in ahead]
