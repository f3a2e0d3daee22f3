"""Heads and MLPs as the nodes of a circuit, as MIB's circuit track has them (Mueller et al. 2025, arXiv 2504.13151).

A model's components are its `input` (the embedding), the heads `a3.h7` and the MLPs `m3`. Features are none, but what a
node method makes of a site it makes of a component as well:

1. The effect of the input or an MLP is (x_patch - x_clean) . g, that of head h (z_h,patch - z_h,clean) . (dx/dz_h)^T g,
   with g the gradient dm/dx as the method averages it and z_h what the head gives to the output projection, summed over
   tokens, mean over prompts. Where no norm stands behind the attention the heads of a layer add up to its site. `exact`
   patches one component at a time instead.
2. Of a set C of components all others have the value they have after the pair's other prompt, and the components of C
   are computed from what reaches them: m(C). Faithfulness is (m(C) - m(0)) / (m(M) - m(0)), as everywhere.
3. Sets are the first int(share * n) of n components, at ten shares from .001 to 1. CPR is the area under faithfulness
   over the share with components ranked by their effect, those that help first; CMD that under |1 - f| with components
   ranked by |effect|; both by the trapezoid rule from the first share on, as the benchmark's own script does.

Legend: B prompts, S positions, d model width, H heads, d_v width of what a head writes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from scipy.integrate import trapezoid
from torch import Tensor

from circuits.attribution.activations import Setting, capture_activations
from circuits.attribution.node_effects import WITHOUT_GRADIENT, attribute
from circuits.metrics.metrics import Metric
from circuits.options import MethodOptions, members
from circuits.prompts.dataset import PromptSet
from sae._frames import Result
from sae._progress import ProgressBar
from sae.errors import UserError
from sae.model.attention import attention_heads, heads_of
from sae.model.forward import with_gradients
from sae.model.hook_points import SiteEdit
from sae.model.language_model import LanguageModel, Tokens
from sae.model.sites import Site
from sae.neurons import neuron_dictionaries

if TYPE_CHECKING:
    import pandas as pd

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the components that are measured."""
INPUT = "input"


@dataclass(frozen=True)
class ComponentCurve(Result):
    """How faithful the best components are."""

    effects: dict[str, float]
    """Effect of every component, in forward order."""
    shares: list[float]
    """Shares of the components that were kept."""
    by_effect: list[float]
    """Faithfulness at each share, those with the largest effect first."""
    by_magnitude: list[float]
    """The same by |effect|."""
    n_prompts: int
    """Prompts measured."""

    @property
    def cpr(self) -> float:
        """Area under faithfulness by effect, from the first share on (higher is better)."""
        return float(trapezoid(self.by_effect, self.shares))

    @property
    def cmd(self) -> float:
        """Area under |1 - faithfulness| by |effect|, from the first share on (lower is better)."""
        return float(trapezoid([abs(1 - f) for f in self.by_magnitude], self.shares))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"schema_version": 1, **asdict(self), "cpr": self.cpr, "cmd": self.cmd}

    def to_frame(self) -> pd.DataFrame:
        """One row a share: how many components are kept, and both faithfulnesses."""
        import pandas as pd

        counts = [int(share * len(self.effects)) for share in self.shares]
        columns = {"share": self.shares, "components": counts, "by_effect": self.by_effect}
        return pd.DataFrame(columns | {"by_magnitude": self.by_magnitude})


def component_names(model: LanguageModel) -> list[str]:
    """`input`, `a0.h0`, ..., `m0`, `a1.h0`, ... in forward order."""
    n_heads = int(model.hf.config.get_text_config().num_attention_heads)
    heads = [[f"a{layer}.h{head}" for head in range(n_heads)] for layer in range(model.n_layers)]
    return [INPUT, *(name for layer, of_layer in enumerate(heads) for name in (*of_layer, f"m{layer}"))]


def component_effects(
    model: LanguageModel,
    prompts: PromptSet,
    *,
    method: str = "ig-inputs",
    metric: str | Metric = "logit_difference",
    batch_size: int = 16,
    progress: bool = True,
    **options: Any,
) -> dict[str, float]:
    """The effect of every component on the metric, by a node method.

    Args:
        model: The model.
        prompts: Pairs.
        method: A node method with a gradient, an ensemble of some, or exact.
        metric: As for `discover`.
        batch_size: Prompts that go through the model at once.
        progress: Whether to show a progress bar.
        options: Further fields of `MethodOptions`, such as `steps`.

    Returns:
        Component name -> effect, in forward order; above zero where patching it breaks the behaviour.

    Raises:
        UserError: For prompts without pairs, methods without a gradient, or a model whose heads cannot be seen.
    """
    names = members(method)
    if len(names) > 1:
        each = [
            component_effects(model, prompts, method=name, metric=metric, batch_size=batch_size, progress=progress,
                              **options)
            for name in names
        ]  # fmt: skip
        sums = [sum(map(abs, effects.values())) or 1.0 for effects in each]
        return {name: sum(e[name] / s for e, s in zip(each, sums, strict=True)) / len(each) for name in each[0]}
    check_pairs(prompts)
    if method in WITHOUT_GRADIENT and method != "exact":
        raise UserError(f"method is {method!r}, which takes no gradient: heads and MLPs need one that does, or exact")
    saes = neuron_dictionaries(model, sites=[site for site in model.sites if site.kind != "resid"])
    setting = Setting.of(model, saes, metric)
    prompts = setting.prepare(prompts)
    total = dict.fromkeys(component_names(model), 0.0)
    batches = list(prompts.batches(batch_size))
    for batch in ProgressBar(batches, desc="components", unit="batch", disable=not progress):
        of_batch = _exact(setting, batch) if method == "exact" else _first_order(setting, batch, method, options)
        for name, effect in of_batch.items():
            total[name] += effect / len(prompts)
    return total


@with_gradients
def _first_order(setting: Setting, prompts: PromptSet, method: str, options: Mapping[str, Any]) -> dict[str, float]:
    """Effects of one batch, summed over its prompts."""
    model, states = setting.model, capture_activations(setting, prompts)
    settings = MethodOptions(**{"method": method, **options})
    gradients = attribute(states, totals=False, **vars(settings)).gradients
    real = states.mask[..., None]
    effects = {}
    for site, gradient in gradients.items():
        if site.kind != "attn":
            name = INPUT if site.kind == "embed" else f"m{site.layer}"
            effects[name] = ((states.patch[site] - states.clean[site]) * gradient * real).sum().item()
    z_patch, sites = _head_outputs(model, _patch_of(prompts)), [site for site in gradients if site.kind == "attn"]
    with attention_heads(model.hf) as by_layer:
        run = model.run(prompts.clean, capture=sites, grad=True, need_logits=False)
    for site in sites:
        layer = int(site.layer or 0)
        z = heads_of(by_layer, layer, model.name).output
        (pulled,) = torch.autograd.grad([run.activations[site]], [z], [gradients[site]], retain_graph=True)
        of_heads = ((z_patch[layer] - z.detach()) * pulled * real[..., None]).sum((0, 1, 3)).tolist()  # [H]
        effects |= {f"a{layer}.h{head}": effect for head, effect in enumerate(of_heads)}
    return effects


def _exact(setting: Setting, prompts: PromptSet) -> dict[str, float]:
    """m with one component patched less m, summed over the prompts of one batch."""
    patched = PatchedComponents(setting.model, prompts)
    names = component_names(setting.model)
    m = setting.metric(patched.logits(names), prompts)
    return {name: (setting.metric(patched.logits({*names} - {name}), prompts) - m).sum().item() for name in names}


def component_faithfulness(
    model: LanguageModel,
    prompts: PromptSet,
    effects: Mapping[str, float],
    *,
    metric: str | Metric = "logit_difference",
    batch_size: int = 16,
    progress: bool = True,
) -> ComponentCurve:
    """Faithfulness of the components of largest effect, at the shares of the benchmark.

    Args:
        model: The model.
        prompts: Pairs, best held out.
        effects: Component name -> effect.
        metric: As for `discover`.
        batch_size: Prompts that go through the model at once.
        progress: Whether to show a progress bar.

    Returns:
        Both curves, with CPR and CMD.

    Raises:
        UserError: For prompts without pairs, or where patching everything changes nothing.
    """
    check_pairs(prompts)
    setting = Setting.of(model, {}, metric)
    prompts = setting.prepare(prompts)
    rankings = [sorted(effects, key=key) for key in (lambda name: -effects[name], lambda name: -abs(effects[name]))]
    sets = [ranking[: int(share * len(effects))] for ranking in rankings for share in SHARES]
    total = torch.zeros(2 + len(sets), dtype=torch.float64)
    batches = list(prompts.batches(batch_size))
    for batch in ProgressBar(batches, desc="faithfulness", unit="batch", disable=not progress):
        patched = PatchedComponents(setting.model, batch)
        m = [setting.metric(patched.logits(circuit), batch).sum() for circuit in (list(effects), [], *sets)]
        total += torch.stack(m).cpu().double() / len(prompts)
    m_model, m_empty = total[:2].tolist()
    if abs(m_model - m_empty) < 1e-9:
        raise UserError("patching every component leaves the metric as it is: there is nothing to explain")
    f = ((total[2:] - m_empty) / (m_model - m_empty)).tolist()
    n = len(SHARES)
    return ComponentCurve(dict(effects), list(SHARES), f[:n], f[n:], len(prompts))


class PatchedComponents:
    """A batch of pairs in a model of which some components are kept, the others taken from the other prompt."""

    @torch.no_grad()
    def __init__(self, model: LanguageModel, prompts: PromptSet) -> None:
        self.model, self.prompts = model, prompts
        self.sites = [site for site in model.sites if site.kind in ("embed", "mlp")]
        with attention_heads(model.hf) as by_layer:
            self._patch = model.run(_patch_of(prompts), capture=self.sites, last_only=True).activations
        self._heads = {layer: heads.output for layer, heads in by_layer.items()}

    @torch.no_grad()
    def logits(self, circuit: Collection[str]) -> Tensor:
        """Logits after every prompt [B, V] with the components of `circuit` alone as they are."""
        circuit = {*circuit}

        def edit_heads(layer: int, z: Tensor) -> Tensor:
            keep = torch.tensor([f"a{layer}.h{head}" in circuit for head in range(z.shape[2])], device=z.device)
            return torch.where(keep[:, None], z, self._heads[layer])

        def replaced(x: Tensor) -> SiteEdit:
            return lambda _: x

        gone = [site for site in self.sites if (INPUT if site.kind == "embed" else f"m{site.layer}") not in circuit]
        edits = {site: replaced(self._patch[site]) for site in gone}
        with attention_heads(self.model.hf, edit_heads):
            return self.model.run(self.prompts.clean, edits=edits, last_only=True).logits[:, -1]


@torch.no_grad()
def _head_outputs(model: LanguageModel, tokens: Tokens) -> dict[int, Tensor]:
    """The output of every head before the output projection, [B, S, H, d_v] by layer."""
    with attention_heads(model.hf) as by_layer:
        model.run(tokens, capture=[Site("resid", model.n_layers - 1)], need_logits=False)
    return {layer: heads.output for layer, heads in by_layer.items()}


def _patch_of(prompts: PromptSet) -> Tokens:
    check_pairs(prompts)
    assert prompts.patch is not None
    return prompts.patch


def check_pairs(prompts: PromptSet) -> None:
    """`UserError` for prompts without a patch side."""
    if prompts.patch is None:
        raise UserError("components are patched with what they are after the pair's other prompt: give pairs")
