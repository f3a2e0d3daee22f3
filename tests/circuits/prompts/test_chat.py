"""Conversations as prompts, against Hugging Face's own tokens of the chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from circuits.prompts.dataset import PromptSet, load_prompts
from sae.errors import UserError
from sae.model.load import load_model
from tests.conftest import tiny_hf
from tests.tokenizer_families import family

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role not in ('user', 'assistant') %}"
    "{{ raise_exception('no such role') }}{% endif %}the {{ message.content }}"
    "{% if message.role == 'user' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} she{% endif %}"
)


@pytest.fixture(scope="module")
def model():
    tokenizer = family("llama", "<s> $A")
    tokenizer.chat_template = TEMPLATE
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    hf = tiny_hf("gpt_neox")
    hf.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return load_model(hf, tokenizer=tokenizer, device="cpu", check=False)


def load(folder: Path, model, *rows: dict) -> PromptSet:
    file = folder / "chat.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return load_prompts(file, model)


def asks(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_prompts_are_what_the_chat_template_makes_of_them(model, tmp_path):
    pair = {
        "messages": asks("boy want"), "patch_messages": asks("dog want"), "clean_answer": " has",
        "patch_answer": " want", "case": "boy",
    }  # fmt: skip
    goes_on = {**pair, "messages": [*asks("boy"), {"role": "assistant", "content": "old"}]}
    goes_on["patch_messages"] = [*asks("dog"), {"role": "assistant", "content": "old"}]
    prompts = load(tmp_path, model, pair, goes_on)
    for row, messages in enumerate((pair["messages"], goes_on["messages"])):
        ids = prompts.clean.input_ids[row][prompts.clean.attention_mask[row].bool()].tolist()
        rendered = model.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not row, continue_final_message=bool(row)
        )
        assert ids == model.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert ids.count(1) == 1 and ids.count(2) == 1 and prompts.texts[row] == rendered
    assert prompts.cases == ["boy", "boy"] and prompts.patch is not None
    assert load(tmp_path, model, {key: value for key, value in pair.items() if key != "patch_messages"}).patch is None


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "key 'messages' is []"),
        ([{"role": "user"}], 'a message is {"role": TEXT, "content": TEXT}'),
        ([{"role": "user", "content": 3}], 'a message is {"role": TEXT, "content": TEXT}'),
        ([{"role": "king", "content": "boy"}], "refuses .*no such role"),
    ],
)
def test_mistakes_in_conversations(model, tmp_path, messages, sentence):
    with pytest.raises(UserError, match=sentence.replace("[", r"\[").replace("{", r"\{")):
        load(tmp_path, model, {"messages": messages, "clean_answer": " has"})


def test_a_model_without_a_chat_template_says_so(tiny_model, tmp_path):
    with pytest.raises(UserError, match="has no chat template"):
        load(tmp_path, tiny_model, {"messages": asks("the cat"), "clean_answer": " is"})
