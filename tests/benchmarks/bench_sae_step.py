"""Times one training step of every architecture beside other packages' steps of the same, and checks its memory.

    python -m tests.benchmarks.bench_sae_step [--only topk,gated] [--threads 2] [--json] \\
        --peer dictionary_learning=ENV1/bin/python --peer sae_lens=ENV2/bin/python --peer sparsify=ENV3/bin/python
    python -m tests.benchmarks.bench_sae_step --device cuda --dtype bf16 --width 2304 --features 65536 --only topk

Each peer is a package in an environment of its own, of which the python is given; its steps run in a process there
(`peer_steps`). A step is everything between two batches: forward, backward, optimizer, constraints, counters. In each
round every step runs twice, the second run counts, and medians over the rounds are compared; times are also given as
ratios to the five dense products of the size (encoder, decoder, ∂L/∂f, ∂L/∂W_dec, ∂L/∂W_enc), in the same rounds.

Both sides have the same number of threads, idle threads that sleep, and an allocator that keeps freed memory instead of
asking the system for cleared pages again (`--malloc default` for glibc's own behaviour): peers gain from that, by a
tenth to a half. `+auxk` has half of the features declared dead. Penalised architectures are timed at the L0 they are
steered to (k active features a token) and as `dense` with half of all active, as early in training; a peer's step costs
the same in both. On a machine where others work, `--clock cpu` counts the calling thread's own time.

On CUDA every step is timed a second time with torch in place of the Triton kernels, and each operation on rows by
itself on both sides (`kernel_times`), beside the encoder's product as a share of the step.

Memory is the peak of the process while steps run over what it took before there was an autoencoder, and must be
within `TOLERANCE` (and `SLACK`) of `training_memory`'s formula. Exit status 1 if a step is slower than a peer's or
memory is off.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `sfc` does, before torch is imported

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sae.architectures import ARCHITECTURES
from sae.model.sites import Site
from sae.sparse.activations import using
from sae.training.config import TrainConfig
from sae.training.loop import BETAS
from sae.training.training_sae import DEAD_LOOKS, TrainingSAE
from tests.benchmarks import peer_steps
from tests.benchmarks.kernel_times import kernel_times
from tests.benchmarks.peer_steps import PACKAGES, Sizes, Step
from tests.benchmarks.training_memory import training_memory

TOLERANCE = 0.15
"""Largest relative difference between the memory stated and taken."""
SLACK = 8
"""Megabytes of the process that have nothing to do with sizes."""
AIMS = {
    "topk": 0.33, "topk+auxk": 0.45, "batchtopk": 0.4, "jumprelu": 0.4, "matryoshka": 0.4, "relu dense": 1.1,
    "gated dense": 1.8,
}  # fmt: skip
"""Ratios to the five products that are aimed at with the default sizes on two threads."""
PRODUCTS = "five products"
IN_TORCH = " in torch"
"""Ends the name of a step that is timed without kernels."""


class Peer:
    """A package in its own process."""

    def __init__(self, name: str, python: str, sizes: Sizes):
        self.name = name
        script = Path(peer_steps.__file__).resolve()
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": str(sizes.threads)}
        self.process = subprocess.Popen(
            [python, str(script), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            stderr=None if os.environ.get("PEER_STDERR") else subprocess.DEVNULL,
        )  # fmt: skip
        facts = self.ask(sizes._asdict())
        self.steps: list[str] = facts["steps"]
        self.title = f"{name} {facts['version']} (torch {facts['torch']})"

    def ask(self, request: dict[str, Any]) -> Any:
        """The answer to one request."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the step of {self.name} failed at {request}; PEER_STDERR=1 shows what it says")
        return json.loads(line)


def five_products(sizes: Sizes) -> Step:
    """The dense products of a step, into buffers that exist already."""
    kind: dict[str, Any] = {"device": sizes.device}
    kind["dtype"] = torch.bfloat16 if sizes.dtype == "bf16" else torch.float32
    x, f = torch.randn(sizes.batch, sizes.width, **kind), torch.randn(sizes.batch, sizes.features, **kind)
    weights = torch.randn(sizes.features, sizes.width, **kind)
    out_f, out_x, out_w = torch.empty_like(f), torch.empty_like(x), torch.empty_like(weights)

    def run() -> None:
        torch.mm(x, weights.T, out=out_f)  # encoder
        torch.mm(f, weights, out=out_x)  # decoder
        torch.mm(x, weights.T, out=out_f)  # ∂L/∂f
        torch.mm(f.T, x, out=out_w)  # ∂L/∂W_dec
        torch.mm(f.T, x, out=out_w)  # ∂L/∂W_enc

    return run


def training_step(state: str, sizes: Sizes, config: TrainConfig, batch: Callable[[], torch.Tensor]) -> Step:
    """A step of our own in the middle of training; `state` is the architecture's name, with `+auxk` or ` dense`."""
    mode, state = "torch" if state.endswith(IN_TORCH) else "auto", state.removesuffix(IN_TORCH)
    name, dense, dead = state.split("+")[0].split()[0], state.endswith(" dense"), state.endswith("+auxk")
    config = replace(config, architecture=name, sparsity=None if dense else 1e-4)
    one = TrainingSAE("bench", Site.parse("resid_0"), sizes.width, config, torch.device(sizes.device))
    optimizer = torch.optim.Adam(one.weights.values(), lr=1e-6, betas=BETAS, fused=True)
    one.prepare(batch())
    if not one.architecture.fixed_k and not dense:
        _make_sparse(one, batch(), sizes.k)

    step = iter(range(DEAD_LOOKS * (config.steps // 2 // DEAD_LOOKS), 10**9))

    def run() -> None:
        if dead:
            one.state["silent"][::2] = peer_steps.LONG_AGO
        with using(mode):
            with sizes.autocast():
                one.step(batch(), next(step))
            optimizer.step()
            optimizer.zero_grad()
            one.constrain()

    return run


@torch.no_grad()
def _make_sparse(one: TrainingSAE, x: torch.Tensor, k: int) -> None:
    """Biases with which about k features a token are active, as late in training."""
    x = (x[:256] - one.state["centre"]) / one.state["scale"]
    one.weights["W_enc"] /= one.weights["W_enc"].norm(dim=1, keepdim=True)  # it starts smaller where all are active
    z = (x @ one.weights["W_enc"].T).flatten()
    cut = z[:: max(1, len(z) // 2**20)].quantile(1 - k / one.n_features)
    for name in ("b_enc", "gate_bias"):
        if name in one.weights and "threshold" not in one.weights:
            one.weights[name].fill_(-cut)
    if "threshold" in one.weights:
        one.weights["threshold"].fill_(cut)
    one.state["l0"].fill_(k)


def states_by_kind(names: list[str]) -> dict[str, list[str]]:
    """Our states by what a peer's step of the same is called: it has only one for sparse and dense ones."""
    kinds = {name: [name, *([f"{name} dense"] if not ARCHITECTURES[name].fixed_k else [])] for name in names}
    return {kind: states for name in kinds for kind, states in _with_auxk(name, kinds[name]).items()}


def _with_auxk(name: str, states: list[str]) -> dict[str, list[str]]:
    return {name: states} | ({"topk+auxk": ["topk+auxk"]} if name == "topk" else {})


def memory_of(state: str, sizes: Sizes, config: TrainConfig) -> dict[str, float | None]:
    """Megabytes that one autoencoder's steps take at most, stated and measured."""
    stated = training_memory(
        replace(config, architecture=state.split("+")[0].split()[0]), sizes.width, torch.device(sizes.device),
        dense=state.endswith(" dense"), aux=state.endswith("+auxk"),
    )  # fmt: skip
    small = sizes._replace(width=64, features=512, batch=512, k=8)
    training_step(state, small, replace(config, features=512, batch_size=512, k=8), small.batches())()  # loads code
    batch = sizes.batches()
    before = peer_steps.memory_now(sizes)
    step = training_step(state, sizes, config, batch)
    for _ in range(3):
        step()
    peak = peer_steps.memory_peak(sizes)
    taken = None if peak is None or before is None else (peak - before) / 2**20
    return {"memory_stated": stated.total() / 2**20, "memory": taken}


def measure(
    kind: str, states: list[str], sizes: Sizes, config: TrainConfig, peers: list[Peer], rounds: int
) -> dict[str, dict[str, Any]]:
    """Figures of our states beside the peers' steps of that kind and the five products."""
    figures: dict[str, dict[str, Any]] = {state: memory_of(state, sizes, config) for state in states}
    peers = [peer for peer in peers if kind in peer.steps]
    twins = [state + IN_TORCH for state in states] if sizes.device.startswith("cuda") else []
    ours = {PRODUCTS: five_products(sizes)} | {
        state: training_step(state, sizes, config, sizes.batches()) for state in (*states, *twins)
    }
    times: dict[str, list[float]] = {name: [] for name in (*ours, *(peer.name for peer in peers))}
    for peer in peers:
        peer.ask({"build": kind})
    for _ in range(rounds):
        for name, step in ours.items():
            times[name].append(peer_steps.seconds(step, 2, sizes)[-1])
        for peer in peers:
            times[peer.name].append(peer.ask({"run": 2})[-1])
    seconds = {name: statistics.median(values) for name, values in times.items()}
    base = seconds[PRODUCTS]
    theirs = {
        peer.name: {"ms": 1e3 * seconds[peer.name], "ratio": seconds[peer.name] / base, "memory": peer.ask({"peak": 0})}
        for peer in peers
    }
    for peer in peers:
        peer.ask({"drop": 0})
    for state in states:
        figures[state] |= {"ms": 1e3 * seconds[state], "ratio": seconds[state] / base, "peers": theirs}
        if twins:
            figures[state]["torch_ms"] = 1e3 * seconds[state + IN_TORCH]
    return figures


def verdicts(figures: dict[str, dict[str, Any]]) -> list[str]:
    """What is not as it should be: steps slower than a peer's, memory off its formula."""
    wrong = []
    for state, row in figures.items():
        wrong += [f"{state} is slower than {name}" for name, peer in row["peers"].items() if peer["ms"] <= row["ms"]]
        stated = row["memory_stated"]
        if row["memory"] is not None and abs(row["memory"] - stated) > TOLERANCE * stated + SLACK:
            wrong.append(f"{state} takes {row['memory']:.0f} MB where {stated:.0f} are stated")
    return wrong


def table(figures: dict[str, dict[str, Any]]) -> str:
    """One line a state: our step, the fastest peer's, and memory."""
    lines = [
        f"{'':16s} {'ours':^23s}   {'fastest peer':^38s}   {'':7s}  {'memory, MB':^19s}",
        f"{'step':16s} {'ms':>7s} {'ratio':>7s} {'aim':>7s}   {'':20s} {'ms':>8s} {'ratio':>8s}   {'faster':>7s}  "
        f"{'stated':>6s} {'ours':>6s} {'peer':>6s}",
    ]
    for state, row in figures.items():
        best = min(row["peers"], key=lambda name: row["peers"][name]["ms"], default=None)
        peer = {} if best is None else row["peers"][best]
        aim = f"{AIMS[state]:.2f}" if state in AIMS else ""
        line = f"{state:16s} {row['ms']:7.1f} {row['ratio']:7.2f} {aim:>7s}   {best or '-':20s} "
        line += f"{peer['ms']:8.1f} {peer['ratio']:8.2f}   {peer['ms'] / row['ms']:6.1f}x" if best else " " * 27
        taken = "" if row["memory"] is None else f"{row['memory']:.0f}"
        theirs = f"{peer['memory'] / 2**20:.0f}" if peer.get("memory") else ""
        lines.append(f"{line}  {row['memory_stated']:6.0f} {taken:>6s} {theirs:>6s}")
    return "\n".join(lines)


def twin_lines(figures: dict[str, dict[str, Any]]) -> str:
    """One line a state: the step with the kernels and with torch in their place."""
    lines = [f"{'step':16s} {'kernels, ms':>12s} {'torch, ms':>12s} {'faster':>7s}"]
    for state, row in figures.items():
        lines.append(f"{state:16s} {row['ms']:12.2f} {row['torch_ms']:12.2f} {row['torch_ms'] / row['ms']:6.2f}x")
    return "\n".join(["", *lines, ""])


def arguments() -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 512), ("features", 8192), ("batch", 2048), ("k", 32), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: products in autocast")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--malloc", choices=("reuse", "default"), default="reuse")
    parser.add_argument("--peer", action="append", default=[], metavar="PACKAGE=PYTHON", help=", ".join(PACKAGES))
    parser.add_argument("--only", help="architectures, separated by commas")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args()
    trained = [name for name, architecture in ARCHITECTURES.items() if architecture.trained]
    names = options.only.split(",") if options.only else trained
    if unknown := [name for name in names if name not in trained]:
        parser.error(f"--only names {', '.join(unknown)}; there are {', '.join(trained)}")
    options.names = names
    options.pythons = dict(text.partition("=")[::2] for text in options.peer)
    for name, python in options.pythons.items():
        if name not in PACKAGES or not Path(python).exists():
            parser.error(f"--peer {name}={python}: give PACKAGE=PYTHON, PACKAGE one of {', '.join(PACKAGES)}")
    return options


def main() -> None:
    options = arguments()
    sizes = Sizes(**{field: getattr(options, field) for field in Sizes._fields})
    peer_steps.prepare(sizes)
    config = TrainConfig(
        features=sizes.features, k=sizes.k, batch_size=sizes.batch, tokens=sizes.batch * 1000,
        autocast=sizes.dtype == "bf16", aux_k=sizes.width // 2,  # as peers have it
    )  # fmt: skip
    peers = [Peer(name, python, sizes) for name, python in options.pythons.items()]
    figures: dict[str, dict[str, Any]] = {}
    for kind, states in states_by_kind(options.names).items():
        figures |= measure(kind, states, sizes, config, peers, options.rounds)
        print(f"{kind} done", file=sys.stderr)
    wrong = verdicts(figures)
    encoder = encoder_seconds(sizes)
    if options.json:
        print(json.dumps({**sizes._asdict(), "encoder_ms": 1e3 * encoder, "figures": figures, "wrong": wrong}))
    else:
        print(f"{' '.join(f'{key} {value}' for key, value in sizes._asdict().items())}; torch {torch.__version__}")
        print(*(peer.title for peer in peers), "", table(figures), "", sep="\n")
        share = {state: encoder / row["ms"] * 1e3 for state, row in figures.items()}
        print("the encoder's product alone, as a share of a step:", *(f"{s} {v:.2f}," for s, v in share.items()))
        if sizes.device.startswith("cuda"):
            print(twin_lines(figures), kernel_times(sizes), "", sep="\n")
        print(memory_line(sizes, config))
        fine = "memory is as stated" + (", every step faster than every peer's" if peers else "")
        print(*(wrong or [fine]), sep="\n")
    sys.exit(1 if wrong else 0)


def encoder_seconds(sizes: Sizes) -> float:
    """Median time of the encoder's product alone."""
    dtype = torch.bfloat16 if sizes.dtype == "bf16" else torch.float32
    x = torch.randn(sizes.batch, sizes.width, device=sizes.device, dtype=dtype)
    weights = torch.randn(sizes.features, sizes.width, device=sizes.device, dtype=dtype)
    out = torch.empty(sizes.batch, sizes.features, device=sizes.device, dtype=dtype)
    return statistics.median(peer_steps.seconds(lambda: torch.mm(x, weights.T, out=out), 6, sizes)[1:])


def memory_line(sizes: Sizes, config: TrainConfig) -> str:
    """The formula's terms for a TopK autoencoder."""
    memory = training_memory(config, sizes.width, torch.device(sizes.device), aux=True)
    mb = {name: f"{value / 2**20:.0f}" for name, value in memory._asdict().items()}
    return (
        f"memory of a TopK autoencoder: weights {mb['weights']}, gradients {mb['gradients']}, Adam {mb['moments']} MB; "
        f"shared by all that train together: {mb['intermediates']} MB"
    )


if __name__ == "__main__":
    main()
