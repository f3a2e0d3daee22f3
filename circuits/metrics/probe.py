"""A linear probe's logit as the metric: m = w . x + b, with x the activation of one site.

Metrics are functions of the logits. So that every method, edges and faithfulness work for a probe as they are, the
model is looked at through the probe (`read_by`): its "logits" are then the probe's outputs at all positions, [B, S],
and the forward pass ends at the probe's site.

1. `Probe` is such a metric: the output at the last token, or its mean over the tokens of a named span, which is the
   output for the mean activation. Over prompts of opposite classes it cancels; `margin` turns it so that it is negative
   on every clean prompt and rises as the probe's answer breaks, as the other metrics do.
2. Later sites cannot change it and are left out (`visible_sites`).
3. `circuits.metrics.fit_probe` learns one from labelled prompts.

A file is .safetensors with `weight` [d] or [C, d] and `bias` [] or [C]; its metadata has `site`, `position` (`last` or
the name of a span) and `classes` (comma-separated names of the C rows). A probe of `sfc probe` also has `model` (its
fingerprint) and `site_path` (where the site is, if not where the architecture has it): it reads no other model or path.

Shapes: B prompts, S positions, d model width, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from circuits.prompts.dataset import PromptSet
from circuits.prompts.spans import LAST
from sae._files import TensorSpec, check_tensors, read_tensors, write_tensors
from sae._run.outputs import check_output, has_header
from sae.errors import UserError, unknown
from sae.model.language_model import LanguageModel, Run, Tokens
from sae.model.sites import Site


@dataclass(frozen=True)
class Probe:
    """A linear read-out of one site; called on what `read_by` gives in place of logits, it is a metric."""

    weight: Tensor
    """[d]."""
    bias: Tensor
    """[]."""
    site: Site
    """Where x is read."""
    position: str = LAST
    """`last` for the last token, or a span, over whose tokens the output is averaged."""
    name: str = "probe"
    """Its name in drawings and reports."""
    margin: bool = False
    """m = -(w . x + b) times its sign on the clean prompt, which `PromptSet.reference` [B, 1] holds."""
    made_in: str = ""
    """Fingerprint of the model it was made in; empty where that is not known."""
    site_path: str = ""
    """Where its site was read, if not where the architecture has it."""

    def __call__(self, outputs: Tensor, prompts: PromptSet) -> Tensor:
        """m [B] from the outputs at all positions [B, S] (or more padding) of a model read by the probe."""
        m = self._read(outputs[:, outputs.shape[1] - prompts.clean.n_positions :], prompts)
        if not self.margin:
            return m
        if prompts.reference is None:
            raise UserError("the margin of a probe compares with the clean run: call prepare(...) first")
        return -m * prompts.reference[:, 0].to(m)

    def _read(self, outputs: Tensor, prompts: PromptSet) -> Tensor:
        if self.position == LAST:
            return outputs[:, -1]
        if self.position not in prompts.spans:
            names = ", ".join(prompts.spans) or "none"
            raise UserError(f"the probe reads the span {self.position!r}, and the prompts have the spans: {names}")
        inside = prompts.positions(prompts.spans) == prompts.spans.index(self.position)  # [B, S]
        if not inside.any(1).all():
            raise UserError(f"the probe reads the span {self.position!r}, which some of the prompts do not have")
        return (outputs * inside).sum(1) / inside.sum(1)

    @torch.no_grad()
    def signs(self, model: LanguageModel, prompts: PromptSet, *, batch_size: int = 64) -> Tensor:
        """Sign of the output on the clean prompts, [B, 1]."""
        plain = replace(self, margin=False)
        read = read_by(model, plain)
        batches = prompts.batches(batch_size)
        return torch.cat([plain(read.run(batch.clean).logits[:, -1], batch) for batch in batches]).sign()[:, None]

    def outputs(self, x: Tensor) -> Tensor:
        """w . x + b at every position, [B, S] from x [B, S, d]."""
        weight = self.weight.to(x.device)
        return x.to(torch.promote_types(x.dtype, torch.float32)) @ weight + self.bias.to(x.device)

    @staticmethod
    def load(path: str | Path, *, row: str | None = None) -> Probe:
        """A probe's file; `row`: name or number of the class, needed where there are several."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no probe {str(path)!r}: make one with sfc probe, or give a .safetensors file")
        tensors, about = _read(path)
        weight, bias = tensors["weight"], tensors["bias"].flatten()
        classes = _classes(about)
        name = f"logit of {path.stem if path.stem == 'probe' else f'probe {path.stem}'}"
        if weight.dim() == 2 and len(weight) == 1:
            weight = weight[0]
        if weight.dim() == 2:
            names = classes or [str(number) for number in range(len(weight))]
            if row not in names and not (row or "").isdecimal():
                raise unknown("class of the probe", row or "", names)
            number = names.index(row) if row in names else int(row or 0)
            if number >= len(names):
                raise unknown("class of the probe", str(row), names)
            weight, bias, name = weight[number], bias[number : number + 1], f"{name}, {names[number]}"
        elif row is not None:
            raise UserError(f"{path} has one output: leave out {row!r}")
        return Probe(
            weight, bias.squeeze(), Site.parse(about["site"]), about.get("position", LAST), name,
            made_in=about.get("model", ""), site_path=about.get("site_path", ""),
        )  # fmt: skip


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in float32 and metadata of a probe's file, which fit each other."""
    tensors = read_tensors(path)
    with safe_open(path, "pt") as file:
        about = dict(file.metadata() or {})
    if not {"weight", "bias"} <= set(tensors) or "site" not in about:
        raise UserError(f"{path} is no probe: expected weight, bias and a site, found {sorted([*tensors, *about])}")
    outputs = len(tensors["weight"]) if tensors["weight"].dim() == 2 else 1
    weight = ("width",) if tensors["weight"].dim() == 1 else (outputs, "width")
    bias = () if tensors["bias"].dim() == 0 and outputs == 1 else (outputs,)
    check_tensors(tensors, {"weight": TensorSpec(weight), "bias": TensorSpec(bias)}, path)
    if not tensors["weight"].numel() or (outputs > 1 and len(_classes(about)) not in (0, outputs)):
        raise UserError(f"{path} has {outputs} outputs of {tensors['weight'].numel()} weights for {_classes(about)}")
    return {name: tensor.float() for name, tensor in tensors.items()}, about


def _classes(about: Mapping[str, str]) -> list[str]:
    return about["classes"].split(",") if about.get("classes") else []


is_probe = has_header("site", "position", "classes")
"""Whether a file is a probe's."""


def save_probe(
    path: str | Path, weight: Tensor, bias: Tensor, *, site: Site, position: str = LAST, classes: Sequence[str] = (),
    model: LanguageModel | None = None, overwrite: bool = False,
) -> Path:  # fmt: skip
    """Write weight [d] or [C, d] and bias as `Probe.load` reads them; model: the one it is for, and no other.

    Raises UserError for a file that is no probe, unless `overwrite`.
    """
    check_output(path, is_probe, overwrite=overwrite)
    about = {"site": site.name, "position": position, "classes": ",".join(classes)}
    if model is not None:
        about |= {"model": model.fingerprint, "site_path": model.moved_sites.get(site, "")}
    path = Path(path)
    write_tensors(path, {"weight": weight, "bias": bias}, metadata=about)
    return path


# ------------------------------------------------------------------------------------------ the model through the probe


class ReadModel(LanguageModel):
    """The same model with the probe's outputs in place of its logits."""

    def __init__(self, model: LanguageModel, probe: Probe) -> None:
        self.__dict__.update(model.__dict__)
        self.read_out = probe

    def run(
        self,
        tokens: Tokens,
        *,
        capture: Iterable[Site] = (),
        last_only: bool = False,
        need_logits: bool = True,
        **options: Any,
    ) -> Run:
        """Run the model as `LanguageModel.run`; `logits` are [B, 1, S], the outputs at all positions."""
        wanted, probe = set(capture), self.read_out
        read = {probe.site} if need_logits else set()
        run = super().run(tokens, capture=wanted | read, need_logits=False, **options)
        if not need_logits:
            return run
        captured = {site: x for site, x in run.activations.items() if site in wanted}
        return replace(run, activations=captured, logits=probe.outputs(run.activations[probe.site])[:, None])


def read_by(model: LanguageModel, metric: object) -> LanguageModel:
    """The model as the metric reads it: through the probe where it is one, else as it is."""
    if not isinstance(metric, Probe):
        return model
    if metric.site not in model.widths:
        raise unknown("site of the probe", metric.site.name, [site.name for site in model.sites])
    if len(metric.weight) != model.widths[metric.site]:
        raise UserError(
            f"the probe has width {len(metric.weight)}, {metric.site} of {model.name!r} {model.widths[metric.site]}"
        )
    if metric.made_in and metric.made_in != model.fingerprint:
        raise UserError(
            f"the {metric.name} was made in another model than {model.name!r} (fingerprint {metric.made_in}, not "
            f"{model.fingerprint}): make one with sfc probe --model {model.name}"
        )
    here = model.moved_sites.get(metric.site, "")
    if metric.made_in and metric.site_path != here:
        raise UserError(
            f"the {metric.name} reads {metric.site} at {metric.site_path or 'its usual place'}, which is now at "
            f"{here or 'its usual place'}: give the site-paths it was made with, or make another one"
        )
    return ReadModel(model, metric)


def visible_sites(metric: object, model: LanguageModel, sites: Sequence[Site]) -> list[Site]:
    """The sites that can change the metric: those up to the probe's, where it is one."""
    if not isinstance(metric, Probe):
        return list(sites)
    site_of_probe = metric.site
    beside = Site("attn", site_of_probe.layer) if site_of_probe.kind == "mlp" and model.parallel_blocks else None
    seen = [site for site in sites if site <= site_of_probe and site != beside]
    if not seen:
        raise UserError(
            f"the probe reads {site_of_probe}, and none of the sites {', '.join(map(str, sites))} comes before it"
        )
    return seen
