"""An edited model as a plain Hugging Face model, where that is exact.

Adding the same vector v = value * sum_i W_dec[i] to the output of a sublayer at every token is a change of the bias of
the linear map that writes that output. What comes of it is measured: the logits of the changed model must be those of
the edited one, or nothing is written. All other operations depend on the activation they find, and cannot be a change
of weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from circuits.editing.applied import edited
from circuits.editing.declaration import Edit, save_edits
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError
from sae.model.device_map import is_spread
from sae.model.forward import relative_difference
from sae.model.language_model import LanguageModel
from sae.model.load import load_model
from sae.model.sites import Site

TOLERANCE = 1e-5
"""Share of the largest logit by which the saved model may differ from the edited one, in float32."""
EDITS_FILE = "edits.json"


def save_model(
    model: LanguageModel, saes: Mapping[Site, SparseAutoencoder], edits: Edit | Sequence[Edit], folder: str | Path
) -> Path:
    """Write the edited model as a folder that transformers loads, with the edits beside it.

    Args:
        model: The model.
        saes: SAEs of the edited features' sites.
        edits: Edits that add a multiple of decoder rows at every token of attention or MLP outputs.
        folder: A folder that is not there yet, or an empty one.

    Returns:
        The folder.

    Raises:
        UserError: For an edit that is no change of a bias, with the reason, and for a folder with something in it.
    """
    listed, folder = [edits] if isinstance(edits, Edit) else list(edits), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{str(folder)!r} is there and not empty: give another folder for the model")
    vectors = _vectors(listed, saes)
    if is_spread(model.hf):
        raise UserError("a model that a device map has spread cannot be saved: load it on one device, such as cpu")
    hf = copy.deepcopy(model.hf)
    with torch.no_grad():
        for site, vector in vectors.items():
            _add_to_bias(hf, model, site, vector)
    changed = load_model(copy.deepcopy(hf), tokenizer=model.tokenizer, device=str(model.device))
    tokens = model.probe_tokens()
    with edited(model, saes, listed):
        wanted = model.run(tokens).logits
    if (difference := relative_difference(changed.run(tokens).logits, wanted)) > TOLERANCE:
        raise UserError(
            f"the model with other biases is {difference:.1e} of its logits from the edited one: it is not saved"
        )
    hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    save_edits(listed, folder / EDITS_FILE)
    return folder


def _vectors(edits: Sequence[Edit], saes: Mapping[Site, SparseAutoencoder]) -> dict[Site, Tensor]:
    """The vector added at each site, [d]; `UserError` for an edit that adds no constant."""
    vectors: dict[Site, Tensor] = {}
    for edit in edits:
        if edit.operation != "steer":
            raise UserError(
                f"the operation {edit.operation!r} depends on how active the feature is at a token, so that no change "
                "of weights does the same: only steer can be saved as a model"
            )
        if not edit.is_everywhere or edit.where != "all" or edit.schedule:
            raise UserError("the edit is of some tokens alone, and weights are the same at all: steer everywhere")
        if edit.freeze is not None:
            raise UserError("attention cannot be frozen in weights: leave out freeze to save a model")
        if edit.relative:
            raise UserError("the value is relative to the largest activation: give it as it is to save a model")
        for features in edit.by_span(saes).values():
            for site, index in features.items():
                added = edit.strength * (edit.value or 0.0) * saes[site].W_dec[index.to(saes[site].device)].sum(0)
                vectors[site] = vectors[site] + added if site in vectors else added
    return vectors


def _add_to_bias(hf: nn.Module, model: LanguageModel, site: Site, vector: Tensor) -> None:
    """Add a vector to the bias of the linear map that writes a sublayer's output; `UserError` where there is none."""
    if site.kind not in ("attn", "mlp"):
        raise UserError(f"{site} is the sum of several sublayers, none of which writes it alone: steer at attn or mlp")
    path = model.site_paths[site]
    module = hf.get_submodule(path.module)
    inner = [part for part in module.modules() if isinstance(getattr(part, "weight", None), Tensor)]
    writers = [part for part in inner if _writes(part) == len(vector)]
    if path.side != "output" or not writers:
        raise UserError(f"what writes {site} is no linear map of this model: it cannot be saved with another bias")
    bias = getattr(writers[-1], "bias", None)
    if bias is None:
        raise UserError(f"the linear map that writes {site} has no bias in this architecture: it cannot be saved so")
    bias += vector.to(bias)


def _writes(module: nn.Module) -> int | None:
    """How wide the output of a linear map is; None for any other module."""
    if isinstance(module, nn.Linear):
        return module.out_features
    return int(getattr(module, "nf", 0)) if type(module).__name__ == "Conv1D" else None
