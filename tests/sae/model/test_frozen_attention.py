"""Attention that does not follow edits, against softmaxes that are recorded in one run and played back in another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sae.errors import UserError
from sae.model.load import load_model
from sae.model.sites import Site
from sae.model.tokens import Tokens
from tests.near import assert_near
from tests.tiny_models import tiny_model as tiny_family

SITE = Site("resid", 0)


class Softmaxes(TorchFunctionMode):
    """Keeps the softmaxes of a run, or puts those of another run in their place."""

    def __init__(self, given: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.given, self.seen = given, []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (functional.softmax, torch.softmax, torch.Tensor.softmax):
            self.seen.append(out)
            return out if self.given is None else self.given[len(self.seen) - 1]
        return out


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])  # heads of their own; grouped ones, capped, with a window
def test_every_head_looks_where_it_looks_without_the_edit(make_tiny_model, architecture):
    model = make_tiny_model(architecture)
    ids = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    tokens, change = Tokens(ids, mask), 2 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    edits = {SITE: lambda x: x + change}
    free = model.run(tokens, edits=edits).logits
    with model.frozen_attention():
        frozen = model.run(tokens, edits=edits).logits
        with model.edited({SITE: lambda x, columns: x + change}):
            assert_near(model.run(tokens).logits, frozen)
        generated = [model.generate(tokens, max_new_tokens=3, edits=edits, use_cache=cache) for cache in (True, False)]
        assert torch.equal(model.run(tokens).logits, model.run(tokens).logits)
    assert torch.equal(model.run(tokens, edits=edits).logits, free)  # the block has ended

    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": tokens.position_ids}
    used = model.hf.config._attn_implementation
    model.hf.set_attn_implementation("eager")
    block = model.hf.get_submodule(model.site_paths[SITE].module)
    with torch.no_grad(), Softmaxes() as unedited:
        model.hf(**inputs)
    add = block.register_forward_hook(
        lambda module, args, out: out + change if isinstance(out, Tensor) else (out[0] + change, *out[1:])
    )
    with torch.no_grad(), Softmaxes(unedited.seen):
        by_hand = model.hf(**inputs).logits
    add.remove()
    model.hf.set_attn_implementation(used)
    real = mask.bool()
    assert_near(frozen[real], by_hand[real])
    assert (frozen - free)[real].abs().max() > 1e-3
    assert torch.equal(*generated) and torch.equal(generated[0][:, 7], by_hand[:, -1].argmax(-1))


def test_attention_that_cannot_be_held_is_refused():
    model = load_model(tiny_family("bloom"), tokenizer=None, device="cpu", check=False)
    with pytest.raises(UserError, match="cannot be frozen: attn_0 does not call"), model.frozen_attention():
        pass
