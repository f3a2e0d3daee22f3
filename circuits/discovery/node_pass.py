"""The node pass of a discovery: activations, gradients and sparse effects of all nodes, batch by batch.

What was found of a batch goes to the `ResumeFolder`, if there is one, and is taken from there where an interrupted
discovery goes on. Everything the edges need of the node pass is among it, so that they come out the same to the bit.

Between the passes lie the sparse effects, one gradient [B, S, d] per site, and within the memory budget what the edges
would else compute again: on the CPU, or on disk where there are files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from circuits.attribution import (
    GRADIENT_AT_CLEAN,
    ActivationPair,
    AttributionOptions,
    EdgeInputs,
    SiteEffects,
    attribute_batches,
    capture_activations,
)
from circuits.attribution.feature_effects import PairActs
from circuits.discovery.batching import GIB, DiscoveryRun
from circuits.prompts.dataset import PromptSet
from sae._progress import ProgressBar
from sae.model.sites import Site

FIELDS = ("example", "position", "feature", "value")


@dataclass(frozen=True)
class EdgeCache:
    """What the edges would else compute again, on the CPU."""

    states: ActivationPair  # clean and patch activations only of sites whose features are not in `ends`
    ends: dict[Site, EdgeInputs]

    @staticmethod
    def of(states: ActivationPair, ends: Mapping[Site, EdgeInputs]) -> EdgeCache:
        def needed(activations: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
            return {site: x.cpu() for site, x in activations.items() if site not in ends or not ends[site].codes}

        states = replace(states, clean=needed(states.clean), patch=needed(states.patch), gradients=None)
        return EdgeCache(states, {site: found.to("cpu") for site, found in ends.items()})

    @property
    def n_bytes(self) -> int:
        activations = [*self.states.clean.values(), *self.states.patch.values()]
        size = sum(x.numel() * x.element_size() for x in activations)
        return size + sum(found.n_bytes for found in self.ends.values())


@dataclass(frozen=True)
class NodePassResult:
    """What the node pass found of one batch, on the CPU."""

    effects: dict[Site, SiteEffects]
    """Examples are numbered over all prompts."""
    gradients: dict[Site, Tensor]
    """[B, S, d] per site."""
    totals: dict[Site, Tensor]
    """m(the site alone patched) - m(clean), [B] per site."""
    path_nodes: dict[Site, float]
    """Points of the path a prompt took, per site."""
    m_clean: Tensor
    """[B]."""
    m_patch: Tensor | None
    """[B]."""
    kept: EdgeCache | None
    """As far as the memory budget goes."""

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, for a file."""
        named: dict[str, Any] = {"m_clean": self.m_clean, "m_patch": self.m_patch}
        for site, effects in self.effects.items():
            named[f"n_features/{site}"] = torch.tensor(effects.n_features)
            named |= {f"effects/{site}/{name}": getattr(effects, name) for name in FIELDS}
        for name in ("gradients", "totals"):
            named |= {f"{name}/{site}": x for site, x in getattr(self, name).items()}
        named |= {f"path_nodes/{site}": torch.tensor(n, dtype=torch.float64) for site, n in self.path_nodes.items()}
        if self.kept is not None:
            states, ends = self.kept.states, self.kept.ends
            named["last_layer"] = None if states.last_layer is None else torch.tensor(states.last_layer)
            for end in ("clean", "patch"):
                named |= {f"kept/{end}/{site}": x for site, x in getattr(states, end).items()}
            for site, found in ends.items():
                named |= {f"error_delta/{site}": found.error_delta, f"error_cotangent/{site}": found.error_cotangent}
                named |= {
                    f"codes/{site}/{name}": x for name, x in (found.codes._asdict() if found.codes else {}).items()
                }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def copied(self, prompts: PromptSet) -> NodePassResult:
        """The same in memory of its own."""
        return NodePassResult.of({name: x.clone() for name, x in self.tensors().items()}, prompts)

    @staticmethod
    def of(named: Mapping[str, Tensor], prompts: PromptSet) -> NodePassResult:
        """What `tensors` gave, for the prompts of the batch."""

        def by_site(name: str) -> dict[Site, Tensor]:
            found = {key: x for key, x in named.items() if key.startswith(f"{name}/")}
            return dict(sorted((Site.parse(key.removeprefix(f"{name}/")), x) for key, x in found.items()))

        effects = {
            site: SiteEffects(int(n), *(named[f"effects/{site}/{name}"] for name in FIELDS))
            for site, n in by_site("n_features").items()
        }
        ends = {}
        for site, delta in by_site("error_delta").items():
            codes = [named.get(f"codes/{site}/{name}") for name in PairActs._fields]
            whole = PairActs(*(x for x in codes if x is not None)) if codes[0] is not None else None
            ends[site] = EdgeInputs(delta, named[f"error_cotangent/{site}"], whole)
        m_clean, m_patch = named["m_clean"], named.get("m_patch")
        last = int(named["last_layer"]) if "last_layer" in named else None
        states = ActivationPair(
            prompts, by_site("kept/clean"), by_site("kept/patch"), m_patch is None, m_clean, m_patch, last
        )
        return NodePassResult(
            effects, by_site("gradients"), by_site("totals"), {s: float(n) for s, n in by_site("path_nodes").items()},
            m_clean, m_patch, EdgeCache(states, ends) if ends else None,
        )  # fmt: skip


def node_pass(work: DiscoveryRun) -> list[NodePassResult]:
    """What there is of every batch, in the order of `DiscoveryRun.batches`."""
    indices = work.batches()
    found: dict[int, NodePassResult] = {}
    for number, index in enumerate(indices):
        if work.files is not None and (known := work.files.get(f"nodes-{number:04}")) is not None:
            found[number] = NodePassResult.of(known, work.prompts[index])
    budget = work.options.memory * GIB - sum(batch.kept.n_bytes for batch in found.values() if batch.kept)
    if any(batch.kept is None for batch in found.values()):
        budget = -1.0  # it was used up before
    method, open_ = work.options.method, [number for number in range(len(indices)) if number not in found]
    with ProgressBar(
        total=len(indices) * len(work.sites), initial=len(found) * len(work.sites), desc=f"nodes ({method})",
        unit="site", disable=not work.progress,
    ) as bar:  # fmt: skip
        for numbers in work.rounds(open_):
            for number, batch in zip(numbers, _round(work, [indices[n] for n in numbers], bar), strict=True):
                budget -= batch.kept.n_bytes if batch.kept else 0
                batch = batch if budget >= 0 else replace(batch, kept=None)
                if work.files is not None:
                    name = f"nodes-{number:04}"
                    work.files.put(name, batch.tensors())
                    batch = NodePassResult.of(work.files.get(name) or {}, work.prompts[indices[number]])
                found[number] = batch
    return [found[number] for number in range(len(indices))]


def _round(work: DiscoveryRun, indices: Sequence[Tensor], bar: ProgressBar) -> list[NodePassResult]:
    """The node effects of the batches of one round."""
    options = work.options
    batches = [
        capture_activations(
            work.model, work.saes, work.prompts[index], work.metric, sites=work.sites,
            gradient=options.method in GRADIENT_AT_CLEAN,
        )
        for index in indices
    ]  # fmt: skip
    how = AttributionOptions(
        method=options.method, rule=options.rule, steps=options.steps, residual=options.residual,
        aggregation=options.aggregation, max_rows=work.rows,
    )  # fmt: skip
    results = attribute_batches(
        work.model, work.saes, batches, work.metric, how, sites=work.sites,
        ends=options.edge_active if options.edge_nodes else None, progress=lambda site: bar.update(),
    )  # fmt: skip
    return [
        NodePassResult(
            effects={site: result.effects[site].relabel_examples(index) for site in work.sites},
            gradients={site: g.detach().cpu() for site, g in result.gradients.items()},
            totals={site: total.cpu() for site, total in result.site_totals.items()},
            path_nodes=result.path_nodes,
            m_clean=states.m_clean.cpu(),
            m_patch=None if states.m_patch is None else states.m_patch.cpu(),
            kept=EdgeCache.of(states, result.ends) if result.ends else None,
        )
        for index, states, result in zip(indices, batches, results, strict=True)
    ]
