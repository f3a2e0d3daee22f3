"""Sites from the names that other tools use, and back.

TransformerLens hooks (`blocks.3.hook_mlp_out`), Hugging Face modules (`layers.3.mlp`), release folders (`layer_3` of
`gemma-scope-2b-pt-mlp`, `L3M`, `mlp_out_layer_3`, `resid_delta_mlp/autoencoders/3.pt`) and our own names all give
`mlp_3`. A name that says nothing certain gives "": it is never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePosixPath

from sae.model.sites import Site

_NAMES = {
    "resid": ("resid_post", "resid_out", "resid", "res", "R", "resid_post_mlp"),
    "mlp": ("mlp_out", "mlp", "M", "resid_delta_mlp"),
    "attn": ("attn_out", "attention_out", "attn", "att", "attention", "self_attn", "A", "resid_delta_attn"),
}
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names}

EMBED_HOOKS = ("hook_embed", "embed.hook_out")
_LEARNED_POSITIONS = r"(distil)?gpt-?2|gpt-neo-|opt-|gelu-|solu-|attn-only|tiny-stories|tinystories-(instruct-)?\d+m"
_NORMED_SUBLAYERS = r"gemma-[23]|olmo-?2"


def _kind_layer(match: re.Match[str]) -> str:
    return f"{_KINDS[match['kind'] or 'resid']}_{match['layer']}"


def _before(match: re.Match[str]) -> str:
    """The residual stream before block l is the output of block l − 1."""
    layer = int(match["layer"])
    return f"resid_{layer - 1}" if layer else "embed"


_PATTERNS: list[tuple[str, Callable[[re.Match[str]], str]]] = [
    (r"(?P<kind>attn|mlp|resid)_(?P<layer>\d+)", _kind_layer),
    (r"blocks\.(?P<layer>\d+)\.hook_(?P<kind>resid_post|mlp_out|attn_out)", _kind_layer),
    (r"blocks\.(?P<layer>\d+)\.(?:hook_resid_pre|hook_in)", _before),
    (r"blocks\.(?P<layer>\d+)\.(?:(?P<kind>mlp|attn)\.)?hook_out", _kind_layer),
    (r"(?P<kind>resid|resid_post|resid_out|mlp_out|attn_out|attention_out)_layer_?(?P<layer>\d+)", _kind_layer),
    (r"(?:\w+\.)*(?:layers|h)\.(?P<layer>\d+)(?:\.(?P<kind>mlp|attn|attention|self_attn))?", _kind_layer),
    (r"(?:.*-)?L(?P<layer>\d+)(?P<kind>[RMA])(?:-\d+x)?", _kind_layer),
    (
        r"embed|embed_tokens|embed_in|wte|hook_embed|embed\.hook_out|(?:\w+\.)*(?:embed_tokens|embed_in|wte)",
        lambda _: "embed",
    ),
]
_WHOLE_PATH: list[tuple[str, Callable[[re.Match[str]], str]]] = [
    (r"gemma-scope-[\w.-]*-(?:res|mlp|att)\b.*/embedding(?:/|$)", lambda _: "embed"),
    (r"gemma-scope-[\w.-]*-(?P<kind>res|mlp|att)\b.*/layer_(?P<layer>\d+)(?:/|$)", _kind_layer),
    (r"(?P<kind>resid_post|mlp_out|attn_out)(?:_all)?/layer_(?P<layer>\d+)_width_", _kind_layer),
    (
        r"(?P<kind>resid_delta_mlp|resid_delta_attn|resid_post_mlp)(?:_v\w+)?/autoencoders/(?P<layer>\d+)\.pt$",
        _kind_layer,
    ),
]


def site_named(text: str) -> str:
    """The site a hook, module or path names, or "".

    >>> site_named("blocks.3.hook_resid_pre"), site_named("runs/layers.5.mlp"), site_named("my_sae")
    ('resid_2', 'mlp_5', '')
    """
    for pattern, name in _WHOLE_PATH:
        if match := re.search(pattern, text):
            return name(match)
    for part in reversed(PurePosixPath(text).parts):
        for pattern, name in _PATTERNS:
            if match := re.fullmatch(pattern, part):
                return name(match)
    return ""


_FILES: list[tuple[str, str]] = [
    (r"gemma-scope-[\w.-]*-transcoders\b.*/layer_(\d+)(?:/|$)", "mlp_{}"),
    (r"(?:^|/)transcoder(?:_all)?/layer_(\d+)_width_", "mlp_{}"),
    (r"(?:^|/)layer_(\d+)\.safetensors$", "mlp_{}"),
    (r"(?:^|/)layer(\d+)\.sae\.pt$", "resid_{}"),
    (r"_blocks\.(\d+)\.ln2\.hook_normalized_\d+\.pt$", "mlp_{}"),
    (r"(?:^|/)((?:resid|mlp|attn)_out_layer\d+|embed)/\d+_\d+$", "{}"),
]


def dictionary_site(path: str) -> str:
    """The site that the path of a dictionary says, transcoders among them, or "": `site_named`, and layouts of whole
    sets.

    >>> dictionary_site("google/gemma-scope-2-1b-pt/transcoder_all/layer_7_width_16k_l0_small")
    'mlp_7'
    """
    for pattern, name in _FILES:
        if match := re.search(pattern, path):
            return name.format(match[1]) if name != "{}" else site_named(match[1])
    return site_named(path)


def read_place(hook: str) -> str:
    """The place of a block, as `sae.model.sites.READ_KINDS` calls it, that a transcoder's hook reads; "" for another.

    >>> read_place("blocks.3.ln2.hook_normalized"), read_place("model.layers.3.pre_feedforward_layernorm.output")
    ('mlp_norm', 'mlp_in')
    """
    return next((place for pattern, place in _READ_HOOKS if re.search(pattern, hook)), "")


_READ_HOOKS = (
    (r"ln2\.hook_normalized$", "mlp_norm"),
    (r"(mlp\.hook_in|pre_feedforward_layernorm\.output|ln2\.hook_out)$", "mlp_in"),
    (r"(hook_resid_mid|hook_mlp_in)$", "mlp_resid"),
)


READ_HOOKS = {"mlp_norm": "ln2.hook_normalized", "mlp_in": "mlp.hook_in", "mlp_resid": "hook_resid_mid"}
"""TransformerLens' names, inside a block, of the places that a transcoder reads."""


def transformer_lens_hook(site: str) -> str:
    """The TransformerLens name of a site, "" for none.

    Our embed is what the first block reads: with learned positions those are part of it, which `hook_embed` lacks.
    """
    if not site:
        return ""
    parsed = Site.parse(site)
    hooks = {"resid": "hook_resid_post", "mlp": "hook_mlp_out", "attn": "hook_attn_out"}
    return "blocks.0.hook_resid_pre" if parsed.layer is None else f"blocks.{parsed.layer}.{hooks[parsed.kind]}"


def hook_site(hook: str, model: str) -> str:
    """The site of a TransformerLens hook in the model of this name, or "".

    Where positions are learned, `hook_embed` is the token embedding without them, which is no site. Where sublayers
    have a norm behind them, `mlp.hook_out` is before it, and what the sublayer adds to the residual stream after it.
    """
    name = model.rpartition("/")[2].lower()
    if hook in EMBED_HOOKS and re.match(_LEARNED_POSITIONS, name):
        return ""
    if re.match(_NORMED_SUBLAYERS, name):
        if re.fullmatch(r"blocks\.\d+\.(mlp|attn)\.hook_out", hook):
            return ""
        if normed := re.fullmatch(r"blocks\.(\d+)\.ln([12])_post\.hook_out", hook):
            return f"{'attn' if normed[2] == '1' else 'mlp'}_{normed[1]}"
    return site_named(hook)


def dictionary_learning_name(site: str) -> str:
    """The name of a site in dictionary_learning's runs: `resid_post_layer_3`; "" for none."""
    if not site:
        return ""
    parsed = Site.parse(site)
    kinds = {"resid": "resid_post", "mlp": "mlp_out", "attn": "attention_out"}
    return "embed" if parsed.layer is None else f"{kinds[parsed.kind]}_layer_{parsed.layer}"
