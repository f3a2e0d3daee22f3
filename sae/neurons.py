"""Neurons as a dictionary: every method that works on features then works on the model's own coordinates.

The identity autoencoder of a site has f = x, one feature a coordinate, and no error. It is the baseline that learnt
dictionaries are compared with (Marks et al. 2024, section 4: feature circuits against neuron circuits).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sae.autoencoder import SAEConfig, SparseAutoencoder
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.saes import SAEs

NEURONS = "neurons"
"""Word that `--saes` takes in place of a folder."""


def neuron_dictionaries(model: LanguageModel, *, sites: Iterable[Site] | None = None) -> SAEs:
    """The identity autoencoder at every site; sites of equal width share one matrix."""
    eye = {width: torch.eye(width, device=model.device) for width in set(model.widths.values())}
    saes = {}
    for site in model.sites if sites is None else sorted(sites):
        matrix = eye[model.widths[site]]
        zero = matrix.new_zeros(len(matrix))
        config = SAEConfig(
            architecture="identity",
            d_model=len(matrix),
            n_features=len(matrix),
            site=site.name,
            model=model.name,
            model_fingerprint=model.fingerprint,
        )
        saes[site] = SparseAutoencoder(config, {"W_enc": matrix, "b_enc": zero, "W_dec": matrix, "b_dec": zero})
    return SAEs(saes)
