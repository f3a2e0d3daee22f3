"""The tokens of answers: what an answer adds to the tokens of its prompt.

The metric reads every answer after the clean prompt and after the patch prompt.

1. An answer continues the prompt's text as it is written: its token is tokens(prompt + answer) minus tokens(prompt), of
   which there must be one. So " has" is a new word, and "s" after "The boy want" the ending.
2. Where the prompt's last token is another one in front of the answer ("The dog" + "s" is one token "dogs"), the model
   would have to say something that no text has: the prompt cannot be used.
3. Where a prompt has several answers (all two-digit years), one that merges takes the token that writes it behind the
   prompt's last token.
4. After the patch prompt each answer must be the same token.

What stands more than three words or three tokens before the answer is taken not to change its tokens: each ending of a
prompt is tokenised once with each answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from circuits.prompts.formats import Example
from sae.errors import UserError
from sae.model.tokens import TokenizerWrapper

ENDING = 3
"""Words and tokens of a prompt that decide how an answer behind it is tokenised."""
MERGES = "answer merges with the prompt's last token"
NOT_ONE = "answer is not one token"
DIFFERS = "answer is another token after the patch prompt"


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
