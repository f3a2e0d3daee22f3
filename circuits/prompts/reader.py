"""Examples to rows of tokens: which can be used, with the ids of their answers and the span of every token, and why
others cannot.

Conversations become text by the model's own chat template. The text ends where the assistant's answer begins; where the
last message is the assistant's, the answer goes on behind what it says. A beginning-of-text token that the template
writes is not doubled (`TokenizerWrapper.prompt_ids`).

The metric reads every answer after the clean prompt and after the patch prompt. Its token is what it adds to theirs:

1. An answer continues the prompt's text as it is written: its token is tokens(prompt + answer) minus tokens(prompt), of
   which there must be one. So " has" is a new word, and "s" after "The boy want" the ending.
2. Where the prompt's last token is another one in front of the answer ("The dog" + "s" is one token "dogs"), the model
   would have to say something that no text has: the prompt cannot be used.
3. Where a prompt has several answers (all two-digit years), one that merges takes the token that writes it behind the
   prompt's last token.
4. After the patch prompt each answer must be the same token.

What stands more than three words or three tokens before the answer is taken not to change its tokens: each ending of a
prompt is tokenised once with each answer.

Where a number of examples is asked for, they are the first ones, unless these miss a kind of example:

1. The kind of an example is its case and its sentence frame: the `template` field where every example has one, else the
   words that clean and patch prompt share ("* was sad because"), where such frames hold at least four examples on
   average and two of each kind can be taken, else none.
2. The first n usable examples are taken. Where a kind of the file is not among them, examples are taken by kind
   instead: each in proportion to its share of the file and at least once, in the order of the file within a kind.
3. Examples are examined (tokenised) in batches until n are usable, so that a long file costs little.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from circuits.prompts.formats import Example
from circuits.prompts.spans import Range, Span, SpanProblem, has_fields, spans_of_template, token_spans
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.tokens import TokenizerWrapper

ENDING = 3
"""Words and tokens of a prompt that decide how an answer behind it is tokenised."""
MERGES = "answer merges with the prompt's last token"
NOT_ONE = "answer is not one token"
DIFFERS = "answer is another token after the patch prompt"
MIN_EXAMPLES_A_FRAME = 4
"""Average number of examples below which frames of shared words say nothing."""
_BATCH = 64
Usable = TypeVar("Usable")


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
        reasons = [_token_problem(a, b, self.model, paired=self.paired) for a, b in zip(clean, patch, strict=True)]
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


def _token_problem(clean: list[int], patch: list[int], model: LanguageModel, *, paired: bool) -> str | None:
    if not clean or not patch:
        return "prompt has no tokens"
    if len(clean) != len(patch):
        return "clean and patch differ in token length"
    if clean == patch and paired:
        return "clean and patch are the same tokens"
    limit = model.max_positions
    return "longer than the model's context" if limit is not None and len(clean) > limit else None


# ------------------------------------------------------------------------------------------ conversations


def with_rendered_chats(examples: Sequence[Example], tokenizer: Any, name: str) -> list[Example]:
    """The examples with the text of their conversations as prompts; those that are text stay as they are.

    Args:
        examples: prompts, any of which may have `messages` and `patch_messages` in place of text.
        tokenizer: that of the model, whose chat template is used.
        name: what the examples are called in errors.

    Raises:
        UserError: the tokenizer has no chat template, or its template refuses the messages.
    """
    return [
        example
        if not example.messages
        else replace(
            example,
            clean=_chat_text(example.messages, tokenizer, name),
            patch=_chat_text(example.patch_messages, tokenizer, name) if example.patch_messages else None,
            messages=(),
            patch_messages=(),
        )
        for example in examples
    ]


def _chat_text(messages: Sequence[Mapping[str, str]], tokenizer: Any, name: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{name} has messages, and this model's tokenizer has no chat template: write prompts as text, "
            "clean_prefix and patch_prefix, or take the model's instruction-tuned version"
        )
    goes_on = messages[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on
        )
    except Exception as error:  # templates are programs, which raise what they like
        raise UserError(f"{name}: the model's chat template refuses {list(messages)}: {error}") from None


# ------------------------------------------------------------------------------------------ answers


class AnswerTokens:
    """The tokens of answers behind prompts, each kind of ending tokenised once."""

    def __init__(self, coder: TokenizerWrapper) -> None:
        self._coder = coder
        self._added: dict[tuple[object, str], list[int] | None] = {}

    def of(
        self, examples: Sequence[Example], clean: Sequence[Sequence[int]], patch: Sequence[Sequence[int]] | None
    ) -> list[tuple[list[int], list[int]] | str]:
        """Ids of the clean and of the patch answers of every example, or why it cannot be used.

        clean, patch: token ids of the prompts, [B] rows.
        """
        clean_ends = [_ending(example.clean, ids) for example, ids in zip(examples, clean, strict=True)]
        patch_ends = clean_ends
        if patch is not None:
            patch_ends = [_ending(example.patch or "", ids) for example, ids in zip(examples, patch, strict=True)]
        self._tokenise(examples, clean_ends, [example.clean for example in examples])
        self._tokenise(examples, patch_ends, [example.patch or example.clean for example in examples])
        return [self._read(*row) for row in zip(examples, clean_ends, patch_ends, strict=True)]

    def _tokenise(self, examples: Sequence[Example], endings: Sequence[tuple], texts: Sequence[str]) -> None:
        """Find out what each text answer adds behind each kind of ending, where that is not known."""
        todo: dict[tuple[object, str], str] = {}
        for example, end, text in zip(examples, endings, texts, strict=True):
            for answer in (*example.clean_answers, *example.patch_answers):
                if isinstance(answer, str) and (end, answer) not in self._added:
                    todo.setdefault((end, answer), text)
        added = self._coder.continuations(list(todo.values()), [answer for _, answer in todo])
        self._added.update(zip(todo, added, strict=True))

    def _read(self, example: Example, clean: tuple, patch: tuple) -> tuple[list[int], list[int]] | str:
        both: list[list[int]] = []
        for answers in (example.clean_answers, example.patch_answers):
            several, ids = len(answers) > 1, []
            for answer in answers:
                token = self._token(answer, clean, several=several)
                if isinstance(token, str):
                    return token
                if self._token(answer, patch, several=several) != token:
                    return DIFFERS
                ids.append(token)
            both.append(ids)
        return both[0], both[1]

    def _token(self, answer: str | int, end: tuple, *, several: bool) -> int | str:
        """The id of one answer behind one kind of ending, or why there is none."""
        if isinstance(answer, int):
            return answer
        added = self._added[end, answer]
        if added is None and several:
            spelt = self._coder.spelling(end[1][-1], answer)
            added = None if spelt is None else [spelt]
            self._added[end, answer] = added
        if added is None:
            return MERGES
        one = len(added) == 1 and added[0] != self._coder.tokenizer.unk_token_id
        return added[0] if one else NOT_ONE


def check_ids(examples: Sequence[Example], n_tokens: int, name: str) -> None:
    """`UserError` for a token id that the model does not have: the file was made with another tokenizer."""
    for example in examples:
        for answer in (*example.clean_answers, *example.patch_answers):
            if isinstance(answer, int) and not 0 <= answer < n_tokens:
                raise UserError(
                    f"{name} has the token id {answer} as an answer, and the model has the ids 0 to {n_tokens - 1}: "
                    "its ids are those of another tokenizer; give the answers as text"
                )


def _ending(text: str, ids: Sequence[int]) -> tuple:
    return tuple(text.rsplit(" ", ENDING)[-ENDING:]), tuple(ids[-ENDING:])


# ------------------------------------------------------------------------------------------ which are taken


def choose(
    examples: Sequence[Example], examine: Callable[[list[int]], list[Usable | str]], limit: int | None
) -> tuple[list[Usable], Counter[str]]:
    """At most `limit` usable examples in the order of the file, and how many of those looked at are not, by reason.

    examine: for the examples of some rows what is used of them, or why they cannot be.
    """
    everything = list(range(len(examples)))
    results: dict[int, Usable | str] = {}
    if limit is None or limit >= len(examples):
        results = dict(zip(everything, examine(everything), strict=True))
        chosen = everything
    else:
        kinds = kinds_of(examples, limit)
        chosen = _take(everything, results, examine, limit)
        if {kinds[row] for row in chosen if not isinstance(results[row], str)} < set(kinds):
            chosen = sorted(_take(by_kind(kinds), results, examine, limit))
    usable = [results[row] for row in chosen if not isinstance(results[row], str)]
    return usable, Counter(str(results[row]) for row in chosen if isinstance(results[row], str))  # type: ignore[return-value]


def _take(
    order: Sequence[int], results: dict[int, Usable | str], examine: Callable[[list[int]], list[Usable | str]], n: int
) -> list[int]:
    """The rows in this order up to the n-th usable one; what is found of rows is added to `results`."""
    taken: list[int] = []
    n_usable = 0
    for start in range(0, len(order), max(n, _BATCH)):
        batch = order[start : start + max(n, _BATCH)]
        unknown = [row for row in batch if row not in results]
        results.update(zip(unknown, examine(unknown), strict=True))
        for row in batch:
            taken.append(row)
            n_usable += not isinstance(results[row], str)
            if n_usable == n:
                return taken
    return taken


def kinds_of(examples: Sequence[Example], limit: int) -> list[tuple[str, str]]:
    """Case and sentence frame of each example."""
    cases = [example.case for example in examples]
    templates = [example.template for example in examples]
    if all(templates):
        return list(zip(cases, templates, strict=True))
    templates = [_shared_words(example) for example in examples]
    kinds = list(zip(cases, templates, strict=True))
    telling = len(templates) >= MIN_EXAMPLES_A_FRAME * len(set(templates)) and 2 * len(set(kinds)) <= limit
    return kinds if telling else [(case, "") for case in cases]


def first_rows(kinds: Sequence[Hashable], n: int) -> list[int]:
    """The first n rows, or where these miss a kind, n rows by kind in their order."""
    has_all_kinds = set(kinds[:n]) == set(kinds)
    return list(range(len(kinds)))[:n] if has_all_kinds else sorted(by_kind(kinds)[:n])


def by_kind(kinds: Sequence[Hashable]) -> list[int]:
    """All rows, so that any first n of them hold each kind by its share, and at least once where n allows."""
    size = Counter(kinds)
    seen: Counter[Hashable] = Counter()
    rank = []
    for row, kind in enumerate(kinds):
        rank.append((seen[kind] / size[kind], row))
        seen[kind] += 1
    return [row for _, row in sorted(rank)]


def _shared_words(example: Example) -> str:
    clean, patch = example.clean.split(), (example.patch or "").split()
    if len(clean) != len(patch):
        return ""
    return " ".join(a if a == b else "*" for a, b in zip(clean, patch, strict=True))
