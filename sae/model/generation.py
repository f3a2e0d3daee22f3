"""Generation with edits: which tokens an edit sees is told by the step, never guessed from a tensor's width.

1. The checkpoint's own generation settings are put aside: tokens are the most probable ones unless the caller asks for
   sampling. Its end-of-text ids stay.
2. A counter of forward passes says where x [B, n, d] stands: after k passes the text has S + k tokens, and x is its
   last n, with a cache or without.
3. Each site's edit sees the prompt's positions [B, S, d]; another edit, by default the same, the later tokens. Before
   both come the standing edits (`LanguageModel.edited`), which are told which tokens they see.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from sae.errors import UserError
from sae.model.forward import Batched, unequal_lengths
from sae.model.hook_points import Columns, SiteEdit, StandingEdit
from sae.model.sites import Site
from sae.model.tokens import Tokens


class Generator(Batched, Protocol):
    """The attributes of a model that generation uses."""

    @property
    def hf(self) -> Any:
        """The Hugging Face model."""

    @property
    def max_positions(self) -> int | None:
        """Most tokens of one text."""

    def hooked(self, site: Site, edit: SiteEdit, *, rows: int) -> AbstractContextManager[None]:
        """Applies an edit at every call of a site's module."""


MULTIPLY_ROWS = ("num_beams", "num_return_sequences")


def generate(
    model: Generator,
    prompts: Tokens,
    *,
    max_new_tokens: int,
    pad_id: int,
    edits: Mapping[Site, SiteEdit],
    later_edits: Mapping[Site, SiteEdit],
    standing: Mapping[Site, StandingEdit],
    sampling: Mapping[str, Any],
) -> Tensor:
    """[B, S + new] token ids. `edits` see the prompts' positions, `later_edits` the tokens generated after them,
    `standing` both, before these.
    """
    _check_options(model, prompts, max_new_tokens, sampling)
    options = {"max_new_tokens": max_new_tokens, "pad_token_id": pad_id, **sampling}
    cause: Exception | None = None
    for cache in ({}, {"use_cache": False}):  # some families cannot continue from their own cache
        try:
            return _generated(model, prompts, edits, later_edits, standing, {**cache, **options})
        except UserError:
            raise
        except Exception as error:
            cause = error
    reason = " ".join(str(cause).split()[:30])
    raise UserError(f"model {model.name!r} cannot generate ({type(cause).__name__}: {reason})") from cause


def _generated(
    model: Generator,
    prompts: Tokens,
    edits: Mapping[Site, SiteEdit],
    later_edits: Mapping[Site, SiteEdit],
    standing: Mapping[Site, StandingEdit],
    options: Mapping[str, Any],
) -> Tensor:
    step = _Step(prompts)
    with torch.no_grad(), _greedy(model.hf), ExitStack() as hooks:
        hooks.callback(model.hf.register_forward_pre_hook(step.count).remove)
        for site in {**standing, **edits, **later_edits}:
            edit = step.split(edits.get(site), later_edits.get(site), standing.get(site))
            hooks.enter_context(model.hooked(site, edit, rows=len(prompts)))
        ids = model.hf.generate(prompts.input_ids, attention_mask=prompts.attention_mask, **options)
    return ids if isinstance(ids, Tensor) else ids.sequences


def _check_options(model: Generator, prompts: Tokens, max_new_tokens: int, sampling: Mapping[str, Any]) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: at least 1 is needed")
    if not callable(getattr(model.hf, "generate", None)):
        raise UserError(f"model {model.name!r} cannot generate: its class {type(model.hf).__name__} has no generate")
    for name in MULTIPLY_ROWS:
        if (sampling.get(name) or 1) != 1:
            raise UserError(f"{name} is {sampling[name]}: edits know one row a prompt, so only 1 is allowed")
    if (refusal := unequal_lengths(model, prompts, more=max_new_tokens)) is not None:
        raise refusal
    longest = int(prompts.lengths.max())
    if model.max_positions is not None and longest + max_new_tokens > model.max_positions:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit into the {model.max_positions} "
            f"positions of model {model.name!r}: at most {max(0, model.max_positions - longest)} new tokens are allowed"
        )


class _Step:
    """Counts forward passes and gives an edit its part of each tensor."""

    def __init__(self, prompts: Tokens) -> None:
        self.prompts = prompts
        self.passes = 0

    def count(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """The model begins a forward pass."""
        self.passes += 1

    def split(self, edit: SiteEdit | None, later: SiteEdit | None, standing: StandingEdit | None) -> SiteEdit:
        """The edit of any pass: `standing` sees everything, then `edit` the prompt's positions, `later` those after."""
        n_prompt = self.prompts.n_positions

        def apply_to(edit: SiteEdit | None, x: Tensor) -> Tensor:
            return x if edit is None or not x.shape[1] else edit(x)

        def apply(x: Tensor) -> Tensor:
            first = n_prompt + self.passes - 1 - x.shape[1]
            if standing is not None and x.shape[1]:
                x = standing(x, Columns(self.prompts, first, x.shape[1]))
            n = max(0, n_prompt - first)  # columns of the prompt
            if n in (0, x.shape[1]):
                return apply_to(edit if n else later, x)
            return torch.cat([apply_to(edit, x[:, :n]), apply_to(later, x[:, n:])], 1)

        return apply


@contextmanager
def _greedy(hf: Any) -> Iterator[None]:
    """The model's generation settings are the plainest there are, but for the ids that begin and end a text."""
    stored = hf.generation_config
    ids = {name: getattr(stored, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    hf.generation_config = GenerationConfig(do_sample=False, num_beams=1, use_cache=True, **ids)
    try:
        yield
    finally:
        hf.generation_config = stored
