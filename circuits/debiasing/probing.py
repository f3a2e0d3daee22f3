"""A probe on a model that is edited or not: read, trained, scored.

1. `Study` holds the model, its SAEs, the texts and where the probe reads.
2. `x` reads the probe's input for texts, with features ablated; `fit` trains a probe on it.
3. `scored` compares a probe's answers with both labels, group by group, with intervals over texts.

Shapes: B texts, d model width, n ablated features, R draws.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from scipy.stats import beta
from torch import Tensor

from circuits.circuit import Circuit
from circuits.debiasing.data import Pairing, TextSet, span_read
from circuits.debiasing.options import LAST, MEAN, ShiftOptions
from circuits.debiasing.results import ProbeScore
from circuits.discovery import metadata
from circuits.discovery.discover import discover
from circuits.editing.applied import edited, with_references
from circuits.editing.declaration import Edit
from circuits.editing.targets import tokens_at
from circuits.metrics import metrics
from circuits.metrics.fit_probe import FittedProbe, fit_probe, read_site
from circuits.metrics.probe import Probe
from circuits.options import DiscoverOptions
from circuits.prompts.alignment import numbered
from circuits.uncertainty.bootstrap import group_sums
from sae.autoencoder import SparseAutoencoder
from sae.errors import unknown
from sae.model.language_model import LanguageModel
from sae.model.sites import Site

SAEs = Mapping[Site, SparseAutoencoder]
TAIL = 0.025
BATCH = 64
"""Texts that go through the model at once."""


@contextmanager
def _unwarned() -> Iterator[None]:
    """No warnings of what effects add up to."""
    logs = [logging.getLogger(module.__name__) for module in (metadata, metrics)]
    before = [log.disabled for log in logs]
    try:
        for log in logs:
            log.disabled = True
        yield
    finally:
        for log, disabled in zip(logs, before, strict=True):
            log.disabled = disabled


def probe_site(model: LanguageModel, name: str | None) -> Site:
    """The site of that name; by default the residual stream two thirds up."""
    by_name = {site.name: site for site in model.sites}
    if name is None:
        streams = [site.name for site in model.sites if site.kind == "resid"]
        name = streams[round(2 / 3 * (len(streams) - 1))]
    if name not in by_name:
        raise unknown("site", name, by_name)
    return by_name[name]


def read_texts(model: LanguageModel, texts: TextSet, site: Site, position: str) -> Tensor:
    """The input of a probe, [B, d]."""
    inside = None if position == LAST else tokens_at(texts.prompts, span_read(position))
    return read_site(model, texts.prompts.clean, site, inside)


class Pooled(NamedTuple):
    """Activations and features of B texts at a site, pooled over the tokens that are read."""

    x: Tensor  # [B, d] the activation
    f: Tensor  # [B, F] the features of its autoencoder


@torch.no_grad()
def read_features(model: LanguageModel, saes: SAEs, texts: TextSet, site: Site, position: str) -> Pooled:
    """Mean activation of a site, and of its features, over the tokens of each text that a probe reads."""
    sae, read = saes[site], saes[site].config.read_site(site)
    xs, fs = [], []
    for batch in texts.prompts.batches(BATCH):
        run = model.run(batch.clean, capture={site, read}, need_logits=False)
        x = run.activations[site].float()  # [B, S, d]
        inside = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        if position == LAST:
            inside[:, -1] = True
        else:
            inside = tokens_at(batch, span_read(position))
        rows = torch.arange(len(x), device=x.device)[:, None].expand_as(inside)[inside]  # [n] text of each token
        share = 1 / inside.sum(1).float()[rows]  # [n]
        xs.append(torch.zeros(len(x), x.shape[-1], device=x.device).index_add_(0, rows, x[inside] * share[:, None]))
        active = sae.encode_sparse(run.activations[read][inside])
        f = torch.zeros(len(x), sae.config.n_features, device=x.device)
        values = active.value.float() * share[active.token]
        fs.append(f.index_put_((rows[active.token], active.feature), values, accumulate=True))
    return Pooled(torch.cat(xs).cpu(), torch.cat(fs).cpu())


@dataclass(frozen=True)
class Study:
    """The setting that all probes of a report share."""

    model: LanguageModel
    """The model."""
    saes: SAEs
    """Its SAEs."""
    options: ShiftOptions
    """Options."""
    pairing: Pairing
    """Which labels go together."""
    site: Site
    """Where the probe reads."""
    ambiguous: TextSet
    """Texts in which the labels agree, as many of each class."""
    test: TextSet
    """Texts of all groups."""
    balanced: TextSet | None
    """Other texts of all groups, as many of each; None where there are none."""

    @property
    def position(self) -> str:
        """Which token the probe reads."""
        return self.options.position

    def x(self, texts: TextSet, edit: Edit | None = None, saes: SAEs | None = None) -> Tensor:
        """The probe's input, [B, d], in the edited model."""
        block = nullcontext() if edit is None else edited(self.model, saes or self.saes, edit, prompts=texts.prompts)
        with block:
            return read_texts(self.model, texts, self.site, self.position)

    def fit(self, x: Tensor, labels: Sequence[str]) -> FittedProbe:
        """A probe of x [B, d]."""
        return fit_probe(x, labels, penalty=self.options.penalty, seed=self.options.seed)

    @cached_property
    def original(self) -> FittedProbe:
        """The probe that was trained on the ambiguous texts."""
        return self.fit(self.x(self.ambiguous), self.ambiguous.intended)

    def probe(self, name: str = "probe's margin") -> Probe:
        """The original probe as a metric."""
        span = LAST if self.position == LAST else span_read(self.position)
        return Probe(self.original.weight, self.original.bias, self.site, span, name, margin=True)

    def by_spurious(self, texts: TextSet) -> list[str]:
        """The class that goes with the spurious label of each text."""
        classes = dict(zip(self.pairing.spurious, self.pairing.classes, strict=True))
        return [classes[label] for label in texts.spurious]

    def circuit(
        self,
        probe: Probe | str,
        texts: TextSet | None = None,
        *,
        towards_spurious: bool = False,
        saes: SAEs | None = None,
        sites: str | None = None,
        progress: bool = False,
        warn: bool = False,
    ) -> Circuit:
        """The circuit of the margin of a probe, or of its file, on the first of some texts, the ambiguous ones by
        default.

        towards_spurious: whether the margin is towards the spurious label, instead of the probe's own answer.
        warn: whether to say where effects do not add up; towards the spurious label they cancel, as they should.
        """
        texts = (texts or self.ambiguous).first(self.options.circuit_texts)
        prompts = texts.prompts
        if towards_spurious:
            signs = [[1.0 if label == self.pairing.classes[1] else -1.0] for label in self.by_spurious(texts)]
            prompts = replace(prompts, reference=torch.tensor(signs, device=self.model.device))  # [B, 1]
        options = DiscoverOptions(
            sites=sites or self.options.sites, method=self.options.method, steps=self.options.steps,
            memory=self.options.memory, aggregation="sum" if self.position == MEAN else "spans", edge_nodes=0,
        )  # fmt: skip
        with nullcontext() if warn else _unwarned():
            return discover(self.model, saes or self.saes, prompts, options, metric=probe, progress=progress)

    def ablation(self, names: Sequence[str], saes: SAEs | None = None) -> Edit | None:
        """The edit that takes features to their mean over the ambiguous texts, or to zero."""
        if not names:
            return None
        edit = Edit(list(names), self.options.operation)
        return with_references(self.model, saes or self.saes, edit, prompts=self.ambiguous.prompts)

    @property
    def read_spans(self) -> set[str]:
        """The spans of the tokens that the probe reads, empty where features have none."""
        if self.position != LAST:
            return {"" if self.position == MEAN else self.position}
        prompts = self.ambiguous.prompts
        assert prompts.span_numbers is not None
        return {prompts.spans[number] for number in prompts.span_numbers[:, -1].unique().tolist()}

    # --- scores

    def answers(self, probe: FittedProbe, x: Tensor) -> list[str]:
        """The probe's output at x [B, d]."""
        positive = (x @ probe.weight + probe.bias > 0).tolist()
        return [probe.classes[int(is_second)] for is_second in positive]

    def scored(self, name: str, answers: Sequence[Sequence[str]], n_features: int | None = None) -> ProbeScore:
        """How often answers (one list a draw) fit both labels of the test texts."""
        intended = torch.tensor(
            [[a == b for a, b in zip(of_draw, self.test.intended, strict=True)] for of_draw in answers]
        )
        by_spurious = self.by_spurious(self.test)
        spurious = torch.tensor([[a == b for a, b in zip(of_draw, by_spurious, strict=True)] for of_draw in answers])
        right, leaning = intended.float().mean(0), spurious.float().mean(0)  # [B] each
        names = self.test.prompts.cases
        rows = {name: torch.tensor([one == name for one in names]) for name in sorted(set(names))}
        weight = sum(mask.float() / mask.sum() for mask in rows.values())  # [B] groups weigh alike
        by_group = {group: right[mask].mean().item() for group, mask in rows.items()}
        worst = min(by_group, key=lambda group: by_group[group])
        texts = numbered(self.test.prompts.texts)
        return ProbeScore(
            name=name,
            intended=sum(by_group.values()) / len(by_group),
            spurious=sum(leaning[mask].mean().item() for mask in rows.values()) / len(rows),
            worst_group=by_group[worst],
            by_group=by_group,
            intended_interval=interval(right, torch.as_tensor(weight), texts),
            worst_group_interval=interval(right[rows[worst]], torch.ones(int(rows[worst].sum())), texts[rows[worst]]),
            n_features=n_features,
        )


def interval(right: Tensor, weight: Tensor, texts: Tensor | None = None) -> tuple[float, float]:
    """95 % interval of a weighted share over texts (Clopper and Pearson 1934), for right and weight [B].

    As many texts count as equal weights would need for the same variance: (sum w)^2 / sum w^2. A text that is repeated
    counts once, with all of its weight; texts: [B] which text each is, each another one by default.
    """
    if texts is not None:
        total = group_sums(weight, texts)
        right, weight = group_sums(right * weight, texts)[total > 0] / total[total > 0], total[total > 0]
    n = (weight.sum() ** 2 / weight.square().sum()).item()
    k = n * (right @ weight / weight.sum()).item()
    low = 0.0 if k <= 0 else float(beta.ppf(TAIL, k, n - k + 1))
    return low, 1.0 if k >= n else float(beta.ppf(1 - TAIL, k + 1, max(n - k, 1e-9)))
