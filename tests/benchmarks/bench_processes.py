"""Training by several processes beside one process: how many times faster, measured in one run.

1. torchrun starts N processes of one thread each, connected by gloo.
2. In turns, the first trains all sites while the others sleep, then all of them train together (`--parallel` says how);
   every training reads the same text from its beginning, forward passes included, and ends on disk.
3. Printed are medians over the turns: the ratio of seconds, and that of the CPU seconds of the one process to those of
   the busiest of the several, which is what the ratio of seconds would be with a free core for each.
4. With `--memory` they train together once more while the memory of every process's tensors is counted, and `stated`
   has the formula beside it, the model's weights on both sides left out. Exit status 1 if they differ by over a tenth.
   What `sfc train --estimate` would say is printed as well.

    python -m tests.benchmarks.bench_processes --processes 2
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch.distributed import run as torchrun

from sae._peak_memory import peak_memory
from sae._run import processes
from sae._run.processes import Processes
from sae.model.sites import Site
from sae.training.config import TrainConfig
from sae.training.cost import estimate_training
from sae.training.parallel import Parallel, share_sites
from sae.training.train import train_saes
from sae.training.trainer import MIN_BUFFER_TOKENS
from tests.benchmarks.gpu import random_model
from tests.benchmarks.training_memory import training_memory

TOLERANCE = 0.1
"""Largest relative difference between the memory stated and counted."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("processes", 2), ("turns", 5), ("width", 256), ("layers", 4), ("features", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--parallel", choices=("sites", "data", "features"), default="sites")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if not processes.launched():
        os.environ["OMP_NUM_THREADS"] = "1"
        words = ["--standalone", "--nproc-per-node", str(options.processes), "-m", "tests.benchmarks.bench_processes"]
        torchrun.run(torchrun.parse_args([*words, *sys.argv[1:]]))
        return
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.ERROR)
    with processes.joined("cpu") as group:
        print_ratios(options, group)


def print_ratios(options: argparse.Namespace, group: Processes) -> None:
    model, texts = random_model(options.width, options.layers, "cpu")
    config = TrainConfig(
        features=options.features, k=32, tokens=options.tokens, batch_size=options.batch, checkpoints=0,
        buffer_tokens=options.tokens // 2,
    )  # fmt: skip

    def train(parallel: Parallel | None = None, config: TrainConfig = config) -> tuple[float, float]:
        """Seconds, and the CPU seconds of this process."""
        with tempfile.TemporaryDirectory() as folder:
            run = processes.current().by_first(lambda: Path(folder, "run"))
            start, cpu = time.perf_counter(), time.process_time()
            train_saes(model, texts, config=config, out=run, progress=False, parallel=parallel)
            return time.perf_counter() - start, time.process_time() - cpu

    alone, together = [], []
    for turn in range(options.turns):
        if group.is_first:
            with patch.object(processes, "_current", Processes()):
                alone.append(train())
        group.gathered(None)  # the others sleep until then
        seconds, cpu = train(options.parallel)
        together.append((seconds, max(group.gathered(cpu))))
        if group.is_first:
            print(f"turn {turn + 1}: {alone[-1][0]:.1f} s alone, {seconds:.1f} s together", flush=True)
    if group.is_first:
        ratios = [[one / all for one, all in zip(*pair, strict=True)] for pair in zip(alone, together, strict=True)]
        wall, cpu = (statistics.median(column) for column in zip(*ratios, strict=True))
        speed = options.tokens / statistics.median(seconds for seconds, _ in alone)
        print(f"{len(model.sites)} sites of width {options.width} with {options.features} features")
        print(f"{speed:,.0f} tokens/s by one process")
        print(f"{group.size} processes, parallel {options.parallel}: {wall:.2f} times the tokens/s of one (median)")
        print(f"by CPU seconds of the busiest process: {cpu:.2f} times")
    if options.memory:
        living = replace(config, dead_tokens=config.tokens)  # no feature dies, so that all steps take as much
        counted = peak_memory(lambda: train(options.parallel, living), torch.device("cpu"))
        sizes = group.gathered((counted, stated(living, options.width, model.sites, group, options.parallel)))
        estimate = estimate_training(model, texts, config=living, parallel=options.parallel)
        if group.is_first:
            speeds = estimate.tokens_per_second, together_speed(options, together)
            print("estimated {:,.0f} tokens/s, {:,.0f} measured".format(*speeds))
            beside = [f"{(peak - estimate.memory['model']) / 2**20:,.0f}" for peak in estimate.peaks]
            print(f"estimated beside the model: {' and '.join(beside)} MiB")
            for rank, (counted, expected) in enumerate(sizes):
                print(f"process {rank + 1}: {counted / 2**20:,.0f} MiB counted, {expected / 2**20:,.0f} stated")
        if any(abs(counted / expected - 1) > TOLERANCE for counted, expected in sizes):
            sys.exit(1)


def together_speed(options: argparse.Namespace, together: Sequence[tuple[float, float]]) -> float:
    """Tokens a second of all processes together, median over the turns."""
    return options.tokens / statistics.median(seconds for seconds, _ in together)


def stated(config: TrainConfig, width: int, sites: Sequence[Site], group: Processes, parallel: Parallel) -> int:
    """Bytes of a process: `training_memory` of what it trains, on the tokens that it takes, and the buffer of the sites
    whose activations it needs. Gradients that are added up over processes are two more copies, of one autoencoder.
    """
    here, n = share_sites(sites, group.size)[group.rank] if parallel == "sites" else sites, group.size
    if parallel == "features":
        config = replace(config, features=config.features // n)
    if parallel == "data":
        config = replace(config, batch_size=config.batch // n)
    memory = training_memory(config, width, torch.device("cpu"))
    added_up = 2 * memory.gradients if parallel == "data" else 0
    return memory.total(len(here)) + added_up + 4 * width * len(here) * max(config.buffer_tokens, MIN_BUFFER_TOKENS)


if __name__ == "__main__":
    main()
