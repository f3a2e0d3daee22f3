"""Estimate the memory and time of a discovery before it begins, by running one of its batches and multiplying.

1. The batch with the most tokens goes through the node pass and the edge pass twice: once to count the tensors that
   live at once, once for the time.
2. Time is multiplied by the share of all tokens that the batch holds; reading lazy autoencoders is part of it.
3. To the batch's peak come the model, the autoencoders, and what all batches leave behind between the passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from circuits._tensors import flatten
from circuits.attribution.node_effects import Attribution
from circuits.attribution.nodes import select_nodes
from circuits.discovery.batching import GIB, DiscoveryRun
from circuits.discovery.edge_pass import edge_pass
from circuits.discovery.node_pass import all_effects, node_pass
from circuits.options import DiscoverOptions
from circuits.prompts.dataset import PromptSet
from sae._peak_memory import peak_memory
from sae._run.processes import Processes, current
from sae._units import duration, seconds_of, size
from sae.autoencoder import SparseAutoencoder
from sae.model.device_map import bytes_at_home
from sae.model.forward import with_gradients
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.saes import free_memory


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
    reads: int
    """Times an autoencoder is read from disk."""
    advice: list[str]
    """Options to change where the memory does not suffice."""
    n_processes: int = 1
    """Processes that share the batches; the memory is that of each."""

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
            "autoencoder_reads": self.reads,
            "advice": self.advice,
            "processes": self.n_processes,
        }

    def text(self) -> str:
        """A few lines for the terminal."""
        sizes = ", ".join(f"{name} {size(n)}" for name, n in self.memory.items() if n >= 2**20)
        times = ", ".join(f"{name} {duration(s)}" for name, s in self.seconds.items() if s >= 1)
        free = "" if self.free is None else f"; free beside model and autoencoders: {size(self.free)}"
        each = "" if self.n_processes == 1 else f" in each of {self.n_processes} processes"
        lines = [
            f"estimated memory{each}: {size(self.peak)} ({sizes}){free}",
            f"estimated time: {duration(sum(self.seconds.values()))}" + (f" ({times})" if times else ""),
            f"estimated disk: {size(self.on_disk)} of finished batches while it runs",
        ]
        return "\n".join([*lines, *self.advice])


@with_gradients
def estimate_discovery(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    prompts: PromptSet,
    options: DiscoverOptions,
    *,
    files: bool = True,
) -> Estimate:
    """Run one batch of a discovery, in each process where there are several, and multiply.

    Args:
        model, saes, prompts, options: as in `discover`.
        files: whether finished batches go to disk, as `sfc discover` has it.
    """
    run = DiscoveryRun.of(model, saes, prompts, options, progress=False)
    setting, prompts = run.setting, run.prompts
    n_tokens = [len(index) * int(prompts.clean.lengths[index].max()) for index in run.batches()]
    largest = max(range(len(n_tokens)), key=n_tokens.__getitem__)
    one = DiscoveryRun(setting, prompts[run.batches()[largest]], options, progress=False)

    results: list[Attribution] = []
    peak = peak_memory(lambda: results.extend(_one_batch(one)[0]), model.device)
    n_reads = setting.saes.n_reads
    _, seconds = _one_batch(one)
    n_rounds = len(list(run.rounds(range(len(n_tokens)))))
    staying = setting.saes.n_staying if setting.saes.is_lazy else 0
    reads = (setting.saes.n_reads - n_reads) * n_rounds + staying

    left = _left_behind(results)
    if model.device.type == "cpu":  # it was counted among the tensors of the batch
        peak = max(0, peak - sum(left.values()))
    scale = sum(n_tokens) / n_tokens[largest]
    left = {name: int(n * scale) for name, n in left.items()}
    left["kept for edges"] = min(left["kept for edges"], int(options.memory * GIB))
    on_disk = sum(left.values()) if files else 0
    left["effects"] *= 1 if files else 2  # by batch, and all together
    if files:  # they are mapped from disk where they are used
        left |= {"gradients for edges": 0, "kept for edges": 0}
    memory = {
        "model": 0 if model.server else bytes_at_home(model.hf),
        "autoencoders": setting.saes.n_bytes,
        "one batch": peak,
        **left,
    }
    processes = current() if files else Processes()
    shares = processes.gathered((memory, seconds))
    memory = max((of_process for of_process, _ in shares), key=lambda sizes: sum(sizes.values()))
    turns = -(-len(n_tokens) // processes.size) / len(n_tokens)  # batches of the busiest process, of all
    seconds = {name: max(s[name] for _, s in shares) * scale * turns for name in seconds}
    free = free_memory(model.device)
    free = free if free is None or model.device.type == "cuda" else free // processes.n_local
    return Estimate(memory, on_disk, free, seconds, reads, _advice(memory, free, options), processes.size)


def _one_batch(run: DiscoveryRun) -> tuple[list[Attribution], dict[str, float]]:
    """Both passes of the only batch of a run: the node pass's result, and the seconds of each."""
    device, options, start = run.setting.model.device, run.options, seconds_of(run.setting.model.device)
    batches = node_pass(run)
    _, nodes = all_effects(run, batches)
    middle = seconds_of(device)
    if options.edge_nodes:
        edge_pass(run, batches, select_nodes(nodes, top=options.edge_nodes))
    end = seconds_of(device)
    return batches, {"nodes": middle - start, "edges": end - middle}


def _left_behind(batches: list[Attribution]) -> dict[str, int]:
    """Bytes that batches leave between the passes, by what they are."""
    tensors = [entry for batch in batches for entry in flatten(batch).items()]
    n_bytes = {"effects": 0, "gradients for edges": 0, "kept for edges": 0}
    names = {"effects": "effects", "gradients": "gradients for edges"}
    for name, tensor in tensors:
        n_bytes[names.get(name.split("/")[0], "kept for edges")] += tensor.numel() * tensor.element_size()
    return n_bytes


def _advice(memory: Mapping[str, int], free: int | None, options: DiscoverOptions) -> list[str]:
    """Options that help where more is needed than is free, the most helpful first."""
    needed = sum(memory.values()) - memory["model"] - memory["autoencoders"]
    if free is None or needed <= free:
        return []
    helps = {
        "one batch": f"--memory below {options.memory:g}",
        "kept for edges": f"--memory below {options.memory:g}",
        "gradients for edges": "fewer --examples or --sites",
        "effects": "fewer --examples, or --method attrib",
    }
    ways = list(dict.fromkeys(helps[name] for name in sorted(helps, key=lambda name: -memory[name]) if memory[name]))
    if memory["autoencoders"] > free / 2:
        ways.insert(0, f"--sae-memory below {memory['autoencoders'] / GIB:.2g}")
    return [
        f"this needs {size(needed)} beside model and autoencoders, and {size(free)} are free: try {', '.join(ways)}"
    ]
