"""OpenAI's sparse_autoencoder (Gao et al. 2024): one `.pt` a layer, `resid_delta_mlp_v5_32k/autoencoders/3.pt`.

Tensors: pre_bias [d], encoder.weight [F, d], latent_bias [F], decoder.weight [d, F], statistics, and `activation`, the
name of the nonlinearity. f = activation(W (x − pre_bias) + latent_bias), x̂ = D f + pre_bias. TopK files read each token
normalised to mean 0 and standard deviation 1, and undo it afterwards (`sae.formats.token_normalised`); ReLU files do
not. `resid_delta_mlp` and `resid_delta_attn` are what the sublayers write; `resid_post_mlp` is a block's output. The
residual stream between attention and MLP (`resid_post_attn`) and MLP neurons (`mlp_post_act`) are no sites of ours.
"""

from __future__ import annotations

from pathlib import Path

from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError, unknown
from sae.formats.common import LINEAR, build, entry, pick, read_pickle, whole_number
from sae.formats.refusals import refusal
from sae.formats.site_names import site_named
from sae.formats.token_normalised import NormalisedAutoencoder

NAME = "openai"
_TENSORS = LINEAR | {"b_enc": "latent_bias", "b_dec": "pre_bias"}
_IGNORED = (
    "stats_last_nonzero",
    "latents_activation_frequency",
    "latents_mean_square",
    "activation",
    "activation_state_dict",
    "activation_state_dict.k",
    "activation_state_dict.postact_fn",
)
_ARCHITECTURE = {"ReLU": "relu", "TopK": "topk", "Identity": "identity"}


def _elsewhere(path: Path) -> dict[str, str]:
    """TransformerLens' name of a hook point that is no site of ours."""
    for name, hook in (("resid_post_attn", "hook_resid_mid"), ("mlp_post_act", "mlp.hook_post")):
        if name in path.as_posix():
            return {"hook": f"blocks.{path.stem}.{hook}"}
    return {}


def read(path: Path) -> SparseAutoencoder:
    """The autoencoder in a `.pt` file."""
    state = read_pickle(path)
    if "latent_bias" not in state:
        names = ", ".join(map(str, state))
        raise UserError(f"{path}: looked for OpenAI's {', '.join(_TENSORS.values())}; found {names or 'nothing'}")
    activation = state.get("activation", "ReLU")
    if not isinstance(activation, str) or activation not in _ARCHITECTURE:
        raise refusal(path, str(activation)) or unknown(f"activation in {path}", str(activation), _ARCHITECTURE)
    options = state.get("activation_state_dict") or {}
    if not isinstance(options, dict):
        raise UserError(f"{path}: activation_state_dict is a {type(options).__name__}, expected a dictionary")
    if options.get("postact_fn", "ReLU") != "ReLU":
        raise UserError(f"{path} has postact_fn {options['postact_fn']!r}: allowed is ReLU")
    tensors = pick(state, _TENSORS, source=path, what="an OpenAI autoencoder", ignored=_IGNORED)
    tensors["W_dec"] = tensors["W_dec"].T
    sae = build(
        tensors,
        source=path,
        file_format=NAME,
        architecture=_ARCHITECTURE[activation],
        subtract_b_dec=True,
        k=whole_number(entry(options, "k", source=path), "k", source=path) if activation == "TopK" else None,
        ranked=activation == "TopK",
        site=site_named(path.as_posix()),
        model="gpt2",
        notes=_elsewhere(path),
    )
    return NormalisedAutoencoder(sae, norm="layer_norm") if activation == "TopK" else sae
