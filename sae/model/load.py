"""A language model from the hub, a folder or an object, checked and ready for analysis.

1. `sae.model.huggingface` loads the model and its tokenizer and freezes it.
2. `LanguageModel` finds its sites.
3. `sae.model.checks` tries on a few random tokens that what is read at the sites is what it should be.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sae.model.checks import check_model
from sae.model.device_map import DeviceMap
from sae.model.huggingface import load_hf
from sae.model.language_model import LanguageModel
from sae.model.remote import connect
from sae.model.sites import SitePath


def load_model(
    model: str | Path | nn.Module,
    *,
    tokenizer: Any = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    quantize: str | None = None,
    remote: str | None = None,
    site_paths: Mapping[str, str | SitePath] | None = None,
    check: bool = True,
) -> LanguageModel:
    """Load a language model whose sites can be read, replaced and skipped.

    Args:
        model: a name on the Hugging Face hub, a folder, or a Hugging Face model, which is put in evaluation mode and
            frozen in place.
        tokenizer: a Hugging Face tokenizer; the one beside the model by default.
        device: where the model runs: "auto" for cuda, mps or cpu, whichever is there first; an object stays where it
            is.
        dtype: precision of the weights: float32 by default, an object keeps its own. "auto" is float32, on a GPU the
            files' own from 2 billion parameters on.
        device_map: how accelerate spreads the model over devices, main memory and disk, in place of `device`: "auto",
            "balanced", "balanced_low_0" or "sequential", "disk" to read each module from its files whenever it runs, or
            {"model.embed_tokens": "cuda:0", "model.layers.0": "cpu", ...}. Activations are read and written on the
            device of the embedding.
        quantize: hold the weights of linear layers in 8 or 4 bits with bitsandbytes: "8bit" or "4bit"; the rest, and
            activations, in `dtype`. A model that is stored quantised is loaded as it is.
        remote: where the model runs if not here: "ndif", the address of another server of nnsight, or "local" for
            nnsight's simulation of one with the model in this process. Only tensors travel; see `docs/scale.md`.
        site_paths: where sites are in a model whose architecture is not known, or elsewhere than usual, by kind or by
            site: `{"attn": "model.layers.{layer}.self_attn.o_proj:input"}`.
        check: whether to try the sites on a few random tokens, at the cost of four short forward passes.

    Returns:
        The model, in evaluation mode, with frozen parameters.

    Raises:
        UserError: the model cannot be loaded or run, or a site is not where it should be; the sentence names it.
    """
    options: dict[str, Any] = {"tokenizer": tokenizer, "device": device, "dtype": dtype, "device_map": device_map}
    options["quantize"] = quantize
    server, loaded = (None, load_hf(model, **options)) if remote is None else connect(model, remote, options)
    language_model = LanguageModel(
        loaded.hf, loaded.tokenizer, name=loaded.name, site_paths=site_paths, stored_as=loaded.fingerprints,
        server=server,
    )  # fmt: skip
    if check:
        check_model(language_model)
    return language_model
