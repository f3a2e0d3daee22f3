"""Memory and time of a discovery on Gemma 2 2B's shape, with autoencoders streamed from disk.

`python -m tests.benchmarks.bench_scale` builds a random model of width 2,304 with `--layers` layers (26 are the whole
model) and random autoencoders of `--features` features at attention, MLP and residual stream of every layer, and runs
`discover` with each method in a process of its own. Printed per job: seconds of the processor (wall clock on a GPU),
peak memory (of the process over Python and torch, and of the GPU), what was estimated of both before, bytes of stored
effects, readings of autoencoders; then what that gives for 26 layers: memory in proportion, time by the passes that
`circuits.discovery.cost` counts.

On a GPU: `python -m tests.benchmarks.bench_scale --device cuda --layers 26 --prompts 100 --vocab 256000 --memory 8
--sae-memory 30 --steps 10`. The autoencoders (0.3 GB each) stay in `--folder`.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from circuits.discovery.cost import estimate_discovery
from circuits.discovery.discover import discover
from circuits.discovery.resume import remove_partial
from circuits.options import DiscoverOptions
from sae.saes import GIB, load_saes
from tests.benchmarks.gemma_shape import circuit_sites, make_model, make_prompts, write_saes

WHOLE = 26
JOBS = {
    "attrib": {"method": "attrib", "edge_nodes": 0},
    "relp": {"method": "relp", "edge_nodes": 0},
    "ig": {"method": "ig", "edge_nodes": 0},
    "attrib + edges": {"method": "attrib"},
}


def options_of(job: str, args: argparse.Namespace) -> DiscoverOptions:
    """The options of a job."""
    return DiscoverOptions(
        **{"edge_nodes": args.edge_nodes, "steps": args.steps, "memory": args.memory, "sites": "attn,mlp,resid"}
        | JOBS[job]
    )


def run(job: str, args: argparse.Namespace) -> dict[str, Any]:
    """One discovery, measured."""
    torch.set_num_threads(args.threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = make_model(layers=args.layers, width=args.width, vocab=args.vocab, device=args.device, dtype=args.dtype)
    prompts = make_prompts(args.prompts, args.length, args.vocab, args.device)
    folder = write_saes(args.folder, model, args.features, l0=args.l0, tokens=prompts[:1].clean)
    wanted = [site.name for site in circuit_sites(model)]
    saes = load_saes(folder, sites=wanted, device=model.device, budget=int(args.sae_memory * GIB))
    options = options_of(job, args)
    cuda = model.device.type == "cuda"
    started = time.perf_counter() if cuda else time.process_time()
    with patch("sae._units.time.perf_counter", time.perf_counter if cuda else time.process_time):
        estimate = estimate_discovery(model, saes, prompts, options)  # in the seconds it is held against
    estimated_in = (time.perf_counter() if cuda else time.process_time()) - started
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter() if cuda else time.process_time()
    clock = time.perf_counter()
    circuit = discover(model, saes, prompts, options, partial=args.folder / "partial", progress=args.progress)
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() if cuda else time.process_time()) - started
    wall = time.perf_counter() - clock
    on_disk = sum(path.stat().st_size for path in (args.folder / "partial").iterdir())
    remove_partial(args.folder / "partial")
    stored = [x for effects in circuit.effects.values() for x in (effects.example, effects.position, effects.feature)]
    stored += [effects.value for effects in circuit.effects.values()]
    return {
        "seconds": seconds,
        "wall": wall,
        "estimated_seconds": sum(estimate.seconds.values()),
        "estimate_took": estimated_in,
        "peak": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
        "gpu_peak": torch.cuda.max_memory_allocated() if cuda else None,
        "estimate": estimate.to_dict(),
        "effects": sum(x.numel() * x.element_size() for x in stored),
        "entries": sum(len(effects.value) for effects in circuit.effects.values()),
        "disk": on_disk,
        "reads": saes.n_reads,
        "n_sites": len(wanted),
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=2304)
    parser.add_argument("--features", type=int, default=16384)
    parser.add_argument("--l0", type=int, default=60, help="active features a token, about")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help="quadrature nodes of ig")
    parser.add_argument("--edge-nodes", type=int, default=100)
    parser.add_argument("--memory", type=float, default=0.5, help="GiB, as sfc discover --memory")
    parser.add_argument("--sae-memory", type=float, default=1.0, help="GiB, as sfc discover --sae-memory")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_scale"), help="for the autoencoders; kept")
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--progress", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Every job in a process of its own, then a table."""
    args = arguments()
    if args.one:
        sys.stdout.write(json.dumps(run(args.one, args)) + "\n")
        return
    times = " ".join(f"{name:>8}" for name in ("seconds", "wall", "est."))
    print(
        f"{'':15} {times} " + " ".join(f"{name:>10}" for name in ("peak", "est.", "gpu", "effects", "disk")) + " reads"
    )
    for job in args.jobs.split(","):
        shutil.rmtree(args.folder / "partial", ignore_errors=True)
        command = [sys.executable, "-m", "tests.benchmarks.bench_scale", *sys.argv[1:], "--one", job]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        sizes = (
            found["peak"],
            found["estimate"]["peak_bytes"],
            found["gpu_peak"] or 0,
            found["effects"],
            found["disk"],
        )
        print(
            f"{job:15} {found['seconds']:8.1f} {found['wall']:8.1f} {found['estimated_seconds']:8.1f} "
            + " ".join(f"{n / GIB:6.3f} GiB" for n in sizes)
            + f" {found['reads']} of {found['n_sites']}"
        )
        parts = ", ".join(f"{name} {n / GIB:.3f}" for name, n in found["estimate"]["memory_bytes"].items())
        print(f"{'':15} estimated GiB: {parts}", flush=True)


if __name__ == "__main__":
    main()
