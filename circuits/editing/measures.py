"""Measure a model before and after an edit: the behaviour with its intervals and its bias, continuations.

Shapes: B prompts, S positions, K new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from circuits.editing.applied import FeatureEdits
from circuits.editing.records import Behaviour, Bias, Continuation, Fluency, Intervals, Score
from circuits.metrics import metrics as behaviour
from circuits.prompts.dataset import PromptSet
from circuits.uncertainty.bootstrap import Bootstrap, group_sums, too_few, what_is_drawn
from sae.model.language_model import LanguageModel, Tokens

OF_ANSWERS = (behaviour.logit_difference, behaviour.log_probability)
"""Metrics of the prompts' answers; for others these may stand there for form's sake, and there is no accuracy."""


def prompt_values(
    model: LanguageModel,
    prompts: PromptSet,
    *,
    edits: behaviour.Edits | None = None,
    metric: behaviour.Metric = behaviour.logit_difference,
    batch_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """The metric of every prompt, [B], and whether it is answered rightly, [B]; None where the metric is of no answers.

    The logit difference is given as logit(clean answer) - logit(patch answer), any other metric as it is.
    """
    if metric in OF_ANSWERS:
        values, right = behaviour.values_and_correct(model, prompts, metric, edits=edits, batch_size=batch_size)
        return (-values if metric is behaviour.logit_difference else values), right
    return behaviour.metric_values(model, prompts, metric, edits=edits, batch_size=batch_size), None


def scored(prompts: PromptSet, values: Tensor, right: Tensor | None) -> Behaviour:
    """Means of `prompt_values`, overall and by case."""

    def score(rows: list[int]) -> Score:
        accuracy = None if right is None else right[rows].float().mean().item()
        return Score(len(rows), values[rows].mean().item(), accuracy)

    by_case = rows_by_case(prompts)
    return Behaviour(
        overall=score(list(range(len(prompts)))),
        by_case={case: score(rows) for case, rows in by_case.items()} if len(by_case) > 1 else {},
    )


def rows_by_case(prompts: PromptSet) -> dict[str, list[int]]:
    """The numbers of each case's prompts."""
    rows: dict[str, list[int]] = {case: [] for case in sorted(set(prompts.cases))}
    for row, case in enumerate(prompts.cases):
        rows[case].append(row)
    return rows


def left_intervals(prompts: PromptSet, before: Tensor, after: Tensor, *, resamples: int) -> Intervals | None:
    """95 % intervals of what is left, over prompts drawn by their templates. before, after: [B] values.

    The mean size over cases is a ratio of weighted sums, with the sign that each case has.
    """
    groups = prompts.groups
    drawn = what_is_drawn(groups)
    if not resamples or too_few(groups):
        return None
    bootstrap, cases = Bootstrap(resamples), rows_by_case(prompts)

    def interval(weights: Tensor, others: Tensor) -> tuple[float, float] | None:
        x = group_sums(after.cpu().double() * weights, groups)[:, None]
        y = group_sums(before.cpu().double() * others, groups)
        low, high = bootstrap.intervals(x, y)[0].tolist()
        return (low, high) if low == low else None

    by_case: dict[str, tuple[float, float]] = {}
    weight_after, weight_before = torch.zeros(len(prompts)).double(), torch.zeros(len(prompts)).double()
    for case, rows in cases.items():
        inside = torch.zeros(len(prompts)).double()
        inside[rows] = 1 / len(rows)
        one_case = len(cases) == 1
        weight_after += inside * (1.0 if one_case else float(after[rows].mean().sign()))
        weight_before += inside * (1.0 if one_case else float(before[rows].mean().sign()))
        of_case = interval(inside, inside) if abs(float(before[rows].mean())) > 1e-9 else None
        by_case |= {case: of_case} if of_case is not None and not one_case else {}
    return Intervals(drawn, interval(weight_after, weight_before), by_case)


def answer_sides(prompts: PromptSet) -> dict[str, int] | None:
    """Case -> 1 or -1, so that cases of one side share answers and those of the other have them as wrong ones.

    None where cases have no patch answers, or no two such sides.
    """
    if prompts.patch_answers is None:
        return None
    cases = rows_by_case(prompts)
    right = {case: _ids(prompts.clean_answers[rows]) for case, rows in cases.items()}
    wrong = {case: _ids(prompts.patch_answers[rows]) for case, rows in cases.items()}
    sides = {next(iter(cases)): 1}
    for _ in cases:
        for case in list(sides):
            for other in cases:
                alike = len(right[case] & right[other]) + len(wrong[case] & wrong[other])
                opposed = len(right[case] & wrong[other]) + len(wrong[case] & right[other])
                if alike != opposed:
                    sides.setdefault(other, sides[case] if alike > opposed else -sides[case])
    return sides if len(sides) == len(cases) and len(set(sides.values())) == 2 else None


def _ids(answers: Tensor) -> set[int]:
    return {answer for answer in answers.reshape(-1).tolist() if answer >= 0}


def bias(prompts: PromptSet, before: Behaviour, after: Behaviour) -> Bias | None:
    """To which side the answers lean, from the logit difference by case; None where there are no two sides."""
    sides = answer_sides(prompts) if before.by_case else None
    if sides is None:
        return None
    leans = [
        sum(side * run.by_case[case].metric for case, side in sides.items()) / len(sides) for run in (before, after)
    ]
    direction = 1 if leans[1] >= 0 else -1
    return Bias([case for case, side in sides.items() if side == direction], direction * leans[0], direction * leans[1])


def answers_of(prompts: PromptSet) -> list[int]:
    """The tokens that answer prompts, rightly or wrongly."""
    both = [prompts.clean_answers, prompts.patch_answers]
    return sorted(set().union(*(_ids(answers) for answers in both if answers is not None)))


# ------------------------------------------------------------------------------------------ continuations


def continuations(
    model: LanguageModel, prompts: PromptSet, edits: FeatureEdits, *, n: int, new_tokens: int = 30
) -> list[Continuation]:
    """Greedy continuations of n prompts, the cases taking turns, before and after the edit."""
    if n <= 0:
        return []
    chosen = in_turn(prompts, n)
    before, after = (continued(model, chosen, each, new_tokens=new_tokens) for each in (None, edits))
    return [Continuation(*texts) for texts in zip(chosen.texts, before, after, strict=True)]


def in_turn(prompts: PromptSet, n: int) -> PromptSet:
    """n prompts, the cases taking turns."""
    turn = [prompts.cases[:row].count(case) for row, case in enumerate(prompts.cases)]
    return prompts[sorted(range(len(prompts)), key=lambda row: (turn[row], row))[:n]]


def continued(
    model: LanguageModel, prompts: PromptSet, edits: FeatureEdits | None, *, new_tokens: int, **options: Any
) -> list[str]:
    """The edited model's greedy continuation of each prompt; options: of `LanguageModel.generate`."""
    rows = continued_ids(model, prompts, edits, new_tokens=new_tokens, **options).tolist()
    return [model.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def continued_ids(
    model: LanguageModel, prompts: PromptSet, edits: FeatureEdits | None, *, new_tokens: int, **options: Any
) -> Tensor:
    """[B, K] the tokens that the edited model goes on with."""
    with model.edited(edits.standing(prompts) if edits else {}):
        ids = model.generate(prompts.clean, max_new_tokens=new_tokens, **options)  # [B, S + K]
    return ids[:, prompts.clean.n_positions :]


@torch.no_grad()
def fluency(model: LanguageModel, prompts: PromptSet, ids: Tensor) -> Fluency:
    """Perplexity of continuations [B, K] under the model as it is, and how much they repeat themselves.

    Tokens behind the end of a text, which are special ones, do not count.
    """
    special = torch.tensor(sorted(model.special_ids), dtype=torch.int64, device=ids.device)
    real = ~torch.isin(ids, special)  # [B, K]
    both = Tokens(
        torch.cat([prompts.clean.input_ids, ids], 1),
        torch.cat([prompts.clean.attention_mask, torch.ones_like(ids)], 1),
    )
    log_p = model.run(both).logits[:, prompts.clean.n_positions - 1 : -1].float().log_softmax(-1)  # [B, K, V]
    surprise = -log_p.gather(-1, ids[..., None])[..., 0][real]
    perplexity = surprise.cpu().double().mean().exp().item() if len(surprise) else None
    rows = [[token for token, counts in zip(*row, strict=True) if counts]
            for row in zip(ids.tolist(), real.tolist(), strict=True)]  # fmt: skip
    return Fluency(perplexity, repetition(rows))


def repetition(rows: Sequence[Sequence[int]]) -> float:
    """Share of three tokens in a row that occurred before in the same row; 0 where there are none."""
    threes = [[tuple(row[i : i + 3]) for i in range(len(row) - 2)] for row in rows]
    n = sum(map(len, threes))
    return 1 - sum(len(set(of_row)) for of_row in threes) / n if n else 0.0
