"""The bundled model and its prompt files."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from examples.agreement import MODEL, PROMPT_SETS, SPLITS, prompts, text, train_model
from examples.agreement.evaluate import answer_id, evaluate, load, logit_differences
from examples.agreement.grammar import VERBS
from examples.agreement.lexicon import NOUNS
from examples.agreement.make_prompts import AUXILIARIES, PromptConfig, make_set
from examples.agreement.tokenizer import build_tokenizer
from examples.agreement.train_model import TrainConfig, valid_loss

Pair = dict[str, str]
NOUN_OF = {form: noun for noun in NOUNS for form in (noun.singular, noun.plural)}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


def read(name: str, split: str) -> list[Pair]:
    return [json.loads(line) for line in prompts(name, split).read_text().splitlines()]


def words(pair: Pair) -> set[str]:
    keys = ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer")
    return {word for key in keys for word in pair[key].split()}


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_bundled_model_agrees(name: str) -> None:
    model, tokenizer = load()
    result = evaluate(model, tokenizer, prompts(name, "test"))
    assert result.accuracy >= 0.98
    assert min(result.by_case.values()) >= 0.96
    assert result.logit_difference > 2


def test_evaluation_tells_the_right_form_from_the_wrong_one() -> None:
    model, tokenizer = load()
    pairs = read("nounpp", "test")[:20]
    swapped = [pair | {"clean_answer": pair["patch_answer"], "patch_answer": pair["clean_answer"]} for pair in pairs]
    difference = logit_differences(model, tokenizer, pairs)
    assert torch.equal(logit_differences(model, tokenizer, swapped), -difference)
    ids = tokenizer(pairs[0]["clean_prefix"], return_tensors="pt")["input_ids"]
    logits = model(input_ids=ids).logits[0, -1]
    clean, patch = (answer_id(tokenizer, pairs[0][key]) for key in ("clean_answer", "patch_answer"))
    assert difference[0].item() == pytest.approx((logits[clean] - logits[patch]).item(), abs=1e-4)


@pytest.mark.parametrize("name", PROMPT_SETS)
@pytest.mark.parametrize("split", SPLITS)
def test_pairs(name: str, split: str, tokenizer: PreTrainedTokenizerBase) -> None:
    pairs = read(name, split)
    assert len(pairs) >= (400 if split == "train" else 100)
    assert len({json.dumps(pair) for pair in pairs}) == len(pairs)
    shapes: dict[str, set[int]] = {}
    answer_of = cache(partial(answer_id, tokenizer))
    ids = (tokenizer([pair[key] for pair in pairs])["input_ids"] for key in ("clean_prefix", "patch_prefix"))
    for pair, clean, patch in zip(pairs, *ids, strict=True):
        assert clean[0] == patch[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in clean + patch
        assert len(clean) == len(patch)
        shapes.setdefault(pair["template"], set()).add(len(clean))
        answers = [answer_of(pair[key]) for key in ("clean_answer", "patch_answer")]
        assert len({*answers, tokenizer.unk_token_id}) == 3
        differing = [
            (a, b) for a, b in zip(pair["clean_prefix"].split(), pair["patch_prefix"].split(), strict=True) if a != b
        ]
        assert len(differing) == 1 and NOUN_OF[differing[0][0]] == NOUN_OF[differing[0][1]]
        noun = NOUN_OF[differing[0][0]]
        assert pair["case"].split("_")[0] == ("plural" if differing[0][0] == noun.plural else "singular")
        assert pair["clean_answer"][0] == " "
    assert all(len(lengths) == 1 for lengths in shapes.values())
    cases = [pair["case"] for pair in pairs]
    assert all(cases.count(case) == len(cases) / len(set(cases)) for case in cases)
    both = {(pair["clean_prefix"], pair["clean_answer"]) for pair in pairs}
    assert all((pair["patch_prefix"], pair["patch_answer"]) in both for pair in pairs)


def test_answers_agree_with_their_subject() -> None:
    plural = {"are", "have", "do", "were"}
    plural |= {verb.base for group in VERBS.values() for verb in group}
    for name in PROMPT_SETS:
        for pair in read(name, "test"):
            is_plural = pair["clean_answer"].strip() in plural
            assert is_plural == pair["case"].startswith("plural")
            assert (pair["patch_answer"].strip() in plural) != is_plural


def test_no_noun_or_verb_of_the_test_split_occurs_in_train() -> None:
    seen = {split: set().union(*(words(p) for name in PROMPT_SETS for p in read(name, split))) for split in SPLITS}
    assert seen["train"] & seen["test"] == {"The", "the", "that", "near", "behind", "beside", "with"}
    nouns = {split: {NOUN_OF[word] for word in seen[split] if word in NOUN_OF} for split in SPLITS}
    assert not nouns["train"] & nouns["test"] and len(nouns["test"]) >= 20
    lemma = {form: v.base for group in VERBS.values() for v in group for form in (v.base, v.third)}
    lemma |= {form: pair[0] for pairs in AUXILIARIES.values() for pair in pairs for form in pair}
    used = {split: {lemma[word] for word in seen[split] if word in lemma} for split in SPLITS}
    assert not used["train"] & used["test"] and len(used["test"]) >= 15


def test_prompt_files_are_what_the_script_writes() -> None:
    config = PromptConfig()
    for name in PROMPT_SETS:
        for split in SPLITS:
            assert read(name, split) == make_set(name, split, getattr(config, split), seed=config.seed)


def test_tokenizer_reads_and_writes_text(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("The parents near the cars")["input_ids"]
    assert [tokenizer.decode([i]) for i in ids] == ["<bos>", " The", " parents", " near", " the", " cars"]
    line = "The boys, who run. Does Tom sleep?"
    assert tokenizer.decode(tokenizer(line)["input_ids"], skip_special_tokens=True) == " " + line
    assert tokenizer(" runs", add_special_tokens=False) == tokenizer("runs", add_special_tokens=False)
    assert tokenizer("xyz", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]
    assert tokenizer.get_vocab() == build_tokenizer(max_length=256).get_vocab()
    for split in ("train", "valid"):
        lines = text(split).read_text().splitlines()
        assert not any(tokenizer.unk_token_id in row for row in tokenizer(lines[:500])["input_ids"])


@pytest.mark.slow
def test_loss_is_near_the_entropy_of_the_grammar() -> None:
    model, tokenizer = load()
    loss, nats = valid_loss(model, tokenizer, count=100)
    assert nats - 0.2 < loss < nats + 0.1


def test_sizes() -> None:
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 4_000_000
    assert 1_000_000 <= text("train").stat().st_size <= 1_500_000


@pytest.mark.slow
def test_training_is_reproducible_and_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_model, "valid_loss", lambda model, tokenizer: valid_loss(model, tokenizer, count=50))
    config = {"steps": 12, "pool": 128, "batch_tokens": 300, "warmup": 2, "width": 32, "layers": 1}
    measured = [train_model.train(TrainConfig(out=tmp_path / name, **config)) for name in ("a", "b")]
    assert measured[0]["loss"] == measured[1]["loss"] < 6.3  # a uniform guess is 6.5
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="nounpp"):
        prompts("nouns", "test")
    with pytest.raises(ValueError, match="valid"):
        text("test")
