"""Training steps of other packages, run on request in the environment they are installed in.

`bench_sae_step` starts this file with that interpreter and talks to it in lines of JSON: sizes first, then
{"build": step}, {"run": n} for the seconds of n steps, {"peak": 0} for the bytes they took at most, {"drop": 0}.
It imports torch and the package, nothing of ours; the benchmark in turn uses its clock, allocator and memory functions,
so that both sides are measured alike. Steps are those in the middle of training, by each package's own code:

- dictionary_learning: `update` of its trainers;
- sae_lens: `SAETrainer.step`;
- sparsify: the calls of its `Trainer.fit` around one `SparseCoder`, with its Adam.

`+auxk` has half of the features declared dead. Under --dtype bf16 steps run in autocast, as the packages' own loops do.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

Step = Callable[[], object]
LONG_AGO = 10**9
STEP = 2000
"""A step after all warm-ups."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


class Sizes(NamedTuple):
    """What is trained and how; the same for all."""

    width: int
    features: int
    batch: int
    k: int
    device: str = "cpu"
    dtype: str = "fp32"
    threads: int = 2
    clock: str = "wall"
    malloc: str = "reuse"

    def batches(self) -> Callable[[], torch.Tensor]:
        """Gives random batches [batch, width] in turn."""
        x, turn = torch.randn(8, self.batch, self.width, device=self.device), iter(range(10**9))
        return lambda: x[next(turn) % 8]

    def autocast(self) -> Any:
        """The context that a step runs in."""
        return torch.autocast(self.device, torch.bfloat16) if self.dtype == "bf16" else nullcontext()


def prepare(sizes: Sizes) -> None:
    """Threads, seed, and an allocator that keeps freed blocks of any size (glibc; without effect elsewhere)."""
    torch.set_num_threads(sizes.threads)
    torch.manual_seed(0)
    torch.randn(256, 256, device=sizes.device) @ torch.randn(256, 256, device=sizes.device)  # libraries load
    if sizes.malloc == "reuse" and hasattr(ctypes.CDLL(None), "mallopt"):  # as circuits.cli.main
        mallopt = ctypes.CDLL(None).mallopt
        _ = mallopt(M_MMAP_THRESHOLD, 2**28) or mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**30)


def seconds(step: Step, n: int, sizes: Sizes) -> list[float]:
    """The time of each of n steps; `cpu` is that of the calling thread, for machines where others work."""
    clock = time.perf_counter if sizes.clock == "wall" else time.thread_time
    times = []
    for _ in range(n):
        synchronize(sizes)
        begin = clock()
        step()
        synchronize(sizes)
        times.append(clock() - begin)
    return times


def synchronize(sizes: Sizes) -> None:
    """Waits until the device has done all that was asked of it."""
    if sizes.device.startswith("cuda"):
        torch.cuda.synchronize()


def memory_now(sizes: Sizes) -> int | None:
    """Bytes in use, after what is free was given back; the peak starts over. None where it cannot be known."""
    gc.collect()
    if sizes.device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if not Path("/proc/self/clear_refs").exists():
        return None
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def memory_peak(sizes: Sizes) -> int | None:
    """The most bytes in use since `memory_now`."""
    if sizes.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") if Path("/proc/self/clear_refs").exists() else None


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def dictionary_learning(s: Sizes) -> dict[str, Callable[[], Step]]:
    """Its trainers by our names."""
    import_module("dictionary_learning.trainers")
    trainers: dict[str, tuple[str, str, dict[str, Any]]] = {
        "topk": ("top_k", "TopKTrainer", {"k": s.k}),
        "batchtopk": ("batch_top_k", "BatchTopKTrainer", {"k": s.k}),
        "matryoshka": (
            "matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer",
            {"k": s.k, "group_fractions": [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]},
        ),
        "jumprelu": ("jumprelu", "JumpReluTrainer", {"target_l0": s.k}),
        "relu": ("standard", "StandardTrainerAprilUpdate", {}),
        "relu_unit": ("standard", "StandardTrainer", {}),
        "p_anneal": ("p_anneal", "PAnnealTrainer", {}),
        "gated": ("gdm", "GatedSAETrainer", {}),
    }  # fmt: skip

    def build(name: str) -> Step:
        kind, _, dead = name.partition("+")
        module, trainer_class, own = trainers[kind]
        trainer = getattr(import_module(f"dictionary_learning.trainers.{module}"), trainer_class)(
            steps=10_000, activation_dim=s.width, dict_size=s.features, layer=0, lm_name="none", device=s.device, **own
        )
        batch = s.batches()

        def step() -> None:
            if dead:
                trainer.num_tokens_since_fired[::2] = LONG_AGO
            with s.autocast():
                trainer.update(STEP, batch())

        return step

    return {name: lambda name=name: build(name) for name in (*trainers, "topk+auxk")}  # type: ignore[misc]


def sae_lens(s: Sizes) -> dict[str, Callable[[], Step]]:
    """Its training autoencoders by our names."""
    import sae_lens as package
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    widths = [s.features // 16, s.features // 8, s.features // 4, s.features // 2, s.features]
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "topk": ("TopK", {"k": s.k}),
        "batchtopk": ("BatchTopK", {"k": s.k}),
        "matryoshka": ("MatryoshkaBatchTopK", {"k": s.k, "matryoshka_widths": widths}),
        "jumprelu": ("JumpReLU", {}),
        "relu": ("Standard", {}),
        "gated": ("Gated", {}),
    }

    def build(name: str) -> Step:
        kind, _, dead = name.partition("+")
        class_name, own = kinds[kind]
        config = getattr(package, f"{class_name}TrainingSAEConfig")(
            d_in=s.width, d_sae=s.features, device=s.device, **own
        )
        trainer_config = SAETrainerConfig(
            total_training_samples=10_000 * s.batch, train_batch_size_samples=s.batch, device=s.device,
            lr_end=3e-4, autocast=s.dtype == "bf16",
        )  # fmt: skip
        trainer = SAETrainer(trainer_config, getattr(package, f"{class_name}TrainingSAE")(config), iter(()))
        batch = s.batches()

        def step() -> None:
            if dead:
                trainer.n_forward_passes_since_fired[::2] = LONG_AGO
            trainer.step(batch())
            trainer.n_training_steps += 1

        return step

    return {name: lambda name=name: build(name) for name in (*kinds, "topk+auxk")}  # type: ignore[misc]


def sparsify(s: Sizes) -> dict[str, Callable[[], Step]]:
    """TopK with and without its AuxK and Multi-TopK losses."""
    from sparsify import SparseCoder, SparseCoderConfig

    def build(*, dead: bool = False, multi: bool = False) -> Step:
        config = SparseCoderConfig(num_latents=s.features, k=s.k, multi_topk=multi)
        coder = SparseCoder(s.width, config, device=s.device)
        optimizer = torch.optim.Adam(coder.parameters(), lr=1e-4)
        silent = torch.zeros(s.features, dtype=torch.long, device=s.device)
        batch = s.batches()

        def step() -> None:
            if dead:
                silent[::2] = LONG_AGO
            fired = torch.zeros_like(silent, dtype=torch.bool)
            coder.set_decoder_norm_to_unit_norm()
            out = coder(batch(), dead_mask=silent > 10_000_000 if dead else None)
            fired[out.latent_indices.flatten()] = True
            out.fvu.item()
            (out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8).backward()
            coder.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
            optimizer.zero_grad()
            silent.add_(s.batch)
            silent[fired] = 0

        return step

    return {"topk": build, "topk+auxk": lambda: build(dead=True), "multi_topk": lambda: build(multi=True)}


PACKAGES = {
    "dictionary_learning": ("dictionary-learning", dictionary_learning),
    "sae_lens": ("sae-lens", sae_lens),
    "sparsify": ("eai-sparsify", sparsify),
}
"""By import name: the name on the package index, and its steps."""


def serve(package: str) -> None:
    """Answers requests until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print must not disturb the answers
    distribution, steps_of = PACKAGES[package]
    sizes = Sizes(**json.loads(sys.stdin.readline()))
    prepare(sizes)
    steps, step, before = steps_of(sizes), None, None
    answer: Any = {"version": version(distribution), "torch": torch.__version__, "steps": list(steps)}
    while True:
        print(json.dumps(answer), file=out, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        ((request, value),) = json.loads(line).items()
        answer = None
        if request == "build":
            before = memory_now(sizes)
            step = steps[value]()
        elif request == "run":
            assert step is not None
            answer = seconds(step, value, sizes)
        elif request == "peak":
            peak = memory_peak(sizes)
            answer = None if peak is None or before is None else peak - before
        elif request == "drop":
            step = None
            memory_now(sizes)


if __name__ == "__main__":
    serve(sys.argv[1])
