"""What is measured of a model before and after an edit: the behaviour, the cross-entropy on text, and continuations.

Shapes: B prompts, S positions, V tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Any

from circuits.editing.applied import FeatureEdits
from circuits.editing.results import Behaviour, Continuation, Score
from circuits.metrics import metrics as behaviour
from circuits.metrics.probe import Probe
from circuits.prompts.dataset import PromptSet
from sae.model.language_model import LanguageModel


def measure(
    model: LanguageModel,
    prompts: PromptSet,
    *,
    edits: FeatureEdits | None = None,
    metric: behaviour.Metric = behaviour.logit_difference,
    batch_size: int = 64,
) -> Behaviour:
    """The metric and the accuracy, overall and by case.

    metric: the logit difference is shown as logit(clean answer) - logit(patch answer), any other as it is. Prompts of a
    probe have no answers, so no accuracy. edits: as in `behaviour.last_logits`.
    """
    if isinstance(metric, Probe):
        values, right = behaviour.metric_values(model, prompts, metric, edits=edits, batch_size=batch_size), None
    else:
        values, right = behaviour.values_and_correct(model, prompts, metric, edits=edits, batch_size=batch_size)
    values = -values if metric is behaviour.logit_difference else values  # [B]

    def score(rows: list[int]) -> Score:
        accuracy = None if right is None else right[rows].float().mean().item()
        return Score(len(rows), values[rows].mean().item(), accuracy)

    by_case = {
        case: [row for row, name in enumerate(prompts.cases) if name == case] for case in sorted(set(prompts.cases))
    }
    return Behaviour(
        overall=score(list(range(len(prompts)))),
        by_case={case: score(rows) for case, rows in by_case.items()} if len(by_case) > 1 else {},
    )


def continuations(
    model: LanguageModel, prompts: PromptSet, edits: FeatureEdits, *, n: int, new_tokens: int = 30
) -> list[Continuation]:
    """Greedy continuations of n prompts, the cases taking turns, before and after the edit."""
    if n <= 0:
        return []
    turn = [prompts.cases[:row].count(case) for row, case in enumerate(prompts.cases)]
    chosen = prompts[sorted(range(len(prompts)), key=lambda row: (turn[row], row))[:n]]
    before, after = (continued(model, chosen, each, new_tokens=new_tokens) for each in (None, edits))
    return [Continuation(*texts) for texts in zip(chosen.texts, before, after, strict=True)]


def continued(
    model: LanguageModel, prompts: PromptSet, edits: FeatureEdits | None, *, new_tokens: int, **options: Any
) -> list[str]:
    """What the edited model says after each prompt, greedily; options: of `LanguageModel.generate`."""
    with model.edited(edits.standing(prompts) if edits else {}):
        ids = model.generate(prompts.clean, max_new_tokens=new_tokens, **options)  # [B, S + new]
    return [
        model.tokenizer.decode(row, skip_special_tokens=True) for row in ids[:, prompts.clean.n_positions :].tolist()
    ]
