"""The two passes of a discovery over all prompts, batch by batch: effects of nodes, then edges.

1. Prompts are sorted by length and cut into batches whose forward and backward pass stays within the memory budget.
2. Node pass: activations, gradients, sparse effects. Batches go in rounds: all gradients of a round first, then site
   by site the effects of all its batches, so that an autoencoder is read once a round where they are streamed
   (`sae.saes`). A round is one batch where nothing is streamed.
3. Edge pass: likewise what edges need of every site, then the cut graph of each batch.
4. What was found of a batch goes to the `ResumeFolder`, if there are any, and is taken from there where an interrupted
   discovery goes on. Everything the edges need of the node pass is among it, so that they come out the same to the bit.

Between the passes lie the sparse effects, one gradient [B, S, d] per site, and within the memory budget what the edges
would else compute again: on the CPU, or on disk where there are files.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from circuits.attribution import (
    GRADIENT_AT_CLEAN,
    ActivationPair,
    AttributionOptions,
    EdgeInputs,
    SiteEffects,
    attribute_batches,
    capture_activations,
)
from circuits.attribution.edges import Edges, edge_effects, select_ends
from circuits.attribution.feature_effects import PairActs
from circuits.attribution.nodes import Nodes, count
from circuits.discovery.options import DiscoverOptions
from circuits.discovery.resume import ResumeFolder
from circuits.metrics.metrics import Metric
from circuits.metrics.probe import ReadModel
from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.saes import as_saes

GIB = 2**30
LOGIT_COPIES = 4
"""Logits, their gradient, and two tensors of their size that a metric makes of them."""
MOST_ROWS = 64
"""Prompts of a batch at most."""
LANE_TOKENS = 256
"""Tokens that fill a CPU's cores: lanes beyond them cost as much unused as in use."""
SAMPLE_BYTES = 2**28
"""Most that the edge weights of single examples take; they are kept for intervals."""
FIELDS = ("example", "position", "feature", "value")


@dataclass(frozen=True)
class DiscoveryRun:
    """What both passes work on."""

    model: LanguageModel
    saes: Mapping[Site, SparseAutoencoder]
    prompts: PromptSet
    metric: Metric
    options: DiscoverOptions
    sites: Sequence[Site]
    files: ResumeFolder | None = None
    """Where finished batches go; None keeps them in memory alone."""
    progress: bool = True

    @property
    def rows(self) -> int:
        """Prompts that go through the model at once."""
        return max_rows(self.model, self.prompts.clean.n_positions, memory=self.options.memory)

    def batches(self) -> list[torch.Tensor]:
        """The numbers of the prompts of each batch, short prompts first."""
        order = self.prompts.clean.lengths.argsort(stable=True).cpu()
        return list(order.split(max(1, min(self.rows, MOST_ROWS))))

    def rounds(self, numbers: Sequence[int]) -> Iterator[Sequence[int]]:
        """The batches that share one reading of the autoencoders."""
        step = batches_per_round(self.model, self.saes, self.prompts, self.sites, self.rows, memory=self.options.memory)
        for start in range(0, len(numbers), step):
            yield numbers[start : start + step]


def max_rows(model: LanguageModel, n_positions: int, *, memory: float) -> int:
    """Prompts of `n_positions` tokens whose forward and backward pass stays within `memory` GiB (at least 1)."""
    return max(1, int(memory * GIB / backward_bytes(model, n_positions)))


def backward_bytes(model: LanguageModel, n_positions: int) -> int:
    """What a prompt keeps for its backward pass.

    Per token and layer: about 16 d of residual stream, norms, queries, keys and values, 3 d_ff of the MLP, and the
    attention probabilities, H S; all in the model's dtype. And the logits where they are read, their gradient, and what
    a metric makes of them, which outweigh all else in a small model of a large vocabulary.
    """
    config = model.hf.config
    width = model.d_model
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    heads = getattr(config, "num_attention_heads", 1)
    per_token = model.n_layers * (16 * width + 3 * inner + heads * n_positions)
    return per_token * n_positions * model.dtype.itemsize + logit_bytes(model, n_positions)


def logit_bytes(model: LanguageModel, n_positions: int) -> int:
    """What the logits of a prompt take, in float32 and `LOGIT_COPIES` times: at the last position, or at all of them in
    a model that cannot leave the others out; nothing where a probe is read.
    """
    if isinstance(model, ReadModel):
        return 0
    last_only = "logits_to_keep" in inspect.signature(type(model.hf).forward).parameters
    return LOGIT_COPIES * 4 * model.vocab_size * (1 if last_only else n_positions)


def state_bytes(model: LanguageModel, sites: Sequence[Site], n_positions: int) -> int:
    """One activation (or gradient) of a prompt at every site."""
    return n_positions * sum(model.widths[site] for site in sites) * model.dtype.itemsize


def batches_per_round(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    prompts: PromptSet,
    sites: Sequence[Site],
    rows: int,
    *,
    memory: float,
) -> int:
    """Batches whose clean and patch activations and gradients fit in `memory` GiB; one where nothing is streamed."""
    if not as_saes(saes).is_lazy:
        return 1
    size = 3 * min(rows, MOST_ROWS, len(prompts)) * state_bytes(model, sites, prompts.clean.n_positions)
    return max(1, int(memory * GIB / size))


def lanes_rows(rows: int, n_positions: int, device: torch.device) -> int:
    """Prompts in the cut forward pass at once: the budget's, but on a CPU no more than fill its cores, since lanes that
    no node uses cost as much as those in use.
    """
    return min(rows, max(1, LANE_TOKENS // n_positions)) if device.type == "cpu" else rows


# ------------------------------------------------------------------------------------------ nodes


@dataclass(frozen=True)
class EdgeCache:
    """What the edges would else compute again, on the CPU."""

    states: ActivationPair  # clean and patch activations only of sites whose features are not in `ends`
    ends: dict[Site, EdgeInputs]

    @staticmethod
    def of(states: ActivationPair, ends: Mapping[Site, EdgeInputs]) -> EdgeCache:
        def needed(activations: Mapping[Site, torch.Tensor]) -> dict[Site, torch.Tensor]:
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
    gradients: dict[Site, torch.Tensor]
    """[B, S, d] per site."""
    totals: dict[Site, torch.Tensor]
    """m(the site alone patched) - m(clean), [B] per site."""
    path_nodes: dict[Site, float]
    """Points of the path a prompt took, per site."""
    m_clean: torch.Tensor
    """[B]."""
    m_patch: torch.Tensor | None
    """[B]."""
    kept: EdgeCache | None
    """As far as the memory budget goes."""

    def tensors(self) -> dict[str, torch.Tensor]:
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
    def of(named: Mapping[str, torch.Tensor], prompts: PromptSet) -> NodePassResult:
        """What `tensors` gave, for the prompts of the batch."""

        def by_site(name: str) -> dict[Site, torch.Tensor]:
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
    with tqdm(
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


def _round(work: DiscoveryRun, indices: Sequence[torch.Tensor], bar: tqdm) -> list[NodePassResult]:
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


# ------------------------------------------------------------------------------------------ edges


def edge_pass(work: DiscoveryRun, batches: Sequence[NodePassResult], nodes: Nodes) -> tuple[Edges, Edges]:
    """Mean edge weights over all examples, [D, U], and those of each example, [N, D, U], where they fit into
    SAMPLE_BYTES (else none).
    """
    indices = work.batches()
    total: Edges = {}
    samples: dict[tuple[Site, Site | None], list[torch.Tensor]] = {}
    with tqdm(total=len(indices), desc="edges", unit="batch", disable=not work.progress) as bar:
        for numbers in work.rounds(range(len(indices))):
            for edges in _round_edges(work, numbers, [indices[n] for n in numbers], batches, nodes):
                for pair, weights in edges.items():
                    if weights.ndim == 3:
                        samples.setdefault(pair, []).append(weights)
                        weights = weights.sum(0)
                    total[pair] = total[pair] + weights if pair in total else weights
                bar.update()
    back = torch.cat(indices).argsort()  # from the order of the batches to that of the prompts
    mean = {pair: weights / len(work.prompts) for pair, weights in total.items()}
    return mean, {pair: torch.cat(parts)[back] for pair, parts in samples.items()}


def keeps_examples(n_nodes: int, n_examples: int) -> bool:
    """Whether the weights of every example, at most n^2 / 2 edges each, fit into SAMPLE_BYTES."""
    return 4 * n_examples * n_nodes * (n_nodes + 1) / 2 <= SAMPLE_BYTES


def _round_edges(
    work: DiscoveryRun,
    numbers: Sequence[int],
    indices: Sequence[torch.Tensor],
    batches: Sequence[NodePassResult],
    nodes: Nodes,
) -> Iterator[Edges]:
    """The edges of the batches of one round, in order; those that are finished from their files."""
    known = {n: work.files.get(f"edges-{n:04}") for n in numbers} if work.files is not None else {}
    open_ = [number for number in numbers if known.get(number) is None]
    own = {  # off the disk: what is mapped lies elsewhere in a cache line, and sums end in other bits
        number: batches[number].copied(work.prompts[index]) if work.files is not None else batches[number]
        for number, index in zip(numbers, indices, strict=True)
        if number in open_
    }
    kept = {
        number: own[number].kept or _captured(work, index, nodes)
        for number, index in zip(numbers, indices, strict=True)
        if number in open_
    }
    parts = [(kept[number].states, own[number].gradients, kept[number].ends) for number in open_]
    ends = dict(zip(open_, select_ends(work.saes, parts, nodes, active=work.options.edge_active), strict=True))
    for number in numbers:
        finished = known.get(number)
        if finished is not None:
            yield _edges_of(finished)
            continue
        states = kept[number].states
        edges = edge_effects(
            work.model, work.saes, states, work.metric, own[number].gradients, nodes, selected=ends[number],
            max_rows=lanes_rows(work.rows, states.mask.shape[1], work.model.device),
            per_example=keeps_examples(count(nodes), len(work.prompts)),
        )  # fmt: skip
        if work.files is not None:
            named = {f"{up}/{down or 'metric'}": weights for (up, down), weights in edges.items()}
            work.files.put(f"edges-{number:04}", named)
        yield edges


def _captured(work: DiscoveryRun, index: torch.Tensor, nodes: Nodes) -> EdgeCache:
    """The activations of a batch of which nothing was kept."""
    return EdgeCache(
        capture_activations(work.model, work.saes, work.prompts[index], work.metric, sites=list(nodes)), {}
    )


def _edges_of(named: Mapping[str, torch.Tensor]) -> Edges:
    edges: Edges = {}
    for name, weights in named.items():
        up, down = name.split("/")
        edges[Site.parse(up), None if down == "metric" else Site.parse(down)] = weights.clone()  # see `own` above
    return edges
