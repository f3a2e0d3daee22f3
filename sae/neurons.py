"""Neurons as a dictionary: every method that works on features then works on the model's own coordinates.

1. `neuron_dictionaries`: the identity autoencoder of a site has f = x, one feature a coordinate, and no error. It is
   the baseline that learnt dictionaries are compared with (Marks et al. 2024, section 4: feature circuits against
   neuron circuits).
2. `mlp_neuron_dictionaries`: the hidden neurons of the MLPs, which the down projection takes, as a transcoder without
   error: n = what it takes, x = n W_down + b, f_i = n_i |W_down[i]|. In a gated MLP n is the product of gate and up
   branch. With relevance patching they are said to be as sparse a basis as learnt features (arXiv 2601.22594). Where a
   norm stands behind the MLP, n is divided by that norm's scale at each token, so that x stays linear in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from sae.autoencoder import SAEConfig, SparseAutoencoder
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.read_places import down_projection
from sae.model.sites import Site
from sae.saes import SAEs

NEURONS, MLP_NEURONS = "neurons", "mlp-neurons"
"""Words that `--saes` takes in place of a folder."""


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


def mlp_neuron_dictionaries(model: LanguageModel, *, sites: Iterable[Site] | None = None) -> SAEs:
    """The hidden neurons of the MLP at every mlp site (of `sites`); MLPs of equal width share one matrix.

    Raises:
        UserError: there is no such site, or an MLP is not a map of hidden neurons, as a mixture of experts is none.
    """
    chosen = [site for site in (model.sites if sites is None else sorted(sites)) if site.kind == "mlp"]
    if not chosen:
        raise UserError(f"there are no MLPs among the sites {', '.join(map(str, sites or model.sites))}")
    eye: dict[int, torch.Tensor] = {}
    saes = {}
    for site in chosen:
        reads = model.reads.layers.get(site.layer)
        down = None if reads is None else down_projection(reads, model.hf)
        if down is None:
            raise UserError(
                f"the MLP of {site} is no down projection of hidden neurons, as far as can be told from its modules (a "
                "mixture of experts is none): leave its layer out with --sites, or take --saes neurons"
            )
        n, d = down.W.shape
        norms = down.W.norm(dim=1)
        norms = torch.where(norms > 0, norms, torch.ones_like(norms))
        if n not in eye:
            eye[n] = torch.eye(n, device=model.device)
        tensors = {"W_enc": eye[n], "b_enc": torch.zeros_like(norms), "W_dec": down.W / norms[:, None], "b_dec": down.b}
        config = SAEConfig(
            architecture="identity",
            d_model=d,
            n_features=n,
            site=site.name,
            model=model.name,
            model_fingerprint=model.fingerprint,
            subtract_b_dec=False,
            read="mlp_hidden",
            d_read=None if n == d else n,
        )
        saes[site] = SparseAutoencoder(config, tensors | {"magnitude": norms})
    return SAEs(saes)


DICTIONARIES: dict[str, Callable[..., SAEs]] = {NEURONS: neuron_dictionaries, MLP_NEURONS: mlp_neuron_dictionaries}
"""The dictionaries that are made of the model itself, by the word for them."""
