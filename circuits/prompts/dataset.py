"""Prompts with the answers that make them a behaviour, as one batch of tokens.

1. Read the examples of any known format (`circuits.prompts.formats`).
2. Keep those whose answers are exactly one token and whose clean and patch prompts have equal token length; count the
   others by reason.
3. Pad them on the left, so that the last column is always the position where the answer is read.
4. Give every example a template key: **prompts with equal key have equal length and align position by position**, which
   is what a mean over reference prompts at one position needs to mean anything.

Where examples have token spans (`circuits.prompts.spans`), every token gets the number of its span.

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

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from circuits.prompts.alignment import (
    Group,
    commonest_fits,
    length_keys,
    mask_keys,
    numbered,
    span_groups,
    span_keys,
    template_of,
    words_of,
)
from circuits.prompts.formats import Example, read_examples
from circuits.prompts.reader import Reader, Row, check_ids, choose, with_rendered_chats
from circuits.prompts.spans import has_fields, number_spans
from sae.errors import UserError, unknown
from sae.model.language_model import LanguageModel, Tokens

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
    """Compared with by the metric: log-probabilities after the clean prompts [B, V], or a probe's sign [B, 1]."""
    spans: tuple[str, ...] = ()
    """Names of the token spans, in the order of the sentence; empty where the prompts have none."""
    span_numbers: Tensor | None = None
    """Number of the span of every token among `spans`, [B, S] int64, in clean and patch prompt alike; -1 at padding."""
    units: Tensor | None = None
    """[B] `groups` from before the prompts were keyed by a rule that tells less of them; None where they were not."""

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
        columns: dict[str, Any] = {name: x[chosen] for name, x in vars(self).items() if isinstance(x, Tensor)}
        columns |= {name: _trim(x[chosen]) for name, x in vars(self).items() if isinstance(x, Tokens)}
        columns |= {name: [getattr(self, name)[row] for row in rows] for name in ("cases", "templates", "texts")}
        if self.span_numbers is not None:
            start = self.clean.n_positions - columns["clean"].n_positions
            columns["span_numbers"] = columns["span_numbers"][:, start:]
        return replace(self, **columns)

    def batches(self, size: int) -> Iterator[PromptSet]:
        """Consecutive slices of at most `size` prompts, in order, each padded to its own longest prompt."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def to(self, device: torch.device | str) -> PromptSet:
        """The same prompts with their tensors on `device`."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor | Tokens)}
        return replace(self, **moved)

    def positions(self, spans: Sequence[str] = ()) -> Tensor:
        """The position of every token, [B, S] int64: its index in the prompt, -1 at padding; with `spans` the number of
        its span among these names. Raises UserError for prompts without spans, or with others.
        """
        if not spans:
            return self.clean.position_ids.masked_fill(~self.clean.attention_mask.bool(), -1)
        if self.span_numbers is None:
            raise UserError(f"the circuit is by span ({', '.join(spans)}) and these prompts have no spans")
        strange = [name for name in self.spans if name not in spans]
        if strange:
            raise UserError(f"the prompts have the span {strange[0]!r}, the circuit has {', '.join(spans)} alone")
        number = torch.tensor([*(list(spans).index(name) for name in self.spans), -1], device=self.span_numbers.device)
        return number[self.span_numbers]  # -1 takes the last

    def group_keys(self, *, pooled: bool = False) -> list[list[Group]]:
        """For every token without padding, the group it is averaged in (`circuits.prompts.alignment`)."""
        lengths = self.clean.lengths.tolist()
        if pooled:
            return [[()] * length for length in lengths]
        if self.template_rule == "spans" and self.span_numbers is not None:
            rows = zip(self.templates, self.span_numbers.tolist(), strict=True)
            return [span_groups(key, [self.spans[number] for number in row if number >= 0]) for key, row in rows]
        return [
            [(template, position) for position in range(length)]
            for template, length in zip(self.templates, lengths, strict=True)
        ]

    def with_templates(self, rule: TemplateRule) -> PromptSet:
        """The same prompts keyed by another rule."""
        if rule in ("spans", "field") and rule == self.template_rule:
            return self
        if rule == "length":
            keys = length_keys(self.clean)
        elif rule == "mask" and self.patch is not None:
            keys = mask_keys(self.clean, self.patch)
        elif rule == "spans" and self.span_numbers is not None:
            keys = span_keys([""] * len(self), self.span_numbers, self.spans)
        elif rule in get_args(TemplateRule):
            lacking = {"mask": "patch prompts", "spans": "prompts with spans"}.get(rule, "a template field")
            raise UserError(f"templates by {rule!r} need {lacking}")
        else:
            raise unknown("template rule", rule, get_args(TemplateRule))
        return self._keyed(keys, rule)

    def _keyed(self, keys: list[str], rule: TemplateRule) -> PromptSet:
        """The same prompts with these keys; whatever is known of their templates still says how they are drawn."""
        knows_more = self.template_rule in ("spans", "field") or (self.template_rule == "mask" and rule == "length")
        told = self.units is None and knows_more
        units = self.groups.to(self.clean.input_ids.device) if told else self.units
        return replace(self, templates=keys, template_rule=rule, units=units)

    def aligned_to(self, reference: PromptSet) -> PromptSet:
        """The same prompts under the template keys of another set (train and test), where they have one there; by
        length where they lack the spans or the template field that the other set is keyed by.
        """
        lacking = {"spans": self.span_numbers is None, "field": self.template_rule != "field"}
        if lacking.get(reference.template_rule, False):
            return self.with_templates("length")
        if reference.template_rule != "mask":
            return self.with_templates(reference.template_rule)
        patterns = Counter(reference.templates)
        otherwise = self.with_templates("mask").templates if self.patch is not None else length_keys(self.clean)
        fits = commonest_fits(words_of(self.clean), patterns)
        return self._keyed([fit or key for fit, key in zip(fits, otherwise, strict=True)], "mask")

    @property
    def groups(self) -> Tensor:
        """[B] int64: the number of the group each prompt is drawn with for intervals: its template, by the name the
        file gives it or by the words that clean and patch prompts share. Where prompts have no templates, or all have
        the same one, a prompt is a group with those that repeat it.
        """
        names: Sequence[Any] = []
        if self.units is not None:
            names = self.units.tolist()
        elif self.template_rule == "mask":
            names = self.templates
        elif self.template_rule == "field":
            names = [name.rpartition("/")[0] for name in self.templates]
        elif self.template_rule == "spans":
            names = [template_of(name) for name in self.templates]
        groups = numbered(names)
        return groups if len(groups.unique()) > 1 else numbered(self._contents())

    def _contents(self) -> list[tuple[Any, ...]]:
        """Tokens and answers of each prompt, which is all that the model and the metric see."""
        tokens = [self.clean] if self.patch is None else [self.clean, self.patch]
        answers = [self.clean_answers] if self.patch_answers is None else [self.clean_answers, self.patch_answers]
        rows = zip(*(words_of(side) for side in tokens), *(ids.tolist() for ids in answers), strict=True)
        return [tuple(map(str, row)) for row in rows]

    @property
    def fingerprint(self) -> str:
        """A short hash of texts, tokens, answers and spans, in their order; cases and templates are not part of it."""
        columns: list[Any] = [self.texts, words_of(self.clean), self.clean_answers.tolist()]
        columns.append(None if self.patch is None else words_of(self.patch))
        columns.append(None if self.patch_answers is None else self.patch_answers.tolist())
        columns.append(None if self.span_numbers is None else span_keys(self.texts, self.span_numbers, self.spans))
        return hashlib.sha256(json.dumps(columns).encode()).hexdigest()[:16]

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
    """Read the usable prompts of a file or hub data set and tokenise them.

    Args:
        source: a .jsonl, .json or .csv file of any format of `circuits.prompts.formats`, or a data set on the hub,
            `owner/name`, `owner/name:split` or `owner/name:config:split`.
        model: the model whose tokenizer is used.
        limit: how many are taken: the first ones, or where these miss a case or template of the file, some of each.
        span_template: a template such as "The {subject} near the {attractor}" that finds the spans of all prompts,
            whatever the file says of them.
        need_spans: leave out, and count, prompts whose spans cannot be found; otherwise prompts have spans where all of
            them do.

    Returns:
        The prompts as one batch on the model's device; `rejected` counts those that cannot be used, by reason.

    Raises:
        UserError: for a file that is missing or malformed, with its line, and where no prompt can be used.
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
    examples = with_rendered_chats(examples, model.tokenizer, name)
    check_ids(examples, min(model.vocab_size, len(model.tokenizer)), name)
    need_spans = need_spans or span_template is not None
    with_spans = span_template is not None or any(x.spans or has_fields(x.template) for x in examples)
    if need_spans and not with_spans:
        raise UserError(f'{name} says nothing of spans: give "spans" in the file, or a span template')
    reader = Reader(
        model,
        paired=any(example.patch is not None for example in examples),
        contrasted=any(example.patch_answers for example in examples),
        with_spans=with_spans and (need_spans or model.tokenizer.is_fast),
        need_spans=need_spans,
        span_template=span_template,
    )
    rows, rejected = choose(examples, lambda numbers: reader.read([examples[number] for number in numbers]), limit)
    if not rows:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in rejected.most_common())
        raise UserError(f"no usable prompt in {name}: {reasons or 'it is empty'}")
    return _prompt_set(rows, rejected, reader).to(model.device)


def _prompt_set(rows: Sequence[Row], rejected: Counter[str], reader: Reader) -> PromptSet:
    """The rows as one batch, with spans where all of them have some."""
    pad = reader.model.text_coder.pad_id
    width = max(len(answers) for row in rows for answers in (row.clean_answers, row.patch_answers))
    prompts = PromptSet(
        clean=Tokens.from_rows([row.clean for row in rows], pad_id=pad),
        patch=Tokens.from_rows([row.patch for row in rows], pad_id=pad) if reader.paired else None,
        clean_answers=_answer_tensor([row.clean_answers for row in rows], width),
        patch_answers=_answer_tensor([row.patch_answers for row in rows], width) if reader.contrasted else None,
        cases=[row.example.case for row in rows],
        templates=[row.example.template for row in rows],
        texts=[row.example.clean for row in rows],
        rejected=dict(rejected.most_common()),
    )
    spans = [row.spans for row in rows if not isinstance(row.spans, str)]
    if len(spans) == len(rows):
        names, numbers = number_spans(spans, prompts.clean.n_positions)
        prompts = replace(prompts, spans=names, span_numbers=numbers)
    return _choose_templates(prompts)


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
    if prompts.span_numbers is not None:
        keys = span_keys(prompts.templates, prompts.span_numbers, prompts.spans)
        return replace(prompts, templates=keys, template_rule="spans")
    if all(prompts.templates):
        keys = [f"{name}/{length}" for name, length in zip(prompts.templates, length_keys(prompts.clean), strict=True)]
        return replace(prompts, templates=keys, template_rule="field")
    if prompts.patch is not None:
        keys = mask_keys(prompts.clean, prompts.patch)
        if len(keys) >= MIN_PROMPTS_A_TEMPLATE * len(set(keys)):
            return replace(prompts, templates=keys, template_rule="mask")
    return replace(prompts, templates=length_keys(prompts.clean), template_rule="length")
