"""dictionary_learning (Marks, Karvonen et al.): a state dict `ae.pt`, and `config.json` whose `dict_class` says which.

| dict_class | features, with z = W (x − b_dec) + b |
|---|---|
| AutoEncoder | f = relu(z); b_dec is called `bias` |
| AutoEncoderNew | f = relu(W x + b), nothing subtracted |
| GatedAutoEncoder | f = 1[π + gate_bias > 0] relu(e^r_mag π + mag_bias), π = W (x − decoder_bias) |
| AutoEncoderTopK | f = the k largest of relu(z) |
| BatchTopKSAE | f = relu(z) 1[z > threshold], not the k largest; same tensors as TopK |
| MatryoshkaBatchTopKSAE | the same with matrices W_enc [d, F], W_dec [F, d] |
| JumpReluAutoEncoder | f = relu(z) 1[z > threshold], z = x W_enc + b_enc, nothing subtracted |

The encoder's weight is [F, d], the decoder's [d, F]. Files of 2023 have no `config.json`: the class is then read from
the names of the tensors, which tell all classes apart but TopK and BatchTopK. Activations of a trained dictionary are
raw: the normalisation of training is folded into the biases before the file is written.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from typing_extensions import TypedDict

from sae._files import atomic_write, write_json
from sae._run.outputs import is_json
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError, unknown
from sae.folding import plain_tensors
from sae.formats.common import LINEAR, build, pick, read_entries, read_pickle, unsupported, whole_number
from sae.formats.refusals import refusal
from sae.formats.site_names import dictionary_learning_name, site_named
from sae.formats.token_normalised import norm_refusal

log = logging.getLogger(__name__)

NAME = "dictionary_learning"
WEIGHTS, CONFIG = "ae.pt", "config.json"
_WRITTEN = {"dict_class", "activation_dim", "dict_size", "k", "layer", "lm_name", "submodule_name"}
"""What the config that `write` writes says of the trainer."""

_GATED = LINEAR | {"b_enc": "mag_bias", "b_dec": "decoder_bias", "gate_bias": "gate_bias", "magnitude": "r_mag"}
_PARAMETERS = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}


class _DictClass(NamedTuple):
    """One of their classes."""

    architecture: str
    """Our architecture that encodes as it does."""
    tensors: dict[str, str]
    """Its tensors, by our names for them."""
    ignored: tuple[str, ...] = ()
    """Tensors that change neither x̂ nor f."""
    subtract_b_dec: bool = True
    """Whether the decoder bias is subtracted from the input."""


_CLASSES = {
    "AutoEncoder": _DictClass("relu", LINEAR | {"b_dec": "bias"}),
    "AutoEncoderNew": _DictClass("relu", LINEAR | {"b_dec": "decoder.bias"}, subtract_b_dec=False),
    "GatedAutoEncoder": _DictClass("gated", _GATED),
    # the threshold of TopK serves an optional mode of encode, off by default
    "AutoEncoderTopK": _DictClass("topk", LINEAR | {"b_dec": "b_dec"}, ("k", "threshold")),
    "BatchTopKSAE": _DictClass("batchtopk", LINEAR | {"b_dec": "b_dec", "threshold": "threshold"}, ("k",)),
    "MatryoshkaBatchTopKSAE": _DictClass("matryoshka", _PARAMETERS, ("k", "group_sizes")),
    "JumpReluAutoEncoder": _DictClass("jumprelu", _PARAMETERS, subtract_b_dec=False),
}


class _Trainer(TypedDict, total=False):
    """The entries of a trainer that are read."""

    dict_class: str | None
    k: int | float | list[int] | None
    submodule_name: str | None
    lm_name: str | None


class _Config(TypedDict, total=False):
    """The entry of `config.json` that is read."""

    trainer: _Trainer | None


def read(folder: Path) -> SparseAutoencoder:
    """The autoencoder in a folder with `ae.pt`, or in a snapshot, whose config is in the folder around."""
    path = folder / WEIGHTS if folder.is_dir() else folder
    folder = path.parent if path.name == WEIGHTS else path.parent.parent
    state = read_pickle(path)
    trainer: Mapping[str, Any] = {}
    if (folder / CONFIG).is_file():
        trainer = read_entries(folder / CONFIG, _Config).get("trainer", {})
    kind = trainer.get("dict_class") or _class_of(state, path)
    if kind not in _CLASSES:
        raise refusal(folder, kind) or unknown(f"dict_class in {folder / CONFIG}", kind, _CLASSES)
    dict_class = _CLASSES[kind]
    tensors = pick(state, dict_class.tensors, source=path, what=f"an {kind}", ignored=dict_class.ignored)
    if "encoder.weight" in state:
        tensors["W_dec"] = tensors["W_dec"].T
    else:
        tensors["W_enc"] = tensors["W_enc"].T
    if kind == "GatedAutoEncoder":
        tensors["magnitude"] = tensors["magnitude"].exp()
    if "threshold" in tensors and tensors["threshold"].numel() == 1:
        if float(tensors["threshold"]) < 0:
            log.warning("%s: its threshold was never set in training, so every positive feature is active", path)
        tensors["threshold"] = tensors["threshold"].expand(len(tensors["b_enc"]))
    k = trainer.get("k")
    return build(
        tensors,
        source=folder if path.name == WEIGHTS else path,
        file_format=NAME,
        architecture=dict_class.architecture,
        subtract_b_dec=dict_class.subtract_b_dec,
        k=_k(state, trainer, path) if kind == "AutoEncoderTopK" else k if isinstance(k, int) else None,
        ranked=kind == "AutoEncoderTopK",
        site=site_named(str(trainer.get("submodule_name") or "")) or site_named(folder.as_posix()),
        model=trainer.get("lm_name") or "",
        notes={"dict_class": kind},
    )


def _class_of(state: Mapping[str, Any], path: Path) -> str:
    """The class of a file without a config, from the names of its tensors."""
    if "decoder_bias" in state:
        return "GatedAutoEncoder"
    if "group_sizes" in state:
        return "MatryoshkaBatchTopKSAE"
    if "W_enc" in state:
        return "JumpReluAutoEncoder"
    if "b_dec" in state:
        raise UserError(
            f"{path} is an AutoEncoderTopK or a BatchTopKSAE, which encode differently and have the same tensors: put "
            f"the {CONFIG} with its dict_class beside it"
        )
    return "AutoEncoderNew" if "decoder.bias" in state else "AutoEncoder"


def _k(state: Mapping[str, Any], trainer: Mapping[str, Any], path: Path) -> int:
    sources = {path: state.get("k"), path.parent / CONFIG: trainer.get("k")}
    given = [whole_number(k, "k", source=source) for source, k in sources.items() if k is not None]
    if not given:
        raise UserError(f"{path}: looked for k in the file and in {CONFIG}, found it in neither")
    if given[0] != given[-1]:
        raise UserError(f"{path} has k = {given[0]}, its {CONFIG} has {given[1]}: one is of another run")
    return given[0]


def is_own(path: Path) -> bool:
    """Whether a file is of an autoencoder that `write` wrote: the trainers of the library say how they trained."""

    def fits(config: dict[str, Any]) -> bool:
        trainer = config.get("trainer")
        return config.get("buffer") == {} and isinstance(trainer, dict) and {*trainer} == _WRITTEN

    return is_json(fits)(path.with_name(CONFIG))


def write(sae: SparseAutoencoder, folder: Path) -> None:
    """`ae.pt` and `config.json` as dictionary_learning's `load_dictionary` reads them; x̂ and f stay the same."""
    kinds = ("AutoEncoder", "AutoEncoderTopK", "JumpReluAutoEncoder", "GatedAutoEncoder")
    if sae.config.input_norm:
        raise norm_refusal(sae, NAME)
    dict_class = next((kind for kind in kinds if _CLASSES[kind].architecture == sae.nonlinearity.name), None)
    if dict_class is None or sae.config.read:
        raise unsupported(sae, NAME)
    tensors = plain_tensors(sae, subtract_b_dec=_CLASSES[dict_class].subtract_b_dec)
    if dict_class == "GatedAutoEncoder":
        tensors["magnitude"] = tensors["magnitude"].log()
    if dict_class == "JumpReluAutoEncoder":
        tensors["W_enc"] = tensors["W_enc"].T
    else:
        tensors["W_dec"] = tensors["W_dec"].T
    state = {theirs: tensors[ours].contiguous() for ours, theirs in _CLASSES[dict_class].tensors.items()}
    if dict_class == "AutoEncoderTopK":
        assert sae.config.k is not None
        state |= {"k": torch.tensor(sae.config.k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
    with atomic_write(folder / WEIGHTS) as temporary, temporary.open("wb") as file:
        torch.save(state, file)
    write_json(folder / CONFIG, {"trainer": _trainer_config(sae, dict_class), "buffer": {}})


def _trainer_config(sae: SparseAutoencoder, dict_class: str) -> dict[str, Any]:
    config = sae.config
    layer = config.site.rpartition("_")[2]
    return {
        "dict_class": dict_class,
        "activation_dim": config.d_model,
        "dict_size": config.n_features,
        "k": config.k,
        "layer": int(layer) if layer.isdigit() else None,
        "lm_name": config.model,
        "submodule_name": dictionary_learning_name(config.site),
    }
