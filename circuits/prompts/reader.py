"""Examples to rows of tokens: which can be used, with the ids of their answers and the span of every token, and why
others cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from circuits.prompts.answers import AnswerTokens
from circuits.prompts.formats import Example
from circuits.prompts.spans import Range, Span, SpanProblem, has_fields, spans_of_template, token_spans

if TYPE_CHECKING:
    from sae.model.language_model import LanguageModel


@dataclass(frozen=True)
class Row:
    """A usable example in tokens."""

    example: Example
    clean: list[int]
    patch: list[int]
    clean_answers: list[int]
    patch_answers: list[int]
    spans: list[str] | str
    """The span of every token, by name, or why there are none."""


class Reader:
    """Examples to rows of tokens, or to the reason why they cannot be used."""

    def __init__(
        self, model: LanguageModel, *, paired: bool, contrasted: bool, with_spans: bool, need_spans: bool,
        span_template: str | None,
    ) -> None:  # fmt: skip
        self.model, self.paired, self.contrasted = model, paired, contrasted
        self.with_spans, self.need_spans, self.span_template = with_spans, need_spans, span_template
        self._answers = AnswerTokens(model.text_coder)

    def read(self, examples: Sequence[Example]) -> list[Row | str]:
        """A row for each example that can be used, the reason for each other."""
        results: list[Row | str] = [_text_problem(example, paired=self.paired) or "" for example in examples]
        numbers = [number for number, reason in enumerate(results) if not reason]
        usable = [examples[number] for number in numbers]
        coder = self.model.text_coder
        clean = coder.prompt_ids([example.clean for example in usable])
        patch = coder.prompt_ids([example.patch or "" for example in usable]) if self.paired else clean
        reasons = [_length_problem(a, b, self.model) for a, b in zip(clean, patch, strict=True)]
        fitting = [index for index, reason in enumerate(reasons) if reason is None]
        for index, reason in enumerate(reasons):
            results[numbers[index]] = reason or ""
        usable = [usable[index] for index in fitting]
        clean, patch = ([ids[index] for index in fitting] for ids in (clean, patch))
        answers = self._answers.of(usable, clean, patch if self.paired else None)
        spans = self._spans(usable)
        for index, *columns in zip(fitting, usable, clean, patch, answers, spans, strict=True):
            results[numbers[index]] = self._row(*columns)
        return results

    def _spans(self, examples: Sequence[Example]) -> Sequence[list[str] | str]:
        if not self.with_spans:
            return ["no spans"] * len(examples)
        return find_spans(examples, self.model, self.span_template)

    def _row(
        self,
        example: Example,
        clean: list[int],
        patch: list[int],
        answers: tuple[list[int], list[int]] | str,
        spans: list[str] | str,
    ) -> Row | str:
        if isinstance(answers, str):
            return answers
        if not answers[0] or (self.contrasted and not answers[1]):
            return "no answer"
        if set(answers[0]) & set(answers[1]):
            return "both answers are the same token"
        if self.need_spans and isinstance(spans, str):
            return spans
        return Row(example, clean, patch, *answers, spans)


def find_spans(examples: Sequence[Example], model: LanguageModel, template: str | None = None) -> list[list[str] | str]:
    """For each example the span of every token, by name, or why it has none."""
    clean = model.text_coder.prompt_offsets([example.clean for example in examples])
    patch = model.text_coder.prompt_offsets([example.patch or example.clean for example in examples])
    results: list[list[str] | str] = []
    for example, *offsets in zip(examples, clean, patch, strict=True):
        try:
            one, other = (_spans_in(example, template, side, row) for side, row in enumerate(offsets))
            results.append(one if one == other else "spans differ between clean and patch")
        except SpanProblem as problem:
            results.append(str(problem))
    return results


def _spans_in(example: Example, template: str | None, side: int, offsets: Sequence[Range]) -> list[str]:
    """The span of every token of the clean (side 0) or patch prompt (1).

    It is said by the template given, by the file's spans, or by its template, in this order.
    """
    text = example.clean if side == 0 or example.patch is None else example.patch
    if template is None and example.spans:
        spans: dict[str, Span] = {name: sides[side] for name, sides in example.spans.items()}
    elif template is not None or has_fields(example.template):
        spans = spans_of_template(template or example.template, text)
    else:
        raise SpanProblem("no spans")
    return token_spans(spans, text, offsets)


def _text_problem(example: Example, *, paired: bool) -> str | None:
    if paired and example.patch is None:
        return "no patch prompt"
    if not example.clean or example.patch == "":
        return "empty prompt"
    return "clean and patch are the same prompt" if example.clean == example.patch else None


def _length_problem(clean: list[int], patch: list[int], model: LanguageModel) -> str | None:
    if not clean or not patch:
        return "prompt has no tokens"
    if len(clean) != len(patch):
        return "clean and patch differ in token length"
    limit = getattr(model.hf.config, "max_position_embeddings", None)
    return "longer than the model's context" if limit is not None and len(clean) > limit else None
