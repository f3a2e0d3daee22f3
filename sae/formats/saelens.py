"""SAELens (Bloom, Chanin et al.), 6 and older: `cfg.json` and `sae_weights.safetensors`.

W_enc is [d, F], W_dec [F, d]; x is centred by b_dec where `apply_b_dec_to_input`. By `architecture`:

- standard   f = relu(z);  b_enc
- topk       f = the k largest of z (of z ‖W_dec‖ where `rescale_acts_by_decoder_norm`), after relu;  b_enc
- jumprelu   f = relu(z) 1[z > threshold];  b_enc, threshold (log_threshold in older training files)
- gated      f = 1[x W_enc + b_gate > 0] relu(e^r_mag x W_enc + b_mag);  b_gate, b_mag, r_mag
- transcoder, skip_transcoder: as standard; jumprelu_transcoder, jumprelu_skip_transcoder: as jumprelu. They read at
             `hook_name` and write at `hook_name_out`; with a skip, W_skip [d_out, d_in], x̂ has x W_skipᵀ as well
- abstopk    f = the k entries of z of largest |z|, with their sign. Read as topk with 2 F features, F for the entries
             above zero and F, with the other sign, for those below (feature F + i is −i): x̂ is the same
- batchtopk, matryoshka_batchtopk: training files, with one `topk_threshold` on activations of unit decoder rows where
  rescaled; the released form of both is jumprelu.

Files before version 6 differ in names and defaults, see `_upgraded`. Inputs that were scaled in training:
`expected_average_only_in` is folded by SAELens when training ends and its field set to none; where it still stands, the
factor is in `activation_scaler.json` or lost, and then the file is refused rather than read wrongly. `layer_norm` and
`constant_norm_rescale` work token by token and are kept (`sae.formats.token_normalised`), in writing too.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import TypedDict

from sae._files import TensorSpec, check_tensors, read_tensors, write_json, write_tensors
from sae._run.outputs import is_json
from sae.autoencoder import (
    CONTEXT_LENGTH,
    EXCLUDE_SPECIAL,
    PREPEND_BOS,
    SITE_PATH,
    SKIP,
    ReadKind,
    SparseAutoencoder,
)  # fmt: skip
from sae.errors import UserError, unknown
from sae.folding import fold_norms, fold_scale, plain_tensors
from sae.formats.common import build, entry, pick, positive, read_entries, transcoder_hook, unsupported, whole_number
from sae.formats.refusals import refusal
from sae.formats.site_names import hook_site, read_place, transformer_lens_hook
from sae.formats.token_normalised import NormalisedAutoencoder
from sae.model.sites import SitePath

log = logging.getLogger(__name__)

NAME = "saelens"
WEIGHTS, CONFIG, SCALER = "sae_weights.safetensors", "cfg.json", "activation_scaler.json"
WRITTEN_VERSION = "6.0.0"
"""The oldest version whose files look as `write` makes them."""

_CORE = {"W_enc": "W_enc", "W_dec": "W_dec", "b_dec": "b_dec", "b_enc": "b_enc"}
_TENSORS = {
    "standard": _CORE,
    "topk": _CORE,
    "jumprelu": _CORE | {"threshold": "threshold"},
    "gated": _CORE | {"b_enc": "b_mag", "gate_bias": "b_gate", "magnitude": "r_mag"},
    "batchtopk": _CORE | {"threshold": "topk_threshold"},
    "matryoshka_batchtopk": _CORE | {"threshold": "topk_threshold"},
    "abstopk": _CORE,
    "transcoder": _CORE,
    "skip_transcoder": _CORE | {SKIP: "W_skip"},
    "jumprelu_transcoder": _CORE | {"threshold": "threshold"},
    "jumprelu_skip_transcoder": _CORE | {"threshold": "threshold", SKIP: "W_skip"},
}
_ARCHITECTURE = {
    "standard": "relu", "matryoshka_batchtopk": "matryoshka", "abstopk": "topk", "transcoder": "relu",
    "skip_transcoder": "relu", "jumprelu_transcoder": "jumprelu", "jumprelu_skip_transcoder": "jumprelu",
}  # fmt: skip
"""Ours by theirs, where the names differ."""
_HEADS = {
    "gpt2": "transformer.h.{layer}.attn.c_proj:input",
    "pythia": "gpt_neox.layers.{layer}.attention.dense:input",
}
_LLAMA_HEADS = "model.layers.{layer}.self_attn.o_proj:input"
_TOKEN_NORMS = {"layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}

_CONTEXT = {CONTEXT_LENGTH: "context_size", PREPEND_BOS: "prepend_bos", EXCLUDE_SPECIAL: "exclude_special_tokens"}
"""Entries of our `SAEConfig.extra` by their metadata: how the text was read in training."""
_WRITTEN = {"model_name", "hook_name", "hook_name_out", "sae_lens_version", *_CONTEXT.values()}
"""What the metadata that `write` writes say at most."""


class _Metadata(TypedDict, total=False):
    """The entries of the file on training."""

    model_name: str | None
    hook_name: str | None
    hook_name_out: str | None
    hook_head_index: int | None
    sae_lens_version: str | None
    context_size: int | None
    prepend_bos: bool | None
    exclude_special_tokens: bool | list[int] | None
    model_from_pretrained_kwargs: dict[str, Any] | None


class _Config(_Metadata, total=False):
    """The entries of `cfg.json` that are read; those of `_Metadata` stood here before version 6."""

    metadata: _Metadata | None
    architecture: str | None
    d_in: int | None
    d_sae: int | None
    d_out: int | None
    apply_b_dec_to_input: bool | None
    normalize_activations: str | bool | None
    activation_fn: str | None
    activation_fn_str: str | None
    activation_fn_kwargs: dict[str, Any] | None
    hook_point: str | None
    hook_point_head_index: int | None
    k: float | None
    rescale_acts_by_decoder_norm: bool | None
    finetuning_scaling_factor: bool | None


def read(folder: Path) -> SparseAutoencoder:
    """The autoencoder in a folder with `cfg.json` and `sae_weights.safetensors`."""
    path = folder / CONFIG
    config = _upgraded(read_entries(path, _Config))
    architecture = config["architecture"]
    _refuse(config, folder)
    tensors = _tensors(read_tensors(folder / WEIGHTS), config, folder)
    n_features, width = len(tensors["b_enc"]), len(tensors["b_dec"])
    n_theirs = n_features // 2 if architecture == "abstopk" else n_features
    for name, size in (("d_in", tensors["W_enc"].shape[-1]), ("d_sae", n_theirs), ("d_out", width)):
        if config.get(name, size) != size:
            raise UserError(f"{path} says {name} = {config[name]}, the tensors of {WEIGHTS} say {size}")
    if config["normalize_activations"] == "expected_average_only_in":
        scaler = read_entries(folder / SCALER, dict[str, float | None])
        tensors = fold_scale(tensors, 1.0 / positive(scaler, "scaling_factor", source=folder / SCALER))
    names = config["metadata"]
    if (names.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"):
        log.warning(
            "%s was trained on activations whose mean over dimensions TransformerLens had removed "
            "(center_writing_weights); this model's activations have one, so reconstructions will be worse",
            folder,
        )
    hook = names.get("hook_name") or ""
    notes: dict[str, Any] = {"hook": hook, "version": names.get("sae_lens_version")}
    notes |= {ours: names[theirs] for ours, theirs in _CONTEXT.items() if names.get(theirs) is not None}
    site = hook_site(hook, names.get("model_name") or "")
    place: ReadKind | Literal[""] = ""
    if architecture.endswith("transcoder"):
        site, place = _transcoder_places(hook, names, path)
    if heads := re.fullmatch(r"blocks\.(\d+)\.attn\.hook_z", hook):
        site = f"attn_{heads[1]}"
        notes[SITE_PATH] = str(SitePath.parse(_heads_path(names.get("model_name") or "")).at(int(heads[1])))
    is_topk = architecture in ("topk", "abstopk")
    sae = build(
        tensors,
        source=folder,
        file_format=NAME,
        architecture=_ARCHITECTURE.get(architecture, architecture),
        subtract_b_dec=config["apply_b_dec_to_input"],
        k=whole_number(entry(config, "k", source=path), "k", source=path) if is_topk else None,
        ranked=is_topk and not config.get("rescale_acts_by_decoder_norm", False),
        site=site,
        read=place,
        model=names.get("model_name") or "",
        notes=notes,
    )
    norm = _TOKEN_NORMS.get(str(config["normalize_activations"]))
    return NormalisedAutoencoder(sae, norm=norm) if norm else sae


def _transcoder_places(hook: str, names: Mapping[str, Any], path: Path) -> tuple[str, ReadKind]:
    """The site that a transcoder writes, and the place that it reads."""
    out = names.get("hook_name_out") or ""
    site, place = hook_site(out, names.get("model_name") or ""), read_place(hook)
    if not site.startswith("mlp"):
        raise UserError(f"{path} has hook_name_out {out!r}: transcoders write at the output of an MLP here")
    if not place:
        raise UserError(f"{path} has hook_name {hook!r}: transcoders read before the MLP here")
    return site, place  # type: ignore[return-value]


def _heads_path(model: str) -> str:
    """Path of TransformerLens' hook_z, the heads before the output projection; most models call it as Llama does."""
    name = model.rpartition("/")[2].lower()
    return next((path for family, path in _HEADS.items() if name.startswith(family)), _LLAMA_HEADS)


def _upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with version 6's names and defaults."""
    renamed = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"}
    renamed |= {"activation_fn_str": "activation_fn"}
    new = {renamed.get(key, key): value for key, value in config.items()}
    new.setdefault("metadata", {key: new.get(key) for key in _Metadata.__annotations__})
    new["metadata"].setdefault("sae_lens_version", new.get("sae_lens_version"))
    new.setdefault("architecture", "standard")
    is_transcoder = str(new["architecture"]).endswith("transcoder")
    new.setdefault("apply_b_dec_to_input", not is_transcoder)
    if new.get("activation_fn", "relu") == "topk":
        new["architecture"] = "topk"
        new["k"] = new.get("activation_fn_kwargs", {}).get("k", new.get("k"))
    norm = new.get("normalize_activations") or "none"
    new["normalize_activations"] = "expected_average_only_in" if norm is True else norm
    return new


def _refuse(config: Mapping[str, Any], folder: Path) -> None:
    """An error for what is in this format and is no autoencoder we can compute, or not rightly."""
    path, architecture = folder / CONFIG, config["architecture"]
    if architecture not in _TENSORS:
        raise refusal(folder, architecture) or unknown(f"architecture in {path}", architecture, _TENSORS)
    if (activation := config.get("activation_fn", "relu")) not in ("relu", "topk"):
        raise refusal(folder, activation) or UserError(
            f"{path} has activation_fn {activation!r}: allowed are relu and topk"
        )
    if architecture.endswith("transcoder") and config["apply_b_dec_to_input"]:
        raise UserError(f"{path} has apply_b_dec_to_input: no transcoder subtracts the bias of what it writes")
    if config["metadata"].get("hook_head_index") is not None:
        raise UserError(f"{path} is for a single attention head, which is no site: allowed are whole sublayers")
    norm = config["normalize_activations"]
    if norm not in ("none", "expected_average_only_in", *_TOKEN_NORMS):
        raise unknown(
            f"normalize_activations in {path}", str(norm), ["none", "expected_average_only_in", *_TOKEN_NORMS]
        )
    if norm == "expected_average_only_in" and not (folder / SCALER).is_file():
        raise UserError(
            f"{path} says that inputs are scaled to a fixed average norm, and the factor is in no file (looked for "
            f"{SCALER}): fold it with SAELens (fold_activation_norm_scaling_factor) and save again"
        )


def _tensors(state: dict[str, Tensor], config: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    """Our tensors, before the decoder is normalised."""
    architecture, path = config["architecture"], folder / WEIGHTS
    if "log_threshold" in state:
        state["threshold"] = state.pop("log_threshold").float().exp()
    per_feature = state.pop("scaling_factor", None)
    if per_feature is not None:
        check_tensors({"scaling_factor": per_feature}, {"scaling_factor": TensorSpec((len(state["W_dec"]),))}, path)
    tensors = pick(state, _TENSORS[architecture], source=path, what=f"a {architecture} autoencoder")
    tensors["W_enc"] = tensors["W_enc"].T
    if architecture == "abstopk":
        tensors |= {name: torch.cat([tensors[name], -tensors[name]]) for name in ("W_enc", "b_enc", "W_dec")}
    if "magnitude" in tensors:
        tensors["magnitude"] = tensors["magnitude"].exp()
    if per_feature is not None and not torch.allclose(per_feature, torch.ones_like(per_feature)):
        if not config.get("finetuning_scaling_factor"):
            raise UserError(f"{path} has a scaling_factor, and {CONFIG} says that none is used: one of them is wrong")
        tensors["W_dec"] = tensors["W_dec"] * per_feature[:, None]
    if "topk_threshold" in state:
        if config.get("rescale_acts_by_decoder_norm", False):
            threshold = tensors.pop("threshold")
            tensors = fold_norms(tensors) | {"threshold": threshold}
        tensors["threshold"] = tensors["threshold"].expand(len(tensors["b_enc"]))
    return tensors


def is_own(path: Path) -> bool:
    """Whether a file is of an autoencoder that `write` wrote: SAELens itself says more about the model."""

    def fits(config: dict[str, Any]) -> bool:
        about = config.get("metadata")
        return isinstance(about, dict) and about.get("sae_lens_version") == WRITTEN_VERSION and {*about} <= _WRITTEN

    return is_json(fits)(path.with_name(CONFIG))


def write(sae: SparseAutoencoder, folder: Path) -> None:
    """`cfg.json` and `sae_weights.safetensors` as SAELens 6 reads them; x̂ and f stay the same."""
    names = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
    hooks = {"hook_name": transformer_lens_hook(sae.config.site)}
    if sae.config.read:
        middle = "skip_transcoder" if sae.has_skip else "transcoder"
        names = {"relu": middle, "jumprelu": f"jumprelu_{middle}"}
        hooks = {"hook_name": transcoder_hook(sae, NAME), "hook_name_out": hooks["hook_name"]}
    if sae.nonlinearity.name not in names:
        raise unsupported(sae, NAME)
    norm = next((theirs for theirs, ours in _TOKEN_NORMS.items() if ours == sae.config.input_norm), "none")
    sae = sae.inner if isinstance(sae, NormalisedAutoencoder) else sae
    architecture, extra = names[sae.nonlinearity.name], sae.config.extra
    tensors = plain_tensors(sae, subtract_b_dec=sae.config.subtract_b_dec)
    if architecture == "gated":
        tensors["magnitude"] = tensors["magnitude"].log()
    tensors["W_enc"] = tensors["W_enc"].T
    state = {theirs: tensors[ours].contiguous() for ours, theirs in _TENSORS[architecture].items()}
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.config.read_width,
        "d_sae": sae.config.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.config.subtract_b_dec,
        "normalize_activations": norm,
        "reshape_activations": "none",
        "metadata": {
            "model_name": sae.config.model,
            **hooks,
            "sae_lens_version": WRITTEN_VERSION,
            **{theirs: extra[ours] for ours, theirs in _CONTEXT.items() if extra.get(ours) is not None},
        },
    }
    if sae.config.read:
        config["d_out"] = sae.config.d_model
    if architecture == "topk":
        config |= {"k": sae.config.k, "rescale_acts_by_decoder_norm": False}
    write_tensors(folder / WEIGHTS, state)
    write_json(folder / CONFIG, config)
