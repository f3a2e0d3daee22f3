"""Times the training steps of two checkouts of this repository in turn, to see what a change of the code costs.

    git worktree add --detach BEFORE cc0a150
    python -m tests.benchmarks.bench_before BEFORE [--only topk,"relu dense"] [--rounds 4]

Each checkout runs in its own process, one thread each, and its own `bench_sae_step` makes the steps (d 512, F 8,192,
batch 2,048, k 32). In each round every checkout runs one step, in an order that turns round by round; times are those
of the process alone (CPU), so that a busy machine shows little. Ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

STATES = (
    "topk", "topk+auxk", "batchtopk", "matryoshka", "multi_topk", "jumprelu", "gated", "relu", "relu_unit", "p_anneal",
    "jumprelu dense", "gated dense", "relu dense", "relu_unit dense", "p_anneal dense",
)  # fmt: skip
WORKER = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
from tests.benchmarks import bench_sae_step, peer_steps
sizes = peer_steps.Sizes(512, 8192, 2048, 32, threads=1, clock="cpu")
peer_steps.prepare(sizes)
config = bench_sae_step.TrainConfig(features=8192, k=32, batch_size=2048, tokens=2048 * 1000, autocast=False, aux_k=256)
for line in sys.stdin:
    request = json.loads(line)
    if request is not None:
        step = None  # its memory goes first
        step = bench_sae_step.training_step(request, sizes, config, sizes.batches())
    answers.write(json.dumps(peer_steps.seconds(step, 1, sizes)[0]) + "\\n")
    answers.flush()
"""
"""Builds the step that a line names, runs it once for every line, and answers with its seconds."""


class Checkout:
    """The training steps of one checkout, in a process of their own."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def seconds(self, state: str | None = None) -> float:
        """The time of one step, of another kind than before if one is named."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(state) + "\n")
        self.process.stdin.flush()
        answer: Any = json.loads(self.process.stdout.readline())
        return float(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("before", type=Path, help="folder of the other checkout")
    parser.add_argument("--only", help="kinds of step, separated by commas")
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    both = {"before": Checkout(options.before.resolve()), "now": Checkout(Path(__file__).parents[2])}
    for state in options.only.split(",") if options.only else STATES:
        for checkout in both.values():
            checkout.seconds(state)
        times: dict[str, list[float]] = {name: [] for name in both}
        for turn in range(options.rounds):
            for name in list(both)[:: 1 if turn % 2 else -1]:
                times[name].append(both[name].seconds())
        before, now = (statistics.median(times[name]) for name in both)
        ratio = f"before {1e3 * before:6.0f} ms, now {1e3 * now:6.0f} ms, ratio {now / before:.2f}"
        print(f"{state:16} {ratio}", flush=True)


if __name__ == "__main__":
    main()
