"""Prompts with the answers that make them a behaviour, as one batch of tokens.

1. Read the examples of any known format (`circuits.prompt_formats`).
2. Keep those whose answers are exactly one token and whose clean and patch prompts have equal token length; count the
   others by reason.
3. Pad them on the left, so that the last column is always the position where the answer is read.
4. Give every example a template key: **prompts with equal key have equal length and align position by position**, which
   is what a mean over reference prompts at one position needs to mean anything.

Where examples have token spans (`circuits.spans`), every token gets the number of its span.

The template key follows one of four rules (`PromptSet.template_rule`):

- `spans`: the `template` field of the file, if any, and the spans with their lengths, where every example has spans;
- `field`: the `template` field of the file and the token length, where every example has one;
- `mask`: the clean tokens with every position masked at which clean and patch differ ("* was sad because"), which
  recovers the templates of minimal pairs. A prompt takes the commonest such pattern that its tokens fit, so that names
  which share a letter do not make a template of their own. Taken when such keys hold at least four prompts on average;
- `length`: the token length alone.

Shapes: B prompts, S positions, V vocabulary, n answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from circuits.prompt_formats import Example, read_examples
from circuits.spans import Range, Span, SpanProblem, has_fields, number_roles, spans_of_template, token_roles
from circuits.templates import commonest_fits, length_keys, mask_keys, span_keys, words_of
from sae.errors import UserError, unknown
from sae.model import Tokens

if TYPE_CHECKING:
    from sae.model import LanguageModel

TemplateRule = Literal["spans", "field", "mask", "length"]

MIN_PROMPTS_A_TEMPLATE = 4
"""Average group size below which masked templates are too thin to average over."""


@dataclass(frozen=True)
class PromptSet:
    """B prompts (or minimal pairs) with their answers; slices of it are prompt sets again."""

    clean: Tokens
    """The prompts in which the behaviour shows, [B, S], padded on the left."""
    patch: Tokens | None
    """The contrasting prompts, [B, S], row by row as long as `clean`; None without pairs."""
    clean_answers: Tensor
    """Token after the clean prompt, [B] int64; [B, n] padded with -1 where prompts have several."""
    patch_answers: Tensor | None
    """Token after the patch prompt, shaped like `clean_answers`; None where the file names none."""
    cases: list[str]
    """Which kind of example each is, such as `plural_singular`."""
    templates: list[str]
    """One key per example: prompts with equal key have equal length and align position by position."""
    texts: list[str]
    """The clean prompts as text."""
    rejected: dict[str, int] = field(default_factory=dict)
    """How many examples of the file were left out, by reason."""
    template_rule: TemplateRule = "length"
    """How `templates` were made."""
    reference: Tensor | None = None
    """What the metric compares with: log-probabilities after the clean prompts [B, V], or a probe's sign [B, 1]."""
    spans: tuple[str, ...] = ()
    """Names of the token spans, in the order of the sentence; empty where the prompts have none."""
    roles: Tensor | None = None
    """Number of the span of every token, [B, S] int64, the same in clean and patch prompt; -1 at padding."""

    def __len__(self) -> int:
        return len(self.cases)

    @property
    def paired(self) -> bool:
        """Whether there are contrasting prompts."""
        return self.patch is not None

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> PromptSet:
        """The chosen prompts, padded to the longest of them."""
        if isinstance(index, int):
            rows = [range(len(self))[index]]
        elif isinstance(index, slice):
            rows = list(range(len(self)))[index]
        elif isinstance(index, Tensor) and index.dtype == torch.bool:
            rows = index.nonzero().flatten().tolist()
        else:
            rows = [int(row) for row in index]
        chosen = torch.tensor(rows, dtype=torch.long, device=self.clean.input_ids.device)
        clean = _trim(self.clean[chosen])
        start = self.clean.n_positions - clean.n_positions
        return replace(
            self,
            clean=clean,
            patch=None if self.patch is None else _trim(self.patch[chosen]),
            clean_answers=self.clean_answers[chosen],
            patch_answers=None if self.patch_answers is None else self.patch_answers[chosen],
            cases=[self.cases[row] for row in rows],
            templates=[self.templates[row] for row in rows],
            texts=[self.texts[row] for row in rows],
            reference=None if self.reference is None else self.reference[chosen],
            roles=None if self.roles is None else self.roles[chosen, start:],
        )

    def batches(self, size: int) -> Iterator[PromptSet]:
        """Consecutive slices of at most `size` prompts, in order, each padded to its own longest prompt."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def to(self, device: torch.device | str) -> PromptSet:
        """The same prompts with their tensors on `device`."""
        return replace(
            self,
            clean=self.clean.to(device),
            patch=None if self.patch is None else self.patch.to(device),
            clean_answers=self.clean_answers.to(device),
            patch_answers=None if self.patch_answers is None else self.patch_answers.to(device),
            reference=None if self.reference is None else self.reference.to(device),
            roles=None if self.roles is None else self.roles.to(device),
        )

    def span_numbers(self, spans: Sequence[str]) -> Tensor:
        """[B, S] int64: every token's span by its place among the names `spans`, -1 at padding."""
        if self.roles is None:
            raise UserError(f"the circuit is by span ({', '.join(spans)}) and these prompts have no spans")
        strange = [name for name in self.spans if name not in spans]
        if strange:
            raise UserError(f"the prompts have the span {strange[0]!r}, the circuit has {', '.join(spans)} alone")
        number = torch.tensor([*(list(spans).index(name) for name in self.spans), -1], device=self.roles.device)
        return number[self.roles]  # -1 takes the last

    def with_templates(self, rule: TemplateRule) -> PromptSet:
        """The same prompts keyed by another rule."""
        if rule in ("spans", "field") and rule == self.template_rule:
            return self
        if rule == "length":
            keys = length_keys(self.clean)
        elif rule == "mask" and self.patch is not None:
            keys = mask_keys(self.clean, self.patch)
        elif rule == "spans" and self.roles is not None:
            keys = span_keys([""] * len(self), self.roles, self.spans)
        elif rule in get_args(TemplateRule):
            lacking = {"mask": "patch prompts", "spans": "prompts with spans"}.get(rule, "a template field")
            raise UserError(f"templates by {rule!r} need {lacking}")
        else:
            raise unknown("template rule", rule, get_args(TemplateRule))
        return replace(self, templates=keys, template_rule=rule)

    def aligned_to(self, reference: PromptSet) -> PromptSet:
        """The same prompts under the template keys of another set (train and test), where they have one there."""
        if reference.template_rule == "spans" and self.roles is None:
            return self.with_templates("length")
        if reference.template_rule != "mask":
            return self.with_templates(reference.template_rule)
        patterns = Counter(reference.templates)
        own = self.with_templates("mask").templates if self.patch is not None else length_keys(self.clean)
        found = commonest_fits(words_of(self.clean), patterns)
        keys = [fit or key for fit, key in zip(found, own, strict=True)]
        return replace(self, templates=keys, template_rule="mask")

    def summary(self) -> str:
        """One line: how many prompts, of which cases, what was rejected."""
        cases = ", ".join(f"{name or 'uncased'} {count}" for name, count in Counter(self.cases).items())
        text = f"{len(self)} {'pairs' if self.paired else 'prompts'} ({cases})"
        if self.rejected:
            text += "; skipped " + ", ".join(f"{count} ({reason})" for reason, count in self.rejected.items())
        return text


def load_prompts(
    source: str | Path,
    model: LanguageModel,
    *,
    limit: int | None = None,
    span_template: str | None = None,
    need_spans: bool = False,
) -> PromptSet:
    """The usable prompts of a file or hub data set, at most `limit` of them (the first), tokenised for `model`.

    span_template: finds the spans of all prompts, whatever the file says of them; need_spans: prompts whose spans
    cannot be found are left out and counted. Otherwise prompts have spans where all of them do.
    """
    return make_prompts(
        read_examples(source), model, limit=limit, span_template=span_template, need_spans=need_spans, name=str(source)
    )


def make_prompts(
    examples: Sequence[Example],
    model: LanguageModel,
    *,
    limit: int | None = None,
    span_template: str | None = None,
    need_spans: bool = False,
    name: str = "the examples",
) -> PromptSet:
    """Tokenise examples; those that cannot be used are counted in `rejected`, and `UserError` if none is left."""
    paired = any(example.patch is not None for example in examples)
    contrasted = any(example.patch_answers for example in examples)
    reasons = [_text_problem(example, paired=paired) for example in examples]
    rejected = Counter(reason for reason in reasons if reason)
    usable = [example for example, reason in zip(examples, reasons, strict=True) if not reason]
    if not usable:
        raise _none_left(name, rejected)

    clean = model.tokenize([example.clean for example in usable])
    patch = model.tokenize([example.patch or "" for example in usable]) if paired else None
    need_spans = need_spans or span_template is not None
    roles = _find_roles(usable, model, span_template) if need_spans or model.tokenizer.is_fast else None
    if need_spans and roles is None:
        raise UserError(f'{name} says nothing of spans: give "spans" in the file, or a span template')
    accepted = _accepted(
        usable, clean, patch, model, contrasted=contrasted, roles=roles if need_spans else None, rejected=rejected
    )[:limit]
    if not accepted:
        raise _none_left(name, rejected)
    rows, clean_answers, patch_answers = (list(column) for column in zip(*accepted, strict=True))
    kept, index = [usable[row] for row in rows], torch.tensor(rows)
    width = max(len(answers) for answers in clean_answers + patch_answers)
    prompts = PromptSet(
        clean=_trim(clean[index]),
        patch=None if patch is None else _trim(patch[index]),
        clean_answers=_answer_tensor(clean_answers, width),
        patch_answers=_answer_tensor(patch_answers, width) if contrasted else None,
        cases=[example.case for example in kept],
        templates=[example.template for example in kept],
        texts=[example.clean for example in kept],
        rejected=dict(rejected.most_common()),
    )
    found = [] if roles is None else [roles[row] for row in rows]
    if found and not any(isinstance(row, str) for row in found):
        names, numbers = number_roles(found, prompts.clean.n_positions)
        prompts = replace(prompts, spans=names, roles=numbers)
    return _choose_templates(prompts).to(model.device)


# ------------------------------------------------------------------------------------------ rejecting


def _accepted(
    examples: list[Example],
    clean: Tokens,
    patch: Tokens | None,
    model: LanguageModel,
    *,
    contrasted: bool,
    roles: Sequence[list[str] | str] | None,
    rejected: Counter[str],
) -> list[tuple[int, list[int], list[int]]]:
    """(row, clean answers, patch answers) of the usable examples; counts the others in `rejected`."""
    accepted = []
    lengths = clean.lengths.tolist()
    patch_lengths = lengths if patch is None else patch.lengths.tolist()
    for row, example in enumerate(examples):
        answers, wrong = _answer_ids(example.clean_answers, model), _answer_ids(example.patch_answers, model)
        reason = _length_problem(lengths[row], patch_lengths[row], model)
        reason = reason or _answer_problem(answers, wrong, contrasted=contrasted)
        if reason is None and roles is not None and isinstance(roles[row], str):
            reason = str(roles[row])
        if reason:
            rejected[reason] += 1
        else:
            accepted.append((row, answers or [], wrong or []))
    return accepted


def roles_of_texts(
    examples: Sequence[Example], model: LanguageModel, template: str | None = None
) -> list[list[str] | str]:
    """For each example the role of every token, or why it has none."""
    return _find_roles(examples, model, template) or ["no spans"] * len(examples)


def _find_roles(
    examples: Sequence[Example], model: LanguageModel, template: str | None
) -> list[list[str] | str] | None:
    """For each example the role of every token, or why it has none; None where no example says anything of spans."""
    if template is None and not any(example.spans or has_fields(example.template) for example in examples):
        return None
    clean = model.token_offsets([example.clean for example in examples])
    patch = model.token_offsets([example.patch or example.clean for example in examples])
    found: list[list[str] | str] = []
    for example, *offsets in zip(examples, clean, patch, strict=True):
        try:
            one, other = (_roles_of(example, template, side, at) for side, at in enumerate(offsets))
            found.append(one if one == other else "spans differ between clean and patch")
        except SpanProblem as problem:
            found.append(str(problem))
    return found


def _roles_of(example: Example, template: str | None, side: int, offsets: Sequence[Range]) -> list[str]:
    """Roles of the clean (side 0) or patch prompt (1), by the template given, the file's spans or its template."""
    text = example.clean if side == 0 or example.patch is None else example.patch
    if template is None and example.spans:
        spans: dict[str, Span] = {name: ends[side] for name, ends in example.spans.items()}
    elif template is not None or has_fields(example.template):
        spans = spans_of_template(template or example.template, text)
    else:
        raise SpanProblem("no spans")
    return token_roles(spans, text, offsets)


def _answer_ids(answers: Sequence[str | int], model: LanguageModel) -> list[int] | None:
    """Token ids of the answers, or None when one of them is not exactly one token of the model."""
    ids: list[int] = []
    for answer in answers:
        token = model.single_token(answer) if isinstance(answer, str) else answer
        if token is None or not 0 <= token < model.vocab_size:
            return None
        ids.append(token)
    return ids


def _text_problem(example: Example, *, paired: bool) -> str | None:
    if paired and example.patch is None:
        return "no patch prompt"
    if not example.clean or example.patch == "":
        return "empty prompt"
    return "clean and patch are the same prompt" if example.clean == example.patch else None


def _length_problem(length: int, patch_length: int, model: LanguageModel) -> str | None:
    if length != patch_length:
        return "clean and patch differ in token length"
    limit = getattr(model.hf.config, "max_position_embeddings", None)
    return "longer than the model's context" if limit is not None and length > limit else None


def _answer_problem(answers: list[int] | None, wrong: list[int] | None, *, contrasted: bool) -> str | None:
    if answers is None or wrong is None:
        return "answer is not one token"
    if not answers or (contrasted and not wrong):
        return "no answer"
    return "both answers are the same token" if set(answers) & set(wrong) else None


def _none_left(name: str, rejected: Counter[str]) -> UserError:
    reasons = ", ".join(f"{count} x {reason}" for reason, count in rejected.most_common())
    return UserError(f"no usable prompt in {name}: {reasons or 'it is empty'}")


def _answer_tensor(answers: list[list[int]], width: int) -> Tensor:
    """[B] when every prompt has one answer, else [B, width] padded with -1."""
    padded = torch.tensor([ids + [-1] * (width - len(ids)) for ids in answers])  # [B, n]
    return padded[:, 0] if width == 1 else padded


# ------------------------------------------------------------------------------------------ aligning


def _trim(tokens: Tokens) -> Tokens:
    """Without the columns in which every row is padding."""
    longest = int(tokens.lengths.max()) if len(tokens) else 0
    start = tokens.input_ids.shape[1] - longest
    return Tokens(tokens.input_ids[:, start:], tokens.attention_mask[:, start:])


def _choose_templates(prompts: PromptSet) -> PromptSet:
    if prompts.roles is not None:
        keys = span_keys(prompts.templates, prompts.roles, prompts.spans)
        return replace(prompts, templates=keys, template_rule="spans")
    if all(prompts.templates):
        keys = [f"{name}/{length}" for name, length in zip(prompts.templates, length_keys(prompts.clean), strict=True)]
        return replace(prompts, templates=keys, template_rule="field")
    if prompts.patch is not None:
        keys = mask_keys(prompts.clean, prompts.patch)
        if len(keys) >= MIN_PROMPTS_A_TEMPLATE * len(set(keys)):
            return replace(prompts, templates=keys, template_rule="mask")
    return replace(prompts, templates=length_keys(prompts.clean), template_rule="length")
