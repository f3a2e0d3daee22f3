"""Training by several processes beside one process: how many times faster, measured in one run.

1. torchrun starts N processes of one thread each, connected by gloo.
2. In turns, the first trains all sites while the others sleep, then all of them train together (`--parallel` says how);
   every training reads the same text from its beginning, forward passes included, and ends on disk.
3. Printed are medians over the turns: the ratio of seconds, and that of the CPU seconds of the one process to those of
   the busiest of the several, which is what the ratio of seconds would be with a free core for each.

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
from pathlib import Path
from unittest.mock import patch

import torch
from torch.distributed import run as torchrun

from sae._run import processes
from sae._run.processes import Processes
from sae.training.config import TrainConfig
from sae.training.parallel import Parallel
from sae.training.train import train_saes
from tests.benchmarks.gpu import random_model


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("processes", 2), ("turns", 5), ("width", 256), ("layers", 4), ("features", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--parallel", choices=("sites", "data"), default="sites")
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

    def train(parallel: Parallel | None = None) -> tuple[float, float]:
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


if __name__ == "__main__":
    main()
