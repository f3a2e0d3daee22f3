"""Generation is greedy whatever the checkpoint says, and edits of the prompt stay in the prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.load import load_model
from sae.model.sites import Site
from tests.conftest import tiny_hf, word_tokenizer

RESID_0 = Site("resid", 0)
SETTINGS = [
    {"use_cache": False},
    {"repetition_penalty": 5.0},
    {"num_beams": 3},
    {"return_dict_in_generate": True},
    {"do_sample": True, "temperature": 5.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_checkpoints_settings_do_not_act(tiny_model: LanguageModel, settings: dict[str, Any]) -> None:
    hf = tiny_hf("gpt_neox")
    for name, value in settings.items():
        setattr(hf.generation_config, name, value)
    model = load_model(hf, tokenizer=word_tokenizer(), check=False)
    tokens = model.tokenize(["the man near the old dogs", "she"])
    edits = {RESID_0: lambda x: 2 * x}
    expected = tiny_model.generate(tokens, max_new_tokens=6, edits=edits)
    assert torch.equal(model.generate(tokens, max_new_tokens=6, edits=edits), expected)
    assert all(getattr(hf.generation_config, name) == value for name, value in settings.items())


@pytest.mark.parametrize("text", ["the man near the old dogs", "she"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_edits_of_the_prompt_end_with_it(tiny_model: LanguageModel, text: str, use_cache: bool) -> None:
    """One token or several, with a cache or without: later tokens are seen by their own edit alone."""
    tokens = tiny_model.tokenize([text])
    n, shift = tokens.n_positions, torch.linspace(-3, 3, 32)

    def at_prompt(x: Tensor) -> Tensor:
        assert x.shape[1] == n
        return x + shift

    later: list[int] = []

    def look(x: Tensor) -> Tensor:
        later.append(x.shape[1])
        return x

    ids = tiny_model.generate(
        tokens, max_new_tokens=4, min_new_tokens=4, edits={RESID_0: at_prompt}, later_edits={RESID_0: look},
        use_cache=use_cache,
    )  # fmt: skip
    assert later == ([1, 1, 1] if use_cache else [1, 2, 3])
    for step in range(4):
        text_so_far = type(tokens)(ids[:, : n + step], torch.ones_like(ids[:, : n + step]))
        edit = {RESID_0: lambda x: torch.cat([x[:, :n] + shift, x[:, n:]], 1)}
        logits = tiny_model.run(text_so_far, edits=edit).logits[0, -1]
        logits[tiny_model.tokenizer.eos_token_id] = -torch.inf
        assert logits.argmax() == ids[0, n + step]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 63}, "fit into the 64 positions.*at most 62 new tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 1, "num_beams": 2}, "num_beams is 2"),
    ],
)
def test_generation_that_cannot_be(tiny_model: LanguageModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_model.generate(tiny_model.tokenize(["the man"]), **options)


def test_positions_of_a_model_are_its_text_models(make_tiny_model: Callable[..., LanguageModel]) -> None:
    assert make_tiny_model("gpt2").max_positions == 64
