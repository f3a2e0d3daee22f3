"""What needs a GPU, in one script of at most 8 minutes: correctness of the kernels, speed, memory.

    python -m tests.benchmarks.gpu --out gpu.json [--peer sparsify=PYTHON] [--peer feature_circuits=PYTHON,CHECKOUT]

1. `kernels`: Triton's kernels beside their twins in torch: their own check, and the gradients of a TopK step with AuxK.
2. `step`: a TopK step of 65,536 features on width 2,304 in bf16, with kernels and with torch, and the encoder's product
   as a share of it (`bench_sae_step`); beside it the steps of the packages whose Python is given.
3. `training`: all 19 sites of a model of 6 layers and width 512 with 32,768 features each: tokens a second, the model's
   share of the time, memory (`sae.training.cost`).
4. `circuit`: a whole circuit on that model's shape (`bench_circuit`), beside the paper's code where it is given.
5. `scale`: a circuit on Gemma 2 2B's shape, 26 layers with 16,384 features at 78 sites, peak memory against the
   estimate (`bench_scale`).

Each runs in a process of its own and lands in the JSON file when it ends, so that the script goes on where it was cut
off. `--small` runs all of it in small on a CPU, the kernels in Triton's interpreter: nothing runs for the first time on
the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sae._files import read_json, write_json
from sae.model.language_model import LanguageModel

SELF = "tests.benchmarks.gpu"
LARGE: dict[str, Sequence[str]] = {
    "kernels": (SELF, "--one", "kernels", "--width", "2304", "--features", "65536", "--batch", "4096"),
    "step": (
        "tests.benchmarks.bench_sae_step", "--device", "cuda", "--dtype", "bf16", "--width", "2304",
        "--features", "65536", "--batch", "4096", "--k", "64", "--only", "topk", "--rounds", "5",
    ),
    "training": (
        SELF, "--one", "training", "--width", "512", "--layers", "6", "--features", "32768", "--batch", "4096",
    ),
    "circuit": ("tests.benchmarks.bench_circuit", "--device", "cuda", "--memory", "16"),
    "scale": (
        "tests.benchmarks.bench_scale", "--device", "cuda", "--layers", "26", "--prompts", "32", "--vocab", "256000",
        "--memory", "8", "--sae-memory", "30", "--threads", "8", "--jobs", "attrib,relp,attrib + edges",
    ),
}  # fmt: skip
SMALL: dict[str, Sequence[str]] = {
    "kernels": (SELF, "--one", "kernels", "--device", "cpu", "--width", "8", "--features", "8", "--batch", "4"),
    "step": (
        "tests.benchmarks.bench_sae_step", "--width", "32", "--features", "128", "--batch", "64", "--k", "4", "--only",
        "topk", "--rounds", "1", "--threads", "1",
    ),
    "training": (
        SELF, "--one", "training", "--device", "cpu", "--width", "32", "--layers", "2", "--features", "64",
        "--batch", "64",
    ),
    "circuit": (
        "tests.benchmarks.bench_circuit", "--layers", "1", "--width", "32", "--features", "64", "--prompts", "2",
        "--vocab", "50", "--nodes", "5", "--repeats", "1",
    ),
    "scale": (
        "tests.benchmarks.bench_scale", "--layers", "1", "--width", "64", "--features", "128", "--l0", "8", "--vocab",
        "64", "--prompts", "2", "--length", "8", "--edge-nodes", "5", "--jobs", "attrib",
    ),
}  # fmt: skip
"""A benchmark's words by the name of the step, in large and in small."""
SECONDS = 240
"""Most that one step may take."""


def kernels(options: argparse.Namespace) -> dict[str, Any]:
    """Relative differences of kernels from torch, of every gradient of a TopK step with half of the features dead."""
    from sae.model.sites import Site
    from sae.sparse import activations
    from sae.training.config import TrainConfig
    from sae.training.training_sae import DEAD_LOOKS, TrainingSAE

    device = torch.device(options.device)
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    from sae.sparse import triton_kernels

    triton_kernels.check(device)
    config = TrainConfig(features=options.features, k=4, batch_size=options.batch, tokens=1000 * options.batch)
    torch.manual_seed(0)
    x = torch.randn(options.batch, options.width, device=device)
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    for mode in ("torch", "triton"):
        torch.manual_seed(0)
        sae = TrainingSAE("site", Site.parse("resid_0"), options.width, config, device)
        sae.state["silent"][: options.features // 2] = 10**9
        with activations.using(mode):
            sae.step(x, DEAD_LOOKS)
        gradients[mode] = {name: weight.grad.clone() for name, weight in sae.weights.items()}
    differences = {
        name: float((gradients["triton"][name] - g).norm() / g.norm().clamp(min=1e-30))
        for name, g in gradients["torch"].items()
    }
    assert max(differences.values()) < 1e-3, differences
    return {"largest difference": max(differences.values()), **differences}


def random_model(width: int, layers: int, device: str) -> tuple[LanguageModel, list[str]]:
    """A GPT-NeoX of random weights, and text for it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    from sae.model.load import load_model

    vocab = {"<unk>": 0} | {f"w{n}": n for n in range(1, 5000)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, len(vocab), (4096, 100), generator=generator).tolist()
    config = GPTNeoXConfig(
        vocab_size=len(vocab), hidden_size=width, num_hidden_layers=layers, num_attention_heads=8,
        intermediate_size=4 * width, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = load_model(
        GPTNeoXForCausalLM(config).eval(), device=device,
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"),
    )  # fmt: skip
    return model, [" ".join(f"w{n}" for n in row) for row in words]


def training(options: argparse.Namespace) -> dict[str, Any]:
    """The estimate of training all sites of a random model, from a few steps."""
    from sae.training.config import TrainConfig
    from sae.training.cost import estimate_training

    model, texts = random_model(options.width, options.layers, options.device)
    estimate = estimate_training(
        model,
        texts,
        config=TrainConfig(
            features=options.features, k=min(32, options.features // 4), tokens=100_000_000, batch_size=options.batch,
            buffer_tokens=65_536, autocast=model.device.type == "cuda",
        ),
    )  # fmt: skip
    share = estimate.seconds["model"] / sum(estimate.seconds.values())
    print(estimate.text(), f"share of the model: {share:.1%}", sep="\n")
    return estimate.to_dict() | {"share_of_model": share}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="what was measured, and where to go on")
    parser.add_argument("--small", action="store_true", help="all of it in small, on a CPU")
    parser.add_argument("--only", help="names of steps, separated by commas")
    parser.add_argument("--peer", action="append", default=[], help="as --peer of bench_sae_step and bench_circuit")
    parser.add_argument("--one", choices=("kernels", "training"), help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    for name in ("width", "layers", "features", "batch"):
        parser.add_argument(f"--{name}", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.small and not options.one and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: --small runs all of it in small on the CPU")
    return options


def main() -> None:
    options = arguments()
    if options.one:
        print(json.dumps({"kernels": kernels, "training": training}[options.one](options)))
        return
    steps = SMALL if options.small else LARGE
    names = options.only.split(",") if options.only else list(steps)
    results: dict[str, Any] = read_json(options.out) if options.out.is_file() else {"schema_version": 1}
    results["device"] = "cpu" if options.small else torch.cuda.get_device_name()
    for name in names:
        peers = [peer for peer in options.peer if peer_of(peer) == name]
        words = [*steps[name], *(word for peer in peers for word in ("--peer", peer))]
        words += ["--folder", f"{options.out}.saes"] if name == "scale" else []
        if (done := results.get(name)) and done["words"] == words and done["status"] == 0:
            print(f"{name}: done before, {done['seconds']:.0f} s")
            continue
        results[name] = run(words)
        write_json(options.out, results)
        print(f"\n=== {name}: status {results[name]['status']}, {results[name]['seconds']:.0f} s", flush=True)
        print(results[name]["output"], flush=True)
    print(f"\n{results['device']}: " + ", ".join(f"{name} {results[name]['seconds']:.0f} s" for name in names))
    sys.exit(any(results[name]["status"] for name in names))


def peer_of(peer: str) -> str:
    """The step that a package is timed in."""
    return "circuit" if peer.startswith("feature_circuits=") else "step"


def run(words: Sequence[str]) -> dict[str, Any]:
    """Run a benchmark in a process of its own: its words, exit status, seconds and what it said."""
    start = time.perf_counter()
    try:
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=SECONDS)
        status, output = done.returncode, done.stdout + (done.stderr if done.returncode else "")
    except subprocess.TimeoutExpired as error:
        status, output = 124, f"{(error.stdout or b'').decode()}\nstopped after {SECONDS} s"
    return {"words": list(words), "status": status, "seconds": time.perf_counter() - start, "output": output.strip()}


if __name__ == "__main__":
    main()
