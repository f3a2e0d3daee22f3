"""How fast feature pages are made, beside the model alone and beside SAEDashboard.

    python -m tests.benchmarks.bench_features [--features 1000] [--tokens 1000000] [--saes RUN] [--peer PYTHON]

The bundled model with SAEs of 256 features (TopK, k = 8) at its 13 sites, those of `sfc demo` or some that are trained
for a moment: speed does not depend on how good they are. Ours makes all panels: density, histogram, strongest contexts,
samples by interval, change of each token's log-probability under ablation, logits, similar features by cosine and by
activation. Each line says the tokens a second of CPU. The text is the grammar's, as long as it is asked for, the same
file for all.

PYTHON belongs to an environment with sae-dashboard 0.8 (`feature_peer.py`). It makes histograms, logits, sequences by
interval and tables of similar features, one SAE a pass; it has no ablation ("We are not supporting ablation experiments
for now"), so that the ratio is given with and without the time in which ours runs contexts with a feature ablated. It
is run at the first and the last block's output; the ratio is the mean of their CPU times, times the number of sites,
over ours for all of them.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import torch

from examples.agreement.grammar import documents
from sae import (
    FeaturePageOptions,
    SparseAutoencoder,
    TrainConfig,
    feature_pages,
    load_model,
    load_saes,
    save_sae,
    train_saes,
)
from sae.data.batches import token_batches
from sae.features.ablated import measure_rows
from sae.model.sites import Site

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "examples" / "agreement" / "text" / "train.txt"
PEER_SITES = (Site("resid", 0), Site("resid", 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--correlation-tokens", type=int, default=100_000)
    parser.add_argument("--saes", help="run folder of sfc demo; SAEs are trained for a moment otherwise")
    parser.add_argument("--peer", help="Python of an environment with sae-dashboard")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Prints a line each for the model alone, ours and the other program."""
    model = load_model(str(ROOT / "examples" / "agreement" / "model"), device="cpu")
    if options.saes is None:
        saes = train_saes(model, TEXT, config=TrainConfig(features=256, k=8, tokens=50_000), out=folder / "run")
    else:
        saes = load_saes(options.saes, device="cpu")
    texts = list(documents(options.tokens // 16, seed=1))  # of some 25 tokens each
    per_site = -(-options.features // len(saes))
    asked = {site: list(range(min(per_site, saes.config(site).n_features))) for site in saes}
    n_features = sum(map(len, asked.values()))

    start = time.process_time(), time.perf_counter()
    n_read = 0
    for tokens in token_batches(model, texts, max_tokens=options.tokens, batch_size=128):
        model.run(tokens, capture=list(saes), need_logits=False)
        n_read += int(tokens.lengths.sum())
    report("the model alone, in batches as they come", n_read, start)

    ablated = 0.0

    def timed(*args: Any) -> Any:
        nonlocal ablated
        begin = time.process_time()
        measured = measure_rows(*args)
        ablated += time.process_time() - begin
        return measured

    start = time.process_time(), time.perf_counter()
    page_options = FeaturePageOptions(tokens=options.tokens, correlation_tokens=options.correlation_tokens)
    with mock.patch("sae.features.pages.measure_rows", timed):
        pages = feature_pages(model, saes, texts, asked, page_options)
    assert len(pages) == n_features
    ours = report(f"pages of {n_features} features at {len(asked)} sites", n_read, start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"of it {ablated:.1f} s CPU for contexts with a feature ablated; at most {memory:.2f} GiB in memory")
    if options.peer:
        (folder / "text.txt").write_text("\n".join(texts), encoding="utf-8")
        peer = mean(run_peer(options.peer, saes[site], per_site, options.tokens, folder) for site in PEER_SITES)
        print(
            f"SAEDashboard at {len(asked)} sites takes {peer * len(asked) / ours:.2f} times ours, "
            f"{peer * len(asked) / (ours - ablated):.2f} times ours without ablation"
        )


def run_peer(python: str, sae: SparseAutoencoder, n_features: int, tokens: int, folder: Path) -> float:
    """Seconds of CPU that SAEDashboard takes for the features of one SAE."""
    save_sae(sae, folder / "sae", file_format="saelens", overwrite=True)
    words = ["-m", "tests.benchmarks.feature_peer", f"{folder}/sae", f"{folder}/text.txt"]
    words += ["--features", str(n_features), "--tokens", str(tokens)]
    done = subprocess.run([python, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    print(*done.stdout.strip().splitlines()[-2:], sep="\n")
    return float(done.stdout.rpartition(" s CPU")[0].rpartition(" ")[2])


def report(name: str, n_tokens: int, start: tuple[float, float]) -> float:
    """One line: CPU and wall time since the start, and tokens a second; returns the CPU time."""
    cpu, wall = time.process_time() - start[0], time.perf_counter() - start[1]
    print(
        f"{name:<44} {n_tokens:>9,} tokens {cpu:7.1f} s CPU {wall:7.1f} s {n_tokens / cpu:8,.0f} tokens/s of CPU "
        f"(load {os.getloadavg()[0]:.0f}, {torch.get_num_threads()} threads)"
    )
    return cpu


if __name__ == "__main__":
    main()
