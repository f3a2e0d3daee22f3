"""Named spans: how they are found, and where prompts take them from."""

from __future__ import annotations

import json
import re
import string
import time
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits.prompts.dataset import load_prompts, make_prompts
from circuits.prompts.formats import Example
from circuits.prompts.spans import Span, SpanProblem, parse_spans, spans_of_template, token_spans
from sae.errors import UserError

TEXT = "the old man near Bob's car"
PIECES = ["<bos>", "the", " old", " man", " ne", "ar", " Bob", "'s", " car"]


def offsets() -> list[tuple[int, int]]:
    """Places of PIECES in TEXT."""
    found, end = [(0, 0)], 0
    for piece in PIECES[1:]:
        found.append((end, end + len(piece)))
        end += len(piece)
    assert end == len(TEXT)
    return found


def roles(spans) -> str:
    """The role of every token, in one line."""
    parsed = {name: clean for name, (clean, _) in parse_spans(spans, "here").items()}
    return " ".join(token_spans(parsed, TEXT, offsets()))


# ---- finding spans


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ({"subject": "old man"}, "other other subject subject other other other other last"),
        ({"by": "near"}, "other other other other by by other other last"),
        ({"by": {"chars": [12, 16]}}, "other other other other by by other other last"),
        ({"by": [4, 6]}, "other other other other by by other other last"),
        ({"by": {"tokens": [3, 5], "special": False}}, "other other other other by by other other last"),
        ({"owner": "Bob's", "thing": "car"}, "other other other other other other owner owner thing"),
        ({"whole": [0, 9]}, " ".join(["whole"] * 9)),
        ({"last": [0, 1]}, "last other other other other other other other other"),
        ({"end": {"text": "ar", "occurrence": -1}}, None),
        ({"a": {"text": "ar", "occurrence": 1}}, "other other other other other a other other last"),
    ],
)
def test_roles(spans, expected):
    if expected is None:
        with pytest.raises(SpanProblem, match="cuts a token"):
            roles(spans)
    else:
        assert roles(spans) == expected


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        ({"subject": "woman"}, "span 'subject' not found"),
        ({"a": "ar"}, "occurs more than once"),
        ({"a": {"text": "man", "occurrence": 2}}, "not found"),
        ({"a": "ma"}, "cuts a token"),
        ({"a": [7, 10]}, "behind the prompt"),
        ({"a": {"chars": [20, 40]}}, "behind the prompt"),
        ({"a": {"chars": [3, 4]}}, "holds no token"),
        ({"a": "old man", "b": "man"}, "spans 'a' and 'b' overlap"),
    ],
)
def test_what_leaves_a_prompt_out(spans, reason):
    with pytest.raises(SpanProblem, match=reason):
        roles(spans)


@pytest.mark.parametrize(
    "spans",
    [["subject"], {"other": "man"}, {"a": 3}, {"a": [3, 3]}, {"a": {"word": "man"}}, {"a": [1, 2, 3]}, {"a": ""}],
)
def test_malformed_spans_are_told_with_their_place(spans):
    with pytest.raises(UserError, match="here"):
        parse_spans(spans, "here")


def test_templates():
    template = "The {subject} near the {thing}"
    assert spans_of_template(template, "The old kings near the cat") == {
        "subject": Span(chars=(4, 13)),
        "thing": Span(chars=(23, 26)),
    }
    with pytest.raises(SpanProblem, match="does not fit"):
        spans_of_template(template, "A king near the cat")
    for unclear in ("The king near the car near the cat", "The old king near the cat"):
        with pytest.raises(SpanProblem, match="more than one way"):
            spans_of_template("The {subject} {preposition} the {thing}", unclear)
    for wrong, why in (
        ("The king", "names no span"),
        ("{a} {a}", "twice"),
        ("{other}", "'other'"),
        ("{a", "malformed"),
    ):
        with pytest.raises(UserError, match=why):
            spans_of_template(wrong, "The king")


def by_regular_expression(template: str, text: str) -> dict[str, Span] | str:
    """Every way a template fits, tried one by one."""
    parts = list(string.Formatter().parse(template))
    names = [name for _, name, _, _ in parts if name]
    found = set()
    for lengths in product(range(1, len(text) + 1), repeat=len(names)):
        fields = iter(lengths)
        pattern = "".join(
            re.escape(literal) + (rf"((?!\s).{{{next(fields)}}}(?<!\s))" if name else "")
            for literal, name, _, _ in parts
        )
        if match := re.fullmatch(pattern, text, re.DOTALL):
            found.add(match.regs[1:])
    if len(found) != 1:
        return "more than one way" if found else "does not fit"
    return {name: Span(chars=chars) for name, chars in zip(names, found.pop(), strict=True)}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(["{a}", "{a} {b}", "a{a}b{b}", "{a}b {b}", "a {a} b", "{a}{b}", "{a} b {b}b"]),
    st.text(alphabet="ab \n", max_size=7),
)
def test_templates_fit_as_trying_every_way_does(template: str, text: str) -> None:
    expected = by_regular_expression(template, text)
    if isinstance(expected, str):
        with pytest.raises(SpanProblem, match=expected):
            spans_of_template(template, text)
    else:
        assert spans_of_template(template, text) == expected


@pytest.mark.parametrize("n_fields", [8, 40])
def test_a_template_that_does_not_fit_is_told_at_once(n_fields: int) -> None:
    template = " ".join(f"{{f{number}}}" for number in range(n_fields)) + " z"
    started = time.process_time()
    for _ in range(8):
        with pytest.raises(SpanProblem, match="does not fit"):
            spans_of_template(template, " ".join(["word"] * 60))
    assert time.process_time() - started < 1


def test_a_space_that_is_a_token_belongs_to_the_word_behind_it():
    """As it does where the word's first token has it, so that such words align."""
    spans = {"name": Span(text="Jo")}
    apart = token_spans(spans, "hi Jo runs", [(0, 0), (0, 2), (2, 3), (3, 5), (5, 10)])
    assert apart == ["other", "other", "name", "name", "last"]


# ---- prompts with spans


def test_prompts_take_spans_from_file_template_or_option(tiny_model, tmp_path):
    rows = [
        {"clean_prefix": f"the {a} near the {b}", "patch_prefix": f"the {c} near the {b}", "clean_answer": " runs",
         "patch_answer": " run"}
        for a, c, b in (("man", "men", "dog"), ("boy", "boys", "cat"), ("tall king", "tall kings", "girl"))
    ]  # fmt: skip
    path = tmp_path / "prompts.jsonl"

    def loaded(rows, **options):
        path.write_text("\n".join(map(json.dumps, rows)))
        return load_prompts(path, tiny_model, **options)

    assert loaded(rows).span_numbers is None
    with pytest.raises(UserError, match="says nothing of spans"):
        loaded(rows, need_spans=True)
    by_option = loaded(rows, span_template="the {subject} near the {thing}")
    assert by_option.spans == ("other", "subject", "thing") and by_option.template_rule == "spans"
    names = [[by_option.spans[n] for n in row if n >= 0] for row in by_option.span_numbers.tolist()]
    assert names[0] == ["other", "subject", "other", "other", "thing"]
    assert names[2] == ["other", "subject", "subject", "other", "other", "thing"]
    assert by_option.span_numbers[0, 0] == -1 and by_option[[0, 1]].span_numbers.shape == (2, 5)
    framed = loaded([row | {"template": "the {subject} near the {thing}"} for row in rows])
    assert torch.equal(framed.span_numbers, by_option.span_numbers)
    assert framed.templates[0].startswith("the {subject} near the {thing}|other*1 subject*1")
    given = [row | {"spans": {"by": "near"}} for row in rows]
    assert loaded(given).spans == ("other", "by", "last")

    given[1]["spans"] = {"subject": "boy"}  # "boy" cuts "boys" in the patch prompt
    assert loaded(given).span_numbers is None and not loaded(given).rejected
    assert loaded(given, need_spans=True).rejected == {"span 'subject' cuts a token": 1}
    given[1]["spans"] = {"subject": ["boy", "boys"]}
    assert loaded(given).span_numbers is not None
    given[1]["spans"] = {"subject": ["boy", "cat"]}
    assert loaded(given, need_spans=True).rejected == {"spans differ between clean and patch": 1}
    with pytest.raises(UserError, match="3 x does not fit"):
        loaded(rows, span_template="a {subject}")


def test_spans_in_tables_and_of_autocircuit(tiny_model, tmp_path):
    table = tmp_path / "prompts.csv"
    spans = json.dumps({"subject": [1, 2]}).replace('"', '""')
    table.write_text(f'clean,corrupted,correct_idx,incorrect_idx,spans\nthe man,the men,5,6,"{spans}"\n')
    assert load_prompts(table, tiny_model).spans == ("other", "subject")
    words = {"word_idxs": {"noun": 1}, "prompts": [
        {"clean": "the man runs", "corrupt": "the men runs", "answers": [" near"], "wrong_answers": [" with"]}
    ]}  # fmt: skip
    (tmp_path / "prompts.json").write_text(json.dumps(words))
    found = load_prompts(tmp_path / "prompts.json", tiny_model)
    assert found.spans == ("other", "noun", "last") and found.span_numbers.tolist() == [[0, 1, 2]]


def test_token_offsets_are_those_of_the_tokens(tiny_model):
    text = "the old man runs"
    (places,) = tiny_model.text_coder.prompt_offsets([text])
    assert [text[a:b].strip() for a, b in places] == text.split()
    example = Example(clean=text, clean_answers=(" near",), spans={"who": (Span(text="old man"), Span(text="old man"))})
    assert make_prompts([example], tiny_model).span_numbers.tolist() == [[0, 1, 1, 2]]
