"""Answers are tokenised in the context of their prompts, whatever the tokenizer."""

from __future__ import annotations

from itertools import product

import pytest

from circuits.prompts.dataset import PromptSet, load_prompts, make_prompts
from circuits.prompts.formats import Example
from circuits.prompts.reader import DIFFERS, MERGES, NOT_ONE, AnswerTokens
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.load import load_model
from sae.model.tokens import TokenizerWrapper
from tests.conftest import tiny_hf
from tests.tokenizer_families import FAMILIES, family

PROMPTS = (
    "the boy want", "the old man near the boy want", "the dog", "near the dog", "he said, ", 'she said, "', "(",
    "the year 13", "it is 13", "the cars", "the cars ", "they", "a",
)  # fmt: skip
ANSWERS = ("s", " s", "he", " he", "has", " has", "52", "5", "00", "!", '"', " because", "'re", "é", "ed", "the boy")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_answer_is_what_it_adds_to_the_tokens_of_the_prompt(name: str) -> None:
    """Against plain Hugging Face: tokens(prompt + answer) minus tokens(prompt)."""
    tokenizer = family(name, "<s> $A </s>")
    coder = TokenizerWrapper(tokenizer)
    pairs = list(product(PROMPTS, ANSWERS))
    found = AnswerTokens(coder).of(
        [Example(prompt, (answer,)) for prompt, answer in pairs], coder.prompt_ids([p for p, _ in pairs]), None
    )
    kinds = set()
    for (prompt, answer), given in zip(pairs, found, strict=True):
        own, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + answer))
        added = both[len(own) :]
        if both[: len(own)] != own:
            expected: object = MERGES
        else:
            known = len(added) == 1 and added != [tokenizer.unk_token_id]
            expected = (added, []) if known else NOT_ONE
        assert given == expected, (prompt, answer)
        kinds.add(given if isinstance(given, str) else "one")
    assert kinds == ({"one", NOT_ONE} if name == "character" else {"one", NOT_ONE, MERGES})


@pytest.fixture(scope="module")
def make_model():
    """A model of 71 tokens with a tokenizer of some family."""

    def make(tokenizer) -> LanguageModel:
        hf = tiny_hf("gpt_neox")
        hf.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        return load_model(hf, tokenizer=tokenizer, device="cpu", check=False)

    return make


def answers(prompts: PromptSet, model: LanguageModel) -> tuple[list[str], list[str]]:
    assert prompts.patch_answers is not None
    return tuple(model.tokenizer.convert_ids_to_tokens(x) for x in (prompts.clean_answers, prompts.patch_answers))  # type: ignore[return-value]


def test_endings_quotes_digits_and_letters(make_model) -> None:
    model = make_model(family("llama"))
    ending = Example("the boy want", ("s",), "the dog want", ("h",))
    assert answers(make_prompts([ending], model), model) == (["s"], ["h"])
    word = Example("the boy", (" want",), "the dog", (" has",))
    assert answers(make_prompts([word], model), model) == (["▁want"], ["▁has"])
    letters = make_model(family("character"))
    example = Example("the boy h", ("e",), "the dog h", ("a",))
    assert answers(make_prompts([example], letters), letters) == (["e"], ["a"])


def test_an_answer_that_merges_with_its_prompt_is_skipped_with_that_reason(make_model) -> None:
    model = make_model(family("byte-level"))
    usable = Example("the boy", (" want",), "the dog", (" has",))
    prompts = make_prompts([usable, Example("the dog", ("s",), "the car", ("s",))], model)
    assert len(prompts) == 1 and prompts.rejected == {MERGES: 1}


def test_both_answers_are_read_after_both_prompts(make_model) -> None:
    """ "has" is a word of its own behind a quote, and the end of one behind a letter."""
    model = make_model(family("metaspace-always"))
    example = Example("the boy want", ("s",), "the cars ", ("s",))
    clean, patch = (tuple(model.text_coder.prompt_ids([text])[0]) for text in (example.clean, example.patch or ""))
    (found,) = AnswerTokens(model.text_coder).of([example], [clean], [patch])
    assert found in (DIFFERS, MERGES, NOT_ONE)


def test_of_several_answers_one_that_merges_takes_the_token_that_writes_it(make_model) -> None:
    model = make_model(family("byte-level"))
    alone = Example("the dog", ("s",), "the car", (" is",))
    several = Example("the dog", ("s", " and"), "the car", (" is",))
    with pytest.raises(UserError, match=MERGES):
        make_prompts([alone], model)
    prompts = make_prompts([several], model)
    assert model.tokenizer.convert_ids_to_tokens(prompts.clean_answers[0]) == ["s", "Ġand"]


def test_ids_are_answers_too_and_those_of_another_tokenizer_refuse_the_file(tiny_model, tmp_path) -> None:
    row = '{"clean_prefix": "the man", "patch_prefix": "the men", "clean_answer": %s, "patch_answer": %s}\n'
    path = tmp_path / "prompts.jsonl"
    path.write_text(row % (30, "[31, 32]"))
    prompts = load_prompts(path, tiny_model)
    assert prompts.clean_answers.tolist() == [[30, -1]] and prompts.patch_answers.tolist() == [[31, 32]]  # type: ignore[union-attr]
    for wrong in (tiny_model.vocab_size, -1, 47764):
        path.write_text(row % (30, 31) + row % (30, wrong))
        with pytest.raises(UserError, match=f"prompts.jsonl has the token id {wrong} as an answer.*another tokenizer"):
            load_prompts(path, tiny_model, limit=1)


def test_special_tokens_stand_in_front_of_prompts_once_and_never_behind(make_model) -> None:
    examples = [Example("the boy", (" want",), "the dog", (" has",))]
    written = [Example("<s>the boy", (" want",), "<s>the dog", (" has",))]
    bare, full = make_model(family("llama", "<s> $A")), make_model(family("llama", "<s> $A </s>"))
    rows = make_prompts(examples, bare).clean.input_ids
    assert rows[0, 0] == 1 and rows[0].tolist().count(1) == 1
    for model, given in ((full, examples), (bare, written), (full, written)):
        assert make_prompts(given, model).clean.input_ids.equal(rows)
        assert model.tokenize_prompts([given[0].clean]).input_ids.equal(rows)
    assert full.tokenize(["the boy"]).input_ids[0, -1] == 2  # texts stay as the model saw them


def test_the_last_span_is_the_last_token_of_the_prompt(make_model) -> None:
    model = make_model(family("llama", "<s> $A </s>"))
    for start in ("", "<s>"):
        example = Example(f"{start}the boy has", (" he",), f"{start}the dog has", (" she",), template="the {who} has")
        prompts = make_prompts([example], model, span_template=f"{start}the {{who}} has")
        assert prompts.span_numbers is not None
        names = [prompts.spans[number] for number in prompts.span_numbers[0].tolist()]
        assert names[0] == "other" and names[-1] == "last" and "who" in names
