"""Sites: where in a model an SAE reads and writes.

1. A `Site` is a name, `embed`, `attn_3`, `mlp_3` or `resid_3`. `attn_l` and `mlp_l` are what the sublayer adds to the
   residual stream (after post-norms where the architecture has them), `resid_l` is the output of block l.
2. A `ModelFamily` says under which module paths a family of models keeps them.
3. `site_table` turns both, and a user's own paths, into one path per site, in the order of the forward pass.
4. `select_sites` reads what a user asks for: "all", "resid,mlp", "resid_3,mlp_2".
5. A transcoder writes at `mlp_l` and reads elsewhere in the block: at one of `READ_KINDS`, such as `mlp_in_3`.

Only module paths are handled here; tensors are read and written in `sae.model.language_model`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import total_ordering

from torch import nn

from sae.errors import UserError, did_you_mean, nearest, unknown

KIND_ORDER = {"embed": 0, "attn": 1, "mlp": 2, "resid": 3}
READ_KINDS = {
    "mlp_resid": "the residual stream that the norm before the MLP takes",
    "mlp_norm": "that stream normalised, before the norm's gain and bias",
    "mlp_in": "what the MLP takes, after the norm's gain",
    "mlp_hidden": "the MLP's hidden neurons, which its last matrix takes",
}
"""Places of a block, in forward order, at which a transcoder of its MLP may read; nothing is written there."""
_ORDER = KIND_ORDER | {kind: 1 + (i + 1) / (len(READ_KINDS) + 1) for i, kind in enumerate(READ_KINDS)}


@total_ordering
@dataclass(frozen=True)
class Site:
    """A site of the model; sites sort in the order of the forward pass."""

    kind: str
    """One of embed, attn, mlp, resid; one of `READ_KINDS` for a place that is read only."""
    layer: int | None = None
    """The block's index from 0; None for embed alone."""

    def __post_init__(self) -> None:
        if self.kind not in _ORDER:
            raise unknown("kind of site", self.kind, KIND_ORDER)
        if (self.kind == "embed") != (self.layer is None):
            raise UserError(f"site {self.kind!r} with layer {self.layer}: embed has no layer, all other kinds have one")

    @property
    def name(self) -> str:
        """The name used in files and on the command line, `resid_3`."""
        return self.kind if self.layer is None else f"{self.kind}_{self.layer}"

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Read a name, `resid_3` or `resid.3`."""
        if isinstance(text, Site):
            return text
        kind, _, layer = text.strip().replace(".", "_").rpartition("_")
        if (kind, layer) == ("", "embed"):
            return cls("embed")
        if kind in _ORDER and kind != "embed" and layer.isascii() and layer.isdigit() and len(layer) < 7:
            return cls(kind, int(layer))
        kind, _, layer = text.strip().replace(".", "_").partition("_")
        matches = nearest(kind, KIND_ORDER, n=1)
        hint = f"; did you mean {'_'.join([*matches, layer] if layer else matches)!r}?" if matches else ""
        raise UserError(f"unknown site {text!r}: allowed are embed, attn_N, mlp_N and resid_N with N a layer{hint}")

    def __str__(self) -> str:
        return self.name

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Site):
            return NotImplemented
        return self.order < other.order

    @property
    def order(self) -> tuple[int, float]:
        """Layer and place in it, by which sites sort."""
        return (-1 if self.layer is None else self.layer, _ORDER[self.kind])


@dataclass(frozen=True)
class SitePath:
    """The path of a site's tensor: the output (the first one of several) or the first input of a module."""

    module: str
    """Dotted path of the module inside the model."""
    side: str = "output"
    """`output` or `input`."""

    def __post_init__(self) -> None:
        if self.side not in ("output", "input"):
            raise UserError(f"side {self.side!r} of module {self.module!r}: allowed are output and input")

    @classmethod
    def parse(cls, text: str | SitePath) -> SitePath:
        """Read `model.layers.{layer}.self_attn.o_proj:input`; without a side the output is meant."""
        if isinstance(text, SitePath):
            return text
        module, _, side = text.strip().partition(":")
        return cls(module, side or "output")

    def at(self, layer: int | None) -> SitePath:
        """The path with `{layer}` filled in."""
        return SitePath(self.module.replace("{layer}", str(layer)), self.side)

    def __str__(self) -> str:
        return self.module if self.side == "output" else f"{self.module}:{self.side}"


@dataclass(frozen=True)
class ModelFamily:
    """The paths of the sites in a family of models; attn, mlp and the two sublayers are relative to the block."""

    embed: str
    """Module whose output is the input of the first block."""
    block: str
    """Path of block `{layer}`; its output is the residual stream."""
    attn: str
    """Module whose output the attention sublayer adds to the residual stream."""
    mlp: str
    """Module whose output the MLP adds to the residual stream."""
    attn_body: str | None = None
    """The attention module itself where `attn` is a norm after it, which alone reads it."""
    mlp_body: str | None = None
    """The MLP module itself where `mlp` is a norm after it, which alone reads it."""

    def defaults(self) -> dict[str, str]:
        """Kind of site to path, in the form a user gives."""
        return {
            "embed": self.embed,
            "attn": f"{self.block}.{self.attn}",
            "mlp": f"{self.block}.{self.mlp}",
            "resid": self.block,
        }


_LLAMA = ModelFamily("model.embed_tokens", "model.layers.{layer}", "self_attn", "mlp")
_GEMMA = ModelFamily(
    "model.embed_tokens",
    "model.layers.{layer}",
    "post_attention_layernorm",
    "post_feedforward_layernorm",
    attn_body="self_attn",
    mlp_body="mlp",
)
MODEL_FAMILIES: dict[str, ModelFamily] = {
    "gpt2": ModelFamily("transformer.drop", "transformer.h.{layer}", "attn", "mlp"),
    "gpt_neox": ModelFamily("gpt_neox.emb_dropout", "gpt_neox.layers.{layer}", "attention", "mlp"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
}


def model_type(hf_model: nn.Module) -> str:
    """The family name in the model's config, such as `gpt_neox`; empty where there is no config."""
    return getattr(getattr(hf_model, "config", None), "model_type", "") or ""


def usual_sites(hf_model: nn.Module) -> dict[Site, SitePath]:
    """The sites of a model's family, in the order of the forward pass; none where the family is not known or the model
    lacks one of its modules.
    """
    architecture = MODEL_FAMILIES.get(model_type(hf_model))
    modules = {name for name, _ in hf_model.named_modules() if name}
    table: dict[Site, SitePath] = {}
    for kind, text in (architecture.defaults() if architecture else {}).items():
        table |= _sites_of_kind(kind, SitePath.parse(text), modules)
    return dict(sorted(table.items())) if all(path.module in modules for path in table.values()) else {}


def site_table(
    hf_model: nn.Module,
    overrides: Mapping[str, str | SitePath] | None = None,
    defaults: Mapping[Site, SitePath] | None = None,
) -> dict[Site, SitePath]:
    """Every site of the model with its path, in the order of the forward pass.

    `overrides` maps a kind of site ("attn") to a path with `{layer}` in it, or one site ("attn_3") to a path; they
    replace `defaults`, which are those of the model's family where none are given.
    """
    paths = {kind: SitePath.parse(path) for kind, path in (overrides or {}).items()}
    defaults = usual_sites(hf_model) if defaults is None else defaults
    if not defaults and not paths:
        raise UserError(
            f"unknown architecture {model_type(hf_model)!r}: known are {', '.join(MODEL_FAMILIES)}; in this model no "
            "list of blocks was found either, modules that are called one after the other, each on the output of the "
            "one before it [rows, positions, width]: give site_paths, such as {'resid': 'model.layers.{layer}', "
            "'attn': 'model.layers.{layer}.attn'}"
        )
    modules = [name for name, _ in hf_model.named_modules() if name]
    module_names = set(modules)
    table = {site: path for site, path in defaults.items() if site.kind not in paths}
    for kind, path in paths.items():
        table |= _sites_of_kind(kind, path, module_names) if kind in KIND_ORDER else {Site.parse(kind): path}
    table |= {Site.parse(name): path for name, path in paths.items() if name not in KIND_ORDER}
    for site, path in table.items():
        if path.module not in module_names:
            raise _no_module(site.name, path.module, modules)
    return dict(sorted(table.items()))


def _sites_of_kind(kind: str, pattern: SitePath, module_names: set[str]) -> dict[Site, SitePath]:
    """The sites of one kind: the layers in which the path exists."""
    if kind == "embed":
        return {Site("embed"): pattern}
    prefix, layer, suffix = pattern.module.partition("{layer}")
    if not layer:
        raise UserError(f"path {pattern.module!r} for {kind!r} needs {{layer}} where the block's index stands")
    indices = (name[len(prefix) : len(name) - len(suffix)] for name in module_names if name.startswith(prefix))
    layers = sorted({int(index) for index in indices if index.isascii() and index.isdigit()})
    paths = {Site(kind, layer): pattern.at(layer) for layer in layers}
    existing = {site: path for site, path in paths.items() if path.module in module_names}
    return existing or {Site(kind, 0): pattern.at(0)}  # the missing module is reported by the caller


def _no_module(name: str, module: str, modules: Sequence[str]) -> UserError:
    hint = did_you_mean(nearest(module, modules, n=3))
    return UserError(f"site {name!r}: the model has no module {module!r}{hint}")


def select_sites(spec: str | Site | Iterable[str | Site], available: Sequence[Site]) -> list[Site]:
    """The sites a user asks for, in forward order: "all", kinds and names, comma-separated or listed."""
    if isinstance(spec, Site):
        spec = [spec]
    words: Iterable[str | Site] = spec.split(",") if isinstance(spec, str) else spec
    kinds = {site.kind for site in available}
    selected: set[Site] = set()
    for word in words:
        text = str(word).strip()
        if text == "all":
            selected.update(available)
        elif text in kinds:
            selected.update(site for site in available if site.kind == text)
        elif text:
            matching = [site for site in available if site.name == text.replace(".", "_")]
            if not matching:
                raise unknown("site", text, dict.fromkeys(["all", *sorted(kinds), *(site.name for site in available)]))
            selected.update(matching)
    if not selected:
        raise UserError(f"no site selected by {spec!r}: allowed are all, {', '.join(site.name for site in available)}")
    return sorted(selected)
