"""Transcoders of the MLPs of a real model beside autoencoders of the MLPs' outputs, and beside those of sparsify.

    python -m tests.benchmarks.bench_transcoders [--sparsify /venvs/sparsify/bin/python] [--tokens 262144]

Takes the shared TinyStories model. All dictionaries have the same width and k, and are trained on the same rows, those
of an activation cache, in as many steps, at their own package's defaults. Columns: FVU (fraction of variance
unexplained at the write place, 1 - explained variance) per layer, the mean of the layers, and the share of
cross-entropy recovered with the dictionaries of all MLPs spliced in together, on held-out text. Without the model it
says so and ends.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sae.autoencoder import SAEConfig, SparseAutoencoder
from sae.data.cache import CachedActivations
from sae.data.cache_writer import write_cache
from sae.evaluation.evaluate import evaluate_saes
from sae.folding import fold_norms
from sae.model.language_model import LanguageModel
from sae.model.load import load_model
from sae.model.sites import Site
from sae.training.config import TrainConfig
from sae.training.train import train_saes

OURS: dict[str, dict[str, object]] = {
    "autoencoder of the output": {},
    "transcoder": {"kind": "transcoder"},
    "transcoder with skip": {"kind": "transcoder", "skip": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with models/ and data/")
    parser.add_argument("--sparsify", help="interpreter that has sparsify, to train its transcoders as well")
    parser.add_argument("--tokens", type=int, default=2**18)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--eval-tokens", type=int, default=10_000)
    args = parser.parse_args()
    folder, data = args.shared / "models" / "tinystories-260k", args.shared / "data" / "tinystories"
    if not folder.is_dir():
        print(f"no model in {str(folder)!r}: nothing to measure")
        return
    torch.set_num_threads(1)
    model, config = load_model(str(folder)), TrainConfig(features=args.features, k=args.k, tokens=args.tokens)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        write_cache(model, str(data / "train.jsonl"), sites="mlp,mlp_in", tokens=args.tokens, out=out / "cache",
                    dtype="float32")  # fmt: skip
        cache = CachedActivations(out / "cache")
        print(f"{args.features} features, k {args.k}, {cache.manifest.rows:,} rows in {config.steps} steps")
        for name, options in OURS.items():
            chosen = replace(config, **options)  # type: ignore[arg-type]
            saes = train_saes(cache.model, cache.text, config=chosen, out=out / name, activations=cache)
            print(row(name, model, saes, data / "valid.jsonl", args.eval_tokens), flush=True)
        for skip in (False, True) if args.sparsify else ():
            name = f"sparsify's transcoder{' with skip' if skip else ''}"
            theirs = sparsify_saes(args.sparsify, cache, config, skip=skip, out=out / name)
            print(row(name, model, theirs, data / "valid.jsonl", args.eval_tokens), flush=True)


def row(name: str, model: LanguageModel, saes: Mapping[Site, SparseAutoencoder], text: Path, tokens: int) -> str:
    """A line of the table."""
    measured = evaluate_saes(model, saes, str(text), max_tokens=tokens, errors=False)
    fvu = [1 - site.explained_variance for site in measured.sites.values()]
    l0 = sum(site.l0 for site in measured.sites.values()) / len(fvu)
    cells = "".join(f"{value:>7.3f}" for value in [*fvu, sum(fvu) / len(fvu)])
    return f"{name:<34}{cells}  CE recovered {measured.spliced['all'].ce_recovered:.3f}  L0 {l0:.1f}"


# ---- sparsify, in its own interpreter


def sparsify_saes(
    python: str, cache: CachedActivations, config: TrainConfig, *, skip: bool, out: Path
) -> dict[Site, SparseAutoencoder]:
    """Its transcoders on the rows of the cache, at its defaults."""
    trained = {}
    for site in cache.model.sites:
        job = {"cache": str(cache.folder.resolve()), "layer": site.layer, "features": config.features, "k": config.k,
               "batch": config.batch, "steps": config.steps, "skip": skip,
               "out": str((out / site.name).resolve())}  # fmt: skip
        plain = {**os.environ, "SPARSIFY_DISABLE_TRITON": "1"}  # its kernels need a GPU
        subprocess.run([python, __file__, json.dumps(job)], check=True, stdout=subprocess.DEVNULL, env=plain)
        tensors = load_file(next((out / site.name).rglob("sae.safetensors")))
        renamed = {"W_enc": tensors["encoder.weight"], "b_enc": tensors["encoder.bias"], "W_dec": tensors["W_dec"],
                   "b_dec": tensors["b_dec"]}  # fmt: skip
        renamed |= {"W_skip": tensors["W_skip"]} if skip else {}
        made = SAEConfig("topk", len(tensors["b_dec"]), config.features, site.name, subtract_b_dec=False, k=config.k,
                         read="mlp_in")  # fmt: skip
        trained[site] = SparseAutoencoder(made, fold_norms(renamed, ranked=True))
    return trained


class Tables(nn.Module):
    """A model whose one layer takes row i of a table for the token i, and gives row i of another."""

    def __init__(self, read: Tensor, write: Tensor):
        super().__init__()
        self.read, self.device = read, read.device
        self.site = Table(write)
        self.dummy_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.int64)}

    @property
    def base_model(self) -> Tables:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        self.site.rows = input_ids
        return self.site(self.read[input_ids])


class Table(nn.Module):
    def __init__(self, table: Tensor):
        super().__init__()
        self.table, self.rows = table, torch.zeros(1, 2, dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        return self.table[self.rows]


def train_with_sparsify(job: dict[str, object]) -> None:
    """One transcoder of sparsify; runs in its interpreter."""
    from datasets import Dataset
    from sparsify import SaeConfig, Trainer
    from sparsify import TrainConfig as Config

    torch.set_num_threads(1)
    shards = [load_file(path) for path in sorted(Path(str(job["cache"])).glob("shard_*.safetensors"))]
    read, write = (
        torch.cat([shard[f"{kind}_{job['layer']}"] for shard in shards]).float() for kind in ("mlp_in", "mlp")
    )
    steps, batch = int(str(job["steps"])), int(str(job["batch"]))
    numbers = torch.arange(steps * batch).remainder(len(read))[torch.randperm(steps * batch)].view(steps, batch)
    rows = Dataset.from_dict({"input_ids": numbers.numpy()}).with_format("torch")
    coder = SaeConfig(num_latents=job["features"], k=job["k"], transcode=True, skip_connection=job["skip"])
    config = Config(coder, batch_size=1, hookpoints=["site"], log_to_wandb=False, save_dir=job["out"], run_name="run",
                    save_every=10**9)  # fmt: skip
    Trainer(config, rows, Tables(read, write)).fit()


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        train_with_sparsify(json.loads(sys.argv[1]))
    else:
        main()
