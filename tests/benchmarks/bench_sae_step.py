"""Times one training step of every architecture as a ratio to the five dense GEMMs of the same size.

    python tests/benchmarks/bench_sae_step.py [--width 512] [--features 8192] [--batch 2048] [--k 32] [--threads 2]

The GEMMs are those of a dense step: encoder, decoder, ∂L/∂f, ∂L/∂W_dec, ∂L/∂W_enc. Rounds of all architectures and the
GEMMs alternate in one process and medians are compared, so that other load on the machine hits all alike. A step is
everything between two batches: forward, backward, fused Adam, constraints and counters. `topk+auxk` has half of its
features declared dead. Penalised architectures are timed at the L0 they are steered to (k active features a token), and
as `dense` with half of all features active, as early in training. Memory: weights, gradients and Adam's moments, and
the peak of the process over its start. With `--peers`, dictionary_learning and sparsify are timed too where they can
be imported.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from sae.architectures import ARCHITECTURES
from sae.config import TrainConfig
from sae.learner import Learner
from sae.sites import Site
from sae.training import BETAS

Step = Callable[[], None]


def five_gemms(width: int, features: int, batch: int) -> Step:
    """The dense products of a step, into buffers that exist already."""
    x, f = torch.randn(batch, width), torch.randn(batch, features)
    weights = torch.randn(features, width)
    out_f, out_x, out_w = torch.empty_like(f), torch.empty_like(x), torch.empty_like(weights)

    def run() -> None:
        torch.mm(x, weights.T, out=out_f)  # encoder
        torch.mm(f, weights, out=out_x)  # decoder
        torch.mm(x, weights.T, out=out_f)  # ∂L/∂f
        torch.mm(f.T, x, out=out_w)  # ∂L/∂W_dec
        torch.mm(f.T, x, out=out_w)  # ∂L/∂W_enc

    return run


def training_step(
    architecture: str, width: int, config: TrainConfig, *, dead: bool = False, dense: bool = False
) -> Step:
    """A step of our own, in the state it has in the middle of training."""
    config = replace(config, architecture=architecture, sparsity=None if dense else 1e-4)
    learner = Learner("bench", Site.parse("resid_0"), width, config, torch.device("cpu"))
    optimizer = torch.optim.Adam(learner.weights.values(), lr=1e-6, betas=BETAS, fused=True)
    x = torch.randn(8 * config.batch, width)
    learner.prepare(x)
    if learner.recipe.may_be_dense and not dense:
        _make_sparse(learner, x[: config.batch], config.k)
    count = 0

    def run() -> None:
        nonlocal count
        rows = slice(count % 8 * config.batch, (count % 8 + 1) * config.batch)
        count += 1
        if dead:
            learner.state["silent"][::2] = 1e9
        learner.step(x[rows], config.steps // 2)
        optimizer.step()
        optimizer.zero_grad()
        learner.constrain()

    return run


def _make_sparse(learner: Learner, x: torch.Tensor, k: int) -> None:
    """Biases with which about k features a token are active, as late in training."""
    with torch.no_grad():
        x = (x - learner.state["centre"]) / learner.state["scale"]
        z = x @ learner.weights["W_enc"].T
        cut = z.flatten()[:: max(1, z.numel() // 2**20)].quantile(1 - k / z.shape[1])
        for name in ("b_enc", "gate_bias"):
            if name in learner.weights and "threshold" not in learner.weights:
                learner.weights[name].fill_(-cut)
        if "threshold" in learner.weights:
            learner.weights["threshold"].fill_(cut)
        learner.state["l0"].fill_(k)


def peer_steps(width: int, config: TrainConfig) -> dict[str, Step]:
    """Steps of other packages, those that are importable."""
    steps: dict[str, Step] = {}
    x = torch.randn(config.batch, width)
    try:
        from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
    except ImportError:
        pass
    else:
        trainer = TopKTrainer(
            steps=1000, activation_dim=width, dict_size=config.features, k=config.k, layer=0, lm_name="none",
            dict_class=AutoEncoderTopK, device="cpu",
        )  # fmt: skip
        steps["dictionary_learning topk"] = lambda: trainer.update(0, x)
    try:
        from sparsify import SparseCoder, SparseCoderConfig
    except ImportError:
        pass
    else:
        coder = SparseCoder(width, SparseCoderConfig(num_latents=config.features, k=config.k))
        optimizer = torch.optim.Adam(coder.parameters(), lr=1e-6)

        def sparsify_step() -> None:
            coder.set_decoder_norm_to_unit_norm()
            coder(x).fvu.backward()
            coder.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
            optimizer.zero_grad()

        steps["sparsify topk"] = sparsify_step
    return steps


def measure(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median seconds of each step over alternating rounds, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if turn:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("width", 512),
        ("features", 8192),
        ("batch", 2048),
        ("k", 32),
        ("threads", 2),
        ("rounds", 7),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--only", help="architectures, separated by commas")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = TrainConfig(features=options.features, k=options.k, batch_size=options.batch, tokens=options.batch * 1000)
    wanted = options.only.split(",") if options.only else [n for n, a in ARCHITECTURES.items() if a.trained]
    steps = {"five GEMMs": five_gemms(options.width, options.features, options.batch)}
    for name in wanted:
        steps[name] = training_step(name, options.width, config)
        if name == "topk":
            steps["topk+auxk"] = training_step(name, options.width, config, dead=True)
        if ARCHITECTURES[name].may_be_dense:
            steps[f"{name} dense"] = training_step(name, options.width, config, dense=True)
    if options.peers:
        steps |= peer_steps(options.width, config)
    seconds = measure(steps, options.rounds)
    base = seconds["five GEMMs"]
    state_mb = 16 * (2 * options.features * options.width + options.features + options.width) / 2**20
    peak_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if options.json:
        ratios = {name: value / base for name, value in seconds.items()}
        print(json.dumps({"seconds": seconds, "ratios": ratios, "state_mb": state_mb, "peak_mb": peak_mb}))
        return
    print(f"d {options.width}, F {options.features}, batch {options.batch}, k {options.k}, {options.threads} threads")
    print(f"{'step':28s} {'ms':>8s} {'ratio':>7s} {'tokens/s':>9s}")
    for name, value in seconds.items():
        print(f"{name:28s} {value * 1e3:8.1f} {value / base:7.2f} {options.batch / value:9,.0f}")
    print(f"weights, gradients and Adam's moments of one autoencoder: {state_mb:.0f} MB")
    print(f"peak of the process over its start, {len(steps) - 1} autoencoders in it: {peak_mb:.0f} MB")


if __name__ == "__main__":
    main()
