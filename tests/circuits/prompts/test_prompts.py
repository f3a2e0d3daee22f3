"""Every prompt format is read, every rejected example is counted, every mistake is named with its place."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from circuits.faithfulness.nodes import aligned
from circuits.metrics.metrics import last_logits, logit_difference
from circuits.prompts.dataset import PromptSet, load_prompts, make_prompts
from circuits.prompts.formats import Example, read_examples
from circuits.prompts.spans import parse_spans
from sae.errors import UserError
from sae.model.language_model import Tokens
from sae.model.load import load_model
from tests.conftest import WORDS, tiny_hf, word_tokenizer
from tests.tiny_models import tiny_model

PAIR = {
    "clean_prefix": "the cat",
    "patch_prefix": "the cats",
    "clean_answer": " is",
    "patch_answer": " are",
    "case": "singular",
}


def write_lines(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def gender_line(name: str, other: str, **more) -> dict:
    answers = {"clean_answer": " she", "patch_answer": " he"}
    return {"clean_prefix": f"{name} was sad", "patch_prefix": f"{other} was sad", "case": "female", **answers, **more}


@pytest.fixture(scope="module")
def real_model(shared_dir):

    return load_model(shared_dir / "models" / "tinystories-260k", device="cpu")


# --- formats ---------------------------------------------------------------------------------------------------


def test_pairs_and_single_prompts(tmp_path):
    single = {"clean_prefix": "the cat", "clean_answer": " is"}
    path = write_lines(tmp_path / "p.jsonl", {**PAIR, "template": "simple"}, "", single)
    pair, alone = read_examples(path)
    assert pair == Example("the cat", (" is",), "the cats", (" are",), "singular", "simple")
    assert alone == Example("the cat", (" is",))


@pytest.mark.parametrize("name", ["p.json", "p.txt"])
def test_json_lines_are_recognised_whatever_the_name(tmp_path, name):
    assert len(read_examples(write_lines(tmp_path / name, PAIR, PAIR))) == 2


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({**PAIR, "case": "a\u2028b"}, ensure_ascii=False) for _ in range(2)), "utf-8")
    assert [example.case for example in read_examples(path)] == ["a\u2028b"] * 2


def test_a_json_list_of_pairs(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps([PAIR, PAIR], indent=1))
    assert [example.patch for example in read_examples(path)] == ["the cats", "the cats"]


@pytest.mark.parametrize("indent", [None, 2])
def test_clusters(tmp_path, indent):
    path = tmp_path / "cluster.json"
    content = {"382": {"context": ["the", " cat"], "answer": " is"}, "17": {"context": ["a"], "answer": " b"}}
    path.write_text(json.dumps(content, indent=indent))
    assert read_examples(path) == [Example("the cat", (" is",)), Example("a", (" b",))]


def test_eap_ig_table(tmp_path):
    path = tmp_path / "ioi.csv"
    path.write_text('clean,corrupted,correct_idx,incorrect_idx,label\n"a, b\nc",d,5,7,ABBA\ne,f,"[1, 2]",[3],\n')
    first, second = read_examples(path)
    assert first == Example("a, b\nc", (5,), "d", (7,), "ABBA")
    assert second == Example("e", (1, 2), "f", (3,))


def test_answer_sets(tmp_path):
    path = tmp_path / "docstring.json"
    prompt = {"clean": "x", "corrupt": "y", "answers": [" a", " b"], "wrong_answers": [" c"]}
    path.write_text(json.dumps({"prompts": [prompt], "seq_labels": ["s"]}))
    assert read_examples(path) == [Example("x", (" a", " b"), "y", (" c",))]


def test_mib_rows(tmp_path):
    ioi = {
        "prompt": "Ann and Bo ... to",
        "choices": ["Ann", "Bo"],
        "answerKey": 0,
        "abc_counterfactual": {"prompt": "C and D ... to", "choices": ["C", "D"], "answerKey": 0},
        "s2_io_flip_counterfactual": {"prompt": "Bo and Ann ... to", "choices": ["Ann", "Bo"], "answerKey": 1},
    }
    letters = {"label": ["A", "B"], "text": ["red", "blue"]}
    mcqa = {
        "prompt": "Which? A red B blue",
        "choices": letters,
        "answerKey": 1,
        "symbol_counterfactual": {"prompt": "Which? B red A blue", "choices": letters, "answerKey": "A"},
    }
    path = write_lines(tmp_path / "mib.jsonl", ioi, mcqa)
    first, second = read_examples(path)
    assert first == Example("Ann and Bo ... to", (" Ann",), "Bo and Ann ... to", (" Bo",))
    assert second == Example("Which? A red B blue", ("B",), "Which? B red A blue", ("A",))


def test_mib_rows_with_labels_and_names(tmp_path):
    """Arithmetic says its answers itself, IOI may leave them to the names in the prompt; a row without a pair."""
    arithmetic = {
        "prompt": "The sum of 12 and 30 is ", "label": "42", "operator": "+", "num_digit": 2,
        "random_counterfactual": {"prompt": "The sum of 11 and 20 is ", "label": "31"},
    }  # fmt: skip
    alone = {**arithmetic, "random_counterfactual": {"prompt": None, "label": None}}
    ioi = {
        "prompt": "Ann and Bo ... to", "metadata": {"subject": "Bo", "indirect_object": "Ann", "random_c": "Cy"},
        "s2_io_flip_counterfactual": {"prompt": "Bo and Ann ... to"},
    }  # fmt: skip
    path = write_lines(tmp_path / "mib.jsonl", arithmetic, alone, ioi)
    assert read_examples(path) == [
        Example("The sum of 12 and 30 is ", ("42",), "The sum of 11 and 20 is ", ("31",)),
        Example("The sum of 12 and 30 is ", ("42",), ""),
        Example("Ann and Bo ... to", (" Ann",), "Bo and Ann ... to", (" Bo",)),
    ]


@pytest.mark.slow
def test_a_hub_data_set(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, split):
        asked.append((args, split))
        return [PAIR]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("owner/name", "owner/name:test", "owner/name:config:test"):
        assert len(read_examples(source)) == 1
    assert asked == [(("owner/name",), "train"), (("owner/name",), "test"), (("owner/name", "config"), "test")]


# --- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([PAIR, '{"clean_prefix": "the'], r"p\.jsonl, line 2: malformed JSON"),
        (
            [PAIR, "", {"clean_prefix": "the", "patch_prefix": "a", "clean_answer": " b"}],
            r"line 3: key 'patch_answer' is missing",
        ),
        ([{"clean_answer": " is"}], r"line 1: key 'clean_prefix' is missing"),
        ([{**PAIR, "clean_answer": 5.5}], r"line 1: key 'clean_answer' is 5.5: expected text, a token id or"),
        ([{**PAIR, "clean_answer": True}], r"line 1: key 'clean_answer' is true: expected text, a token id or"),
        ([{**PAIR, "case": {}}], r"line 1: key 'case' is \{\}: expected text"),
        (['{"clean_prefix": "a\\ud800b"}'], r"line 1: half of a surrogate pair, .*a\\ud800b"),
        (["[" * 100_000], r"line 1: JSON nested too deeply"),
        (['{"clean_prefix": ' + "7" * 5000 + "}"], r"line 1: malformed JSON"),
        ([{**PAIR, "clean_prefix": ["the"]}], r"line 1: key 'clean_prefix' is \[\"the\"\]: expected a valid string"),
        ([{"text": "hello"}], r"line 1: no known prompt format has the keys \['text'\]"),
        (["[1, 2]"], r"line 1: expected an object"),
        ([""], r"holds no prompts"),
    ],
)
def test_mistakes_in_json_lines_name_file_and_line(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        read_examples(write_lines(tmp_path / "p.jsonl", *lines))


def test_other_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"no prompt file 'nowhere\.jsonl'"):
        read_examples("nowhere.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        read_examples(tmp_path)
    broken = tmp_path / "p.json"
    broken.write_text('{\n "clean_prefix": "a",\n oops\n}')
    with pytest.raises(UserError, match=r"p\.json, line 3: malformed JSON"):
        read_examples(broken)
    table = tmp_path / "t.csv"
    table.write_text("clean,corrupted,correct_idx\na,b,1\n")
    with pytest.raises(UserError, match=r"t\.csv, line 2: key 'incorrect_idx' is missing"):
        read_examples(table)
    table.write_text("clean,corrupted,correct_idx,incorrect_idx\na,b,1,he\n")
    with pytest.raises(UserError, match=r"line 2: key 'incorrect_idx' is \"he\": expected a token id"):
        read_examples(table)


# --- tokens, rejections, templates -----------------------------------------------------------------------------


def test_real_pairs(real_model, shared_dir):
    prompts = load_prompts(shared_dir / "data" / "pronoun_gender" / "train.jsonl", real_model)
    assert len(prompts) == 782
    assert prompts.rejected == {}
    (he,), (she,) = real_model.text_coder.continuations(["Amy", "Amy"], [" he", " she"])
    female = torch.tensor([case == "female" for case in prompts.cases])
    assert (prompts.clean_answers == torch.where(female, she, he)).all()
    assert (prompts.patch_answers == torch.where(female, he, she)).all()
    assert (prompts.clean.lengths == prompts.patch.lengths).all()
    assert_keys_align(prompts)


def assert_keys_align(prompts):
    lengths = prompts.clean.lengths.tolist()
    for key in set(prompts.templates):
        assert len({length for length, other in zip(lengths, prompts.templates, strict=True) if other == key}) == 1


def test_rejections_are_counted_by_reason(real_model, tmp_path):
    path = write_lines(
        tmp_path / "p.jsonl",
        gender_line("Sue", "Bob"),
        gender_line("Sue", "Bobby-John"),
        gender_line("Sue", "Bob", clean_answer=" something"),
        gender_line("Sue", "Bob", clean_answer=" he"),
        gender_line("Sue", "Bob", clean_prefix="Sue " * 600, patch_prefix="Bob " * 600),
        {"clean_prefix": "Sue was sad", "clean_answer": " she"},
        gender_line("Sue", "Bob", clean_prefix=""),
        gender_line("Sue", "Sue"),
    )
    prompts = load_prompts(path, real_model)
    assert len(prompts) == 1
    assert prompts.rejected == {
        "clean and patch differ in token length": 1,
        "answer is not one token": 1,
        "both answers are the same token": 1,
        "longer than the model's context": 1,
        "no patch prompt": 1,
        "empty prompt": 1,
        "clean and patch are the same prompt": 1,
    }
    assert "6" not in prompts.summary()
    assert prompts.summary().startswith("1 pairs (female 1); skipped 1 (")


def test_no_usable_prompt_is_an_error(real_model, tmp_path):
    path = write_lines(tmp_path / "p.jsonl", gender_line("Sue", "Bobby-John"), gender_line("Sue", "Bobby-John"))
    with pytest.raises(UserError, match=r"no usable prompt in .*p\.jsonl: 2 x clean and patch differ"):
        load_prompts(path, real_model)


def test_limit_keeps_the_first_usable(real_model):
    examples = [Example(text, (" she",)) for text in ("Sue was", "Amy was sad", "Lily")]
    prompts = make_prompts(examples, real_model, limit=2)
    assert prompts.texts == ["Sue was", "Amy was sad"]
    assert prompts.patch is None and prompts.patch_answers is None


def test_several_answers_are_padded(real_model):
    examples = [Example("Sue", (" she", " he"), "Bob", (" it",)), Example("Sue", (" she",), "Bob", (" he", " I"))]
    prompts = make_prompts(examples, real_model)
    words = (" she", " he", " it", " I")
    found = real_model.text_coder.continuations(["Sue"] * 4, words)
    ids = {word: token for word, (token,) in zip(words, found, strict=True)}
    assert prompts.clean_answers.tolist() == [[ids[" she"], ids[" he"]], [ids[" she"], -1]]
    assert prompts.patch_answers is not None
    assert prompts.patch_answers.tolist() == [[ids[" it"], -1], [ids[" he"], ids[" I"]]]


def test_template_field_is_used_with_the_length(real_model):
    prompts = make_prompts([Example(text, (" she",), template="t") for text in ("Sue was", "Sue was")], real_model)
    assert prompts.template_rule == "field"
    assert prompts.templates == [f"t/{prompts.clean.lengths[0]}"] * 2


def bare(rows, others) -> PromptSet:
    size = len(rows)
    nothing, blank = torch.zeros(size), [""] * size
    return PromptSet(Tokens.from_rows(rows), Tokens.from_rows(others), nothing, nothing, blank, blank, blank)


def test_masked_templates_join_pairs_of_one_frame():
    rows = [[1, noun, 5, 6] for noun in (10, 11, 12, 13)] + [[1, 8, noun, 5, 6] for noun in (10, 11)]
    others = [[1, noun, 5, 6] for noun in (20, 21, 22, 23)] + [[1, 8, noun, 5, 6] for noun in (20, 21)]
    prompts = bare(rows, others)
    assert prompts.with_templates("mask").templates == ["1 * 5 6"] * 4 + ["1 8 * 5 6"] * 2
    assert prompts.with_templates("length").templates == ["4"] * 4 + ["5"] * 2
    with pytest.raises(UserError, match="template field"):
        prompts.with_templates("field")


def test_a_name_that_shares_a_token_takes_the_common_template():
    rows, others = [[1, 10, 11, 5], [1, 12, 13, 5], [1, 14, 15, 5]], [[1, 20, 21, 5], [1, 22, 23, 5], [1, 14, 16, 5]]
    assert bare(rows, others).with_templates("mask").templates == ["1 * * 5"] * 3


def test_an_odd_pair_does_not_swallow_the_common_template():
    rows, others = [[1, 10, 5]] * 3 + [[1, 11, 7]], [[1, 12, 5]] * 3 + [[1, 13, 8]]
    assert bare(rows, others).with_templates("mask").templates == ["1 * 5"] * 3 + ["1 * *"]


def test_test_prompts_take_the_keys_of_the_reference():
    train = bare([[1, 10, 11, 5], [1, 12, 13, 5]], [[1, 20, 21, 5], [1, 22, 23, 5]]).with_templates("mask")
    test = bare([[1, 10, 30, 5], [1, 9, 9, 9]], [[1, 10, 31, 5], [1, 8, 9, 9]])
    assert test.aligned_to(train).templates == ["1 * * 5", "1 * 9 9"]
    assert test.aligned_to(train.with_templates("length")).templates == ["4", "4"]


def test_slices_and_batches_trim_the_padding(tiny_prompts):
    short = tiny_prompts[::2]
    assert short.clean.input_ids.shape == (4, 5)
    assert short.clean.attention_mask.all()
    assert torch.equal(short.clean.input_ids, tiny_prompts.clean.input_ids[::2, 2:])
    assert torch.equal(short.patch.input_ids, tiny_prompts.patch.input_ids[::2, 2:])
    assert short.cases == tiny_prompts.cases[::2]

    batches = list(tiny_prompts.batches(3))
    assert [len(batch) for batch in batches] == [3, 3, 2]
    assert [text for batch in batches for text in batch.texts] == tiny_prompts.texts
    assert torch.cat([batch.clean_answers for batch in batches]).equal(tiny_prompts.clean_answers)


def test_indexing_by_number_list_and_mask(tiny_prompts):
    female = torch.tensor([case == "b_a" for case in tiny_prompts.cases])
    assert tiny_prompts[female].texts == tiny_prompts[4:].texts
    assert tiny_prompts[[2, 0]].texts == ["prompt 2", "prompt 0"]
    assert tiny_prompts[-1].texts == ["prompt 7"]
    with pytest.raises(IndexError):
        tiny_prompts[8]


# --- a limit ---------------------------------------------------------------------------------------------------


def made(*kinds: tuple[str, str, int]) -> list[Example]:
    """n examples of each (case, template), one kind after the other."""
    return [
        Example(
            f"the {'old ' * (number % 3)}man", (" runs",), f"the {'old ' * (number % 3)}dog", (" run",), case, frame
        )
        for case, frame, n in kinds
        for number in range(n)
    ]


def test_a_limit_takes_each_case_and_template(tiny_model):
    examples = made(("a", "x", 60), ("a", "y", 20), ("b", "x", 18), ("b", "y", 2))
    prompts = make_prompts(examples, tiny_model, limit=20)
    kinds = Counter((case, template[0]) for case, template in zip(prompts.cases, prompts.templates, strict=True))
    assert kinds == {("a", "x"): 11, ("a", "y"): 4, ("b", "x"): 4, ("b", "y"): 1}
    assert prompts.cases == sorted(prompts.cases)  # in the order of the file
    assert prompts.fingerprint == make_prompts(examples, tiny_model, limit=20).fingerprint
    assert make_prompts(examples, tiny_model, limit=3).cases == ["a", "a", "b"]


def test_a_limit_takes_the_first_where_they_are_of_every_kind(tiny_model):
    mixed = [example for pair in zip(made(("a", "x", 40)), made(("b", "x", 40)), strict=True) for example in pair]
    assert make_prompts(mixed, tiny_model, limit=10).texts == [example.clean for example in mixed[:10]]


def test_frames_of_shared_words_are_kinds_where_there_is_no_template(tiny_model):
    frames = ("the {} runs", "the {} near", "a {} sees")
    pairs = [("man", "men"), ("dog", "dogs"), ("cat", "cats"), ("boy", "boys"), ("king", "kings")]
    examples = [Example(f.format(a), (" the",), f.format(b), (" a",)) for f in frames for a, b in pairs]
    prompts = make_prompts(examples, tiny_model, limit=6)
    assert Counter(text.split()[-1] for text in prompts.texts) == {"runs": 2, "near": 2, "sees": 2}


def test_a_limit_tokenises_no_more_than_it_needs(tiny_model, monkeypatch):
    coder, seen = type(tiny_model.text_coder), []
    prompt_ids = coder.prompt_ids
    monkeypatch.setattr(coder, "prompt_ids", lambda self, texts: [seen.extend(texts), prompt_ids(self, texts)][1])
    examples = made(("a", "x", 5000), ("b", "x", 5000))
    prompts = make_prompts(examples, tiny_model, limit=100)
    assert Counter(prompts.cases) == {"a": 50, "b": 50} and len(seen) <= 2 * 2 * 100


# --- formats of other projects ---------------------------------------------------------------------------------


def test_greater_than_of_eap_ig_and_mib(tmp_path):
    table = tmp_path / "greater_than.csv"
    table.write_text("clean,corrupted,label\nfrom 1352 to 13,from 1301 to 13,52\nfrom 1604 to 16,from 1601 to 16,4\n")
    first, second = read_examples(table)
    assert (first.clean, first.patch) == ("from 1352 to 13", "from 1301 to 13")
    assert first.clean_answers == tuple(map(str, range(53, 100)))
    assert first.patch_answers == tuple(f"{year:02}" for year in range(53))
    assert second.patch_answers == ("00", "01", "02", "03", "04")
    row = {"clean": "from 1352 to 1399", "corrupted": "from 1301 to 1399", "year": "1352"}
    (mib,) = read_examples(write_lines(tmp_path / "mib.jsonl", row))
    assert (mib.clean, mib.patch) == ("from 1352 to 13", "from 1301 to 13")
    assert mib.clean_answers == first.clean_answers
    for wrong in ("ABBA", "152", "-1", ""):
        table.write_text(f"clean,corrupted,label\na,b,{wrong}\n")
        with pytest.raises(UserError, match=r"line 2: key 'label' is .*expected two digits"):
            read_examples(table)


def test_the_metric_of_greater_than_is_that_of_eap_ig(tmp_path):
    """Mean logit of the years above minus that of the others, against their formula."""
    digits = {f"{year:02}": year for year in range(100)} | {"to": 100, "<unk>": 101}
    tokenizer = Tokenizer(models.WordLevel(digits, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[0-9]{2}|[a-z]+"), "isolated")
    hf = tiny_hf("gpt_neox")
    hf.resize_token_embeddings(len(digits), mean_resizing=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    model = load_model(hf, tokenizer=fast, device="cpu", check=False)
    table = tmp_path / "greater_than.csv"
    table.write_text("clean,corrupted,label\n1352to13,1301to13,52\n")
    prompts = load_prompts(table, model)
    logits = last_logits(model, prompts)
    ids = list(range(100))
    expected = logits[0, ids[53:]].mean() - logits[0, ids[:53]].mean()
    assert logit_difference(logits, prompts)[0] == pytest.approx(-float(expected), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answerKey": None}, "line 1: key 'answerKey' is null: expected the number of one of the 2 choices"),
        ({"answerKey": 2}, "line 1: key 'answerKey' is 2: expected the number of one of the 2 choices"),
        ({"answerKey": -1}, "line 1: key 'answerKey' is -1"),
        ({"answerKey": "C"}, "line 1: key 'answerKey' is \"C\""),
        ({"answerKey": {}}, "line 1: key 'answerKey' is {}"),
        ({"choices": 3}, "line 1: key 'choices' is 3: expected a list of texts"),
        ({"choices": None}, "line 1: key 'answerKey' is 0: expected choices, and the number of one"),
        ({"prompt": None}, "line 1: key 'prompt' is null: expected a valid string"),
        ({"a_counterfactual": {"prompt": "x"}}, "line 1, a_counterfactual: key 'answerKey' is null"),
        ({"a_counterfactual": None}, "every counterfactual prompt is empty"),
    ],
)
def test_mistakes_in_rows_of_mib(tmp_path, change, message):
    row = {"prompt": "a", "choices": ["b", "c"], "answerKey": 0}
    row["a_counterfactual"] = {"prompt": "d", "choices": ["b", "c"], "answerKey": 1}
    with pytest.raises(UserError, match=re.escape(message)):
        read_examples(write_lines(tmp_path / "p.jsonl", {**row, **change}))


def test_tables_as_other_programs_write_them(tmp_path):
    table = tmp_path / "t.csv"
    expected = Example('say "a", b', (5,), "d" * 200_000, (7,))
    rows = 'clean;corrupted;correct_idx;incorrect_idx\n"say ""a"", b";{long};5;7\n'.replace("{long}", "d" * 200_000)
    for text in (rows, "\ufeff" + rows, rows.replace(";", "\t"), rows.replace("\n", "\r\n")):
        table.write_text(text, "utf-8", newline="")
        assert read_examples(table) == [expected]
    for text, message in (
        ("clean,corrupted,correct_idx,incorrect_idx\na, b,c,5,7\n", "line 2: 5 fields, and the header has 4"),
        ('clean,corrupted,correct_idx,incorrect_idx\n"a \\"b\\"",c,5,7\n', "line 2: malformed table"),
        ('clean,corrupted,correct_idx,incorrect_idx\n"a,c,5,7\n', "malformed table"),
    ):
        table.write_text(text)
        with pytest.raises(UserError, match=message):
            read_examples(table)


def test_the_fingerprint_is_of_texts_answers_and_spans(tiny_model):
    example = Example("the man near", (" the",), "the men near", (" a",), "one", "x")
    same = make_prompts([replace(example, case="two", template="y")], tiny_model).fingerprint
    assert make_prompts([example], tiny_model).fingerprint == same
    spans = parse_spans({"who": ["man", "men"]}, "here")
    changes = ({"clean": "the dog near"}, {"patch": "the dogs near"}, {"clean_answers": (" with",)}, {"spans": spans})
    others = [make_prompts([replace(example, **change)], tiny_model).fingerprint for change in changes]
    others += [make_prompts([example, example], tiny_model).fingerprint]
    assert len({same, *others}) == 6


def test_prompts_with_and_without_a_template_field_align_by_length(tiny_model):
    with_field = [
        Example(f"the {noun} near", (" the",), f"the {noun}s near", (" a",), "", "x") for noun in ("dog", "cat")
    ]
    without = [Example(f"the {noun} near", (" the",), f"the {noun}s near", (" a",)) for noun in ("boy", "king")]
    train, test = make_prompts(with_field, tiny_model), make_prompts(without, tiny_model)
    assert train.template_rule == "field"
    for one, other in ((train, test), (test, train)):
        for ablation in ("mean", "optimal", "resample"):
            reference, measured, left_out = aligned(one, other, ablation)
            assert left_out == 0 and set(measured.templates) <= set(reference.templates)


def test_prompts_are_aligned_by_the_rule_that_covers_most(tiny_model):
    """Two of five prompts have a template of the reference, and one a length of it that others have."""
    train = make_prompts([Example("the man near", (" the",), template="x")] * 2, tiny_model)
    texts = ["the dog near"] * 2 + ["the old tall dog near"] * 3
    test = make_prompts([Example(text, (" the",), template="x") for text in texts], tiny_model)
    _, measured, left_out = aligned(train, test, "mean")
    assert len(measured) == 2 and left_out == 3 and measured.template_rule == "field"


def test_a_context_is_one_whatever_the_config_calls_it():
    """MPT says max_seq_len, a multimodal model says it of its text model."""
    model = load_model(tiny_model("mpt"), tokenizer=word_tokenizer(), device="cpu")
    assert model.max_positions == 64
    examples = [Example(f"{WORDS[0]} " * 65, (f" {WORDS[1]}",)), Example(WORDS[0], (f" {WORDS[1]}",))]
    prompts = make_prompts(examples, model)
    assert prompts.rejected == {"longer than the model's context": 1}
