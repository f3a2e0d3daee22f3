"""Model access: what is wrong is named, and nothing is left behind."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from sae.errors import UserError
from sae.model.language_model import LanguageModel, Run
from sae.model.sites import Site

TEXTS = ["the man near the old dogs runs", "she sees", "they", "a boy who likes cats sings ."]  # lengths 7, 2, 1, 7
MLP_0, RESID_0 = Site("mlp", 0), Site("resid", 0)


def test_run_names_what_is_wrong(tiny_model: LanguageModel) -> None:
    tokens = tiny_model.tokenize(TEXTS)
    with pytest.raises(UserError, match=r"unknown site 'resid_7'.*did you mean 'resid_"):
        tiny_model.run(tokens, capture=[Site("resid", 7)])
    with pytest.raises(UserError, match=r"edit at site 'mlp_1' gave shape \[4, 1, 32\]: allowed is \[4, 7, 32\]"):
        tiny_model.run(tokens, edits={Site("mlp", 1): lambda x: x[:, :1]})

    def fail(x: Tensor) -> Tensor:
        raise ArithmeticError("from the edit")

    with pytest.raises(ArithmeticError, match="from the edit"):
        tiny_model.run(tokens, edits={MLP_0: fail})
    assert torch.isfinite(tiny_model.run(tokens).logits).all()  # the model is as before


def test_non_finite_values_name_the_first_site(tiny_model: LanguageModel) -> None:
    tokens = tiny_model.tokenize(TEXTS)
    edits = {MLP_0: lambda x: x.index_fill(2, torch.tensor([3]), torch.nan)}
    with pytest.raises(UserError, match=r"activations at site 'mlp_0': 28 of 896 values are NaN"):
        tiny_model.run(tokens, capture=tiny_model.sites, edits=edits).check_finite()
    tiny_model.run(tokens, capture=tiny_model.sites).check_finite()
    with pytest.raises(UserError, match="logits"):
        Run({}, torch.tensor([[torch.inf]])).check_finite()


def test_repeated_runs_leave_no_tensor_behind(tiny_model: LanguageModel) -> None:
    tokens = tiny_model.tokenize(TEXTS)
    sites = tiny_model.sites
    x = torch.zeros(4, 7, 32)

    def everything() -> None:
        run = tiny_model.run(tokens, capture=sites, edits={MLP_0: torch.sin}, grad=True)
        torch.autograd.grad(run.logits.sum(), list(run.activations.values()))
        tiny_model.run(tokens, capture=[RESID_0], need_logits=False)
        tiny_model.run(tokens, skip={RESID_0: x}, last_only=True)
        tiny_model.generate(tokens, max_new_tokens=2, edits={MLP_0: torch.sin})
        with pytest.raises(UserError):
            tiny_model.run(tokens, edits={RESID_0: lambda x: x[:1]}, grad=True)

    def live() -> int:
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    everything()
    gc.collect()
    gc.disable()
    try:
        before = live()
        for _ in range(10):
            everything()
        assert live() <= before
    finally:
        gc.enable()
