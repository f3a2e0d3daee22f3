"""What a discovery will take, in memory and time, before it begins.

1. Passes are counted, per prompt and in units of the whole model: one that resumes at a site counts the sublayers
   (attention, MLP) it runs as a share of all; a lane of the cut graph counts the sublayers between a site and the
   cuts before it.
2. Memory is the sum of parts whose shapes are known, each with the name of the option it follows.
3. Time comes from a few prompts: one forward pass, one forward and backward pass and the effects of one site are timed
   and multiplied. Reading streamed autoencoders is timed once.

What is not known before: how many passes an adaptive rule takes (four a site are assumed), how many features differ
between the prompts (those of the timed site are taken for all), and how the edge nodes are spread (evenly, it is
assumed).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from circuits.attribution import GRADIENT_AT_CLEAN, capture_activations
from circuits.attribution.attribution_patching import attribution_patching
from circuits.attribution.effects import CHUNK_BYTES, SiteEffects
from circuits.attribution.feature_effects import contract
from circuits.discovery.batching import (
    GIB,
    MOST_ROWS,
    backward_bytes,
    batches_per_round,
    lanes_rows,
    max_rows,
    state_bytes,
)
from circuits.discovery.options import DiscoverOptions
from circuits.metrics.metrics import get_metric, prepare
from circuits.metrics.probe import read_by, visible_sites
from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.model.language_model import LanguageModel
from sae.model.sites import Site, select_sites
from sae.saes import SAEs, as_saes, free_memory

T = TypeVar("T")

TIMED_PROMPTS = 4
ADAPTIVE_NODES = 4
BYTES_PER_ENTRY = 16
"""Of an effect: example, position, feature and value."""


@dataclass(frozen=True)
class Passes:
    """Passes of one prompt through the model, in units of the whole model."""

    forward: float
    """Without a backward pass."""
    backward: float
    """Forward and backward."""
    edge_forward: float
    """Copies of the prompt in the cut forward pass."""
    edge_backward: float
    """Backward passes through segments of the cut graph, added up."""


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a discovery."""

    memory: dict[str, int]
    """Bytes by what takes them."""
    on_disk: int
    """Bytes of finished batches in circuit/partial while it runs."""
    free: int | None
    """Bytes that can be had beside what model and autoencoders take already; None where nobody says."""
    seconds: dict[str, float]
    """Seconds by what takes them."""
    passes: Passes
    """Passes of a prompt through the model."""
    reads: int
    """Times an autoencoder is read from disk."""
    advice: list[str]
    """What to change where the memory does not suffice."""

    @property
    def peak(self) -> int:
        """Bytes in all."""
        return sum(self.memory.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "memory_bytes": self.memory,
            "peak_bytes": self.peak,
            "disk_bytes": self.on_disk,
            "free_bytes": self.free,
            "seconds": self.seconds,
            "total_seconds": sum(self.seconds.values()),
            "passes_per_prompt": asdict(self.passes),
            "autoencoder_reads": self.reads,
            "advice": self.advice,
        }

    def text(self) -> str:
        """A few lines for the terminal."""
        parts = ", ".join(f"{name} {_size(n)}" for name, n in self.memory.items() if n >= 2**20)
        times = ", ".join(f"{name} {_span(s)}" for name, s in self.seconds.items() if s >= 1)
        free = "" if self.free is None else f"; free beside model and autoencoders: {_size(self.free)}"
        lines = [
            f"estimated memory: {_size(self.peak)} ({parts}){free}",
            f"estimated time: {_span(sum(self.seconds.values()))}" + (f" ({times})" if times else ""),
            f"estimated disk: {_size(self.on_disk)} of finished batches while it runs",
        ]
        return "\n".join([*lines, *self.advice])


def estimate_discovery(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    prompts: PromptSet,
    options: DiscoverOptions,
    *,
    files: bool = True,
) -> Estimate:
    """Time a few prompts and count the rest; files: whether finished batches go to disk, as `sfc discover` has it."""
    m = get_metric(options.metric)
    saes = as_saes(saes)
    sites, model = visible_sites(m, model, select_sites(options.sites, list(saes))), read_by(model, m)
    n_positions, n_prompts = prompts.clean.n_positions, len(prompts)
    rows = max_rows(model, n_positions, memory=options.memory)
    timed = _Timed.of(model, saes, prompts, options, sites)
    batch = min(rows, MOST_ROWS, n_prompts)
    n_batches = -(-n_prompts // batch)
    lanes = max(1, lanes_rows(rows, n_positions, model.device) // batch)
    nodes_per_site = options.edge_nodes / len(sites)
    passes = count_passes(
        model, sites, options, paired=prompts.paired, lanes=min(lanes, max(1, round(nodes_per_site))),
        rows_of_exact=timed.entries,
    )  # fmt: skip
    per_round = batches_per_round(model, saes, prompts, sites, rows, memory=options.memory)
    n_rounds = -(-n_batches // per_round)
    reads = _reads(saes, sites, options, rounds=n_rounds, n_batches=n_batches, layers=model.n_layers)
    memory = memory_parts(
        model, saes, sites, options, n_positions=n_positions, n_prompts=n_prompts,
        batch=min(n_prompts, batch * per_round), entries=timed.entries,
    )  # fmt: skip
    seconds = {
        "node passes": n_prompts * (passes.forward * timed.forward + passes.backward * timed.both),
        "effects": n_prompts * len(sites) * timed.effects,
        "edges": n_prompts
        * (passes.edge_forward * timed.forward + passes.edge_backward * max(timed.both - timed.forward, timed.forward)),
        "reading autoencoders": reads * timed.read,
    }
    on_disk = memory["effects"] + memory["gradients for edges"] + memory["kept for edges"] if files else 0
    if files:  # they are mapped from disk where they are used
        memory |= {"gradients for edges": 0, "kept for edges": 0}
    held = memory["model"] + memory["autoencoders"]
    free = free_memory(model.device)
    return Estimate(
        memory, on_disk, free, seconds, passes, reads, _advice(memory, sum(memory.values()) - held, free, options, saes)
    )


# ------------------------------------------------------------------------------------------ passes


def count_passes(
    model: LanguageModel,
    sites: Sequence[Site],
    options: DiscoverOptions,
    *,
    paired: bool = True,
    lanes: int = 1,
    rows_of_exact: float = 0.0,
) -> Passes:
    """Passes per prompt: of both ends, of the method, of the sites patched whole, and of the edges.

    lanes: copies of the prompts in the cut forward pass; rows_of_exact: nodes of a site and prompt for `exact`.
    """
    method = options.method
    shares = sum(resumed_share(model, sites, site) for site in sites)
    at_clean = method in GRADIENT_AT_CLEAN
    forward = (0 if at_clean else 1) + (1 if paired else 0) + shares
    backward = 1.0 if at_clean else 0.0
    if method == "ig":
        backward += options.steps * shares
    elif method == "ig-adaptive":
        backward += ADAPTIVE_NODES * shares
    elif method == "ig-inputs":
        backward += options.steps
    elif method == "relp":
        backward += 1
    elif method == "graddrop":
        backward += model.n_layers
    elif method == "exact":
        forward += rows_of_exact * shares
    if not options.edge_nodes:
        return Passes(forward, backward, 0, 0)
    nodes = options.edge_nodes / len(sites)
    pulls = -(-nodes // lanes) * lanes
    return Passes(forward, backward, lanes, pulls * sum(cut_share(model, sites, site) for site in sites[1:]))


def _sublayers(model: LanguageModel) -> list[tuple[Site, int]]:
    return [(Site(kind, layer), layer) for layer in range(model.n_layers) for kind in ("attn", "mlp")]


def resumed_share(model: LanguageModel, sites: Sequence[Site], site: Site) -> float:
    """Share of the sublayers that run when the forward pass resumes at a site, from the activations of `sites`."""
    last = _last_block(sites, site, inclusive=True)
    given = {known for known in sites if known <= site}
    if model.parallel_blocks and site.kind == "attn":  # the MLP beside it is given as well
        given |= {Site("mlp", site.layer)} & set(sites)
    sublayers = _sublayers(model)
    running = [known for known, layer in sublayers if layer > last and known not in given]
    return len(running) / len(sublayers)


def cut_share(model: LanguageModel, sites: Sequence[Site], site: Site) -> float:
    """Share of the sublayers between a site and the cuts before it."""
    last = _last_block(sites, site, inclusive=False)
    sublayers = _sublayers(model)
    uncut = [known for known, layer in sublayers if last < layer and known <= site and known not in sites]
    return (len(uncut) + (site.kind in ("attn", "mlp"))) / len(sublayers)


def _last_block(sites: Sequence[Site], site: Site, *, inclusive: bool) -> int:
    """The last block whose output is among the sites before this one, or is this one; -1 for none."""
    blocks = [known for known in sites if known.kind == "resid" and (known < site or (inclusive and known == site))]
    return max((known.layer for known in blocks if known.layer is not None), default=-1)


def _reads(
    saes: SAEs, sites: Sequence[Site], options: DiscoverOptions, *, rounds: int, n_batches: int, layers: int
) -> int:
    """Readings of streamed autoencoders: those that stay are read once, the others once a round of each pass."""
    if not saes.is_lazy:
        return 0
    passes = (1 if options.edge_nodes else 0) * rounds + rounds
    if options.method == "graddrop":
        passes += layers * n_batches
    chosen = saes.subset(sites)
    return chosen.n_staying + passes * (len(chosen) - chosen.n_staying)


# ------------------------------------------------------------------------------------------ memory


def memory_parts(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    sites: Sequence[Site],
    options: DiscoverOptions,
    *,
    n_positions: int,
    n_prompts: int,
    batch: int,
    entries: float,
) -> dict[str, int]:
    """Bytes by what takes them.

    batch: prompts whose activations are held at once; entries: effects of a prompt and site.
    """
    saes = as_saes(saes)
    rows = _rows_at_once(model, options, n_positions=n_positions, n_prompts=n_prompts)
    activations = state_bytes(model, sites, n_positions)
    wide = max(saes.config(site).d_model for site in sites)
    # error change and cotangent, float32
    ends = 2 * n_positions * sum(4 * model.widths[site] for site in sites) if options.edge_nodes else 0
    return {
        "model": sum(parameter.numel() * parameter.element_size() for parameter in model.hf.parameters()),
        "autoencoders": saes_bytes(saes, sites),
        "backward pass": rows * backward_bytes(model, n_positions),
        "activations and gradients": batch * (3 * activations + ends),
        "encoding": 4 * CHUNK_BYTES + 8 * wide * batch * n_positions,
        "gradients for edges": n_prompts * activations,
        "kept for edges": int(min(options.memory * GIB, n_prompts * (2 * activations + ends))) if ends else 0,
        "effects": int(n_prompts * len(sites) * entries * BYTES_PER_ENTRY),
    }


def _rows_at_once(model: LanguageModel, options: DiscoverOptions, *, n_positions: int, n_prompts: int) -> int:
    """Prompts, and copies of them, that go through the model together at most: in the method, or as lanes of edges."""
    most = max_rows(model, n_positions, memory=options.memory)
    batch = min(most, MOST_ROWS, n_prompts)
    points = {"ig": options.steps, "ig-inputs": options.steps, "ig-adaptive": ADAPTIVE_NODES}.get(options.method, 1)
    rows = most if options.method == "exact" else max(1, min(most // batch, points)) * batch
    lanes = max(1, min(lanes_rows(most, n_positions, model.device) // batch, options.edge_nodes))
    return max(rows, lanes * batch)


def saes_bytes(saes: SAEs, sites: Sequence[Site]) -> int:
    """What is held of the autoencoders at once."""
    total = sum(saes.config(site).n_bytes for site in sites)
    return total if saes.budget is None else min(total, saes.budget)


def _advice(memory: Mapping[str, int], needed: int, free: int | None, options: DiscoverOptions, saes) -> list[str]:
    """What helps where more is needed than is free, largest first."""
    if free is None or needed <= free:
        return []
    helps = {
        "backward pass": f"--memory below {options.memory:g}",
        "activations and gradients": f"--memory below {options.memory:g}",
        "kept for edges": f"--memory below {options.memory:g}",
        "gradients for edges": "fewer --examples or --sites",
        "effects": "fewer --examples, or --method attrib",
    }
    largest = sorted((name for name in helps if memory[name]), key=lambda name: -memory[name])
    ways = list(dict.fromkeys(helps[name] for name in largest[:3]))
    if memory["autoencoders"] > free / 2:
        held = memory["autoencoders"] / GIB
        ways.insert(0, f"--sae-memory below {held:.2g}")
    return [
        f"this needs {_size(needed)} beside model and autoencoders, and {_size(free)} are free: try {', '.join(ways)}"
    ]


# ------------------------------------------------------------------------------------------ time


@dataclass(frozen=True)
class _Timed:
    """Seconds of a prompt, and what was seen of it."""

    forward: float
    both: float  # forward and backward
    effects: float  # of one site
    read: float  # one autoencoder, if streamed
    entries: float  # effects of a site

    @staticmethod
    def of(
        model: LanguageModel,
        saes: Mapping[Site, SparseAutoencoder],
        prompts: PromptSet,
        options: DiscoverOptions,
        sites: Sequence[Site],
    ) -> _Timed:
        """The longest prompts, as many as are few and fit."""
        rows = max_rows(model, prompts.clean.n_positions, memory=options.memory)
        longest = prompts.clean.lengths.argsort(descending=True)[: min(TIMED_PROMPTS, rows)]
        metric = get_metric(options.metric)
        few = prepare(prompts[longest], model, metric)
        n, site = len(few), sites[len(sites) // 2]
        states = capture_activations(model, saes, few, metric, sites=sites)  # warms up, too
        forward, _ = _seconds(lambda: model.run(few.clean, capture=sites, last_only=True), model.device)
        both, gradients = _seconds(lambda: attribution_patching(model, states, metric, sites=sites), model.device)
        read, sae = _seconds(lambda: saes[site], model.device)
        ends = options.edge_active if options.edge_nodes else None
        found: SiteEffects
        effects, (found, _) = _seconds(
            lambda: contract(sae, states, gradients[site], site=site, active=ends), model.device
        )
        return _Timed(forward / n, both / n, effects / n, read, len(found.value) / n)


def _seconds(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds that something takes, and what it gives."""
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - start, result


def _size(n: float) -> str:
    return f"{n / GIB:.2f} GiB" if n >= GIB / 10 else f"{n / 2**20:.0f} MiB"


def _span(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
