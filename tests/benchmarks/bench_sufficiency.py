"""How few nodes suffice for a behaviour, and how few are necessary: features beside neurons.

`python -m tests.benchmarks.bench_sufficiency --saes RUN` takes the shared TinyStories model and its pronoun pairs,
finds circuits on the training pairs and scores them on the test pairs, from `attn_2` on and for all sites:

- features ranked by integrated gradients and by learned masks, with the autoencoders' errors as nodes, all kept, and
  all ablated;
- neurons, and the hidden neurons of the MLPs, ranked by both.

Columns: faithfulness at some sizes; nodes needed for .8 and .95 (log-linear between measured sizes) and their share of
all units there are at these sites; what is left without the 10, 20 and 50 strongest nodes. Without `--saes`,
dictionaries are trained first (TopK, 512 features, k 8, 500,000 tokens). Without the model it says so and ends.
`--task nounpp` takes a task of the bundled model instead (`--saes runs/demo`).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from circuits.attribution.activations import Setting
from circuits.attribution.nodes import Nodes
from circuits.comparison.compare import LEVELS, nodes_for
from circuits.discovery.discover import discover
from circuits.faithfulness.learned_mask import MaskOptions, learn_node_mask
from circuits.faithfulness.nodes import FaithfulnessOptions, measure_faithfulness
from circuits.faithfulness.results import NodeFaithfulness
from circuits.options import ABLATIONS, DiscoverOptions, Errors
from circuits.prompts.dataset import PromptSet, load_prompts
from sae.autoencoder import SparseAutoencoder
from sae.model.language_model import LanguageModel
from sae.model.load import load_model
from sae.model.sites import Site
from sae.neurons import DICTIONARIES
from sae.saes import load_saes
from sae.training.config import TrainConfig
from sae.training.train import train_saes

SIZES = (10, 20, 50, 75, 100, 130, 180, 240, 320, 450, 600, 750, 900, 1200, 1500)
SHOWN = {"all sites": (100, 180, 450, 900, 1500), "attn_2": (50, 100, 180, 450)}
OF_TASKS = (10, 20, 50, 100, 240)
"""Sizes that are shown for tasks of the bundled model."""
AGREEMENT = Path("examples/agreement")
WITHOUT = (10, 20, 50)


@dataclass(frozen=True)
class Study:
    """What circuits are found on, scored on, and made of."""

    model: LanguageModel
    train: PromptSet
    test: PromptSet
    ablation: str
    errors: list[str]
    steps: int

    def curve(self, saes: Mapping[Site, SparseAutoencoder], nodes: Nodes, start: str | None, errors: str):
        """Faithfulness and completeness on the test prompts."""
        options = FaithfulnessOptions(
            ablation=self.ablation, start_site=start, errors=errors, random=0, resamples=0
        )  # fmt: skip
        return measure_faithfulness(
            Setting.of(self.model, saes), nodes, self.test, options, sizes=SIZES, reference=self.train, progress=False
        )

    def mask(self, saes: Mapping[Site, SparseAutoencoder], nodes: Nodes, start: str | None, errors: str) -> Nodes:
        """The ranking of a mask learned on the training prompts."""
        options = MaskOptions(start_site=start, errors=errors, ablation=self.ablation, steps=self.steps)
        return learn_node_mask(Setting.of(self.model, saes), nodes, self.train, options, progress=False).nodes


def row(name: str, curve: NodeFaithfulness, units: int, shown: tuple[int, ...], seconds: float) -> str:
    """A line of the table."""

    def at(values: list[float], size: int) -> str:
        return f"{values[curve.sizes.index(size)]:.2f}" if size in curve.sizes else "-"

    needed = [nodes_for(curve.sizes, curve.faithfulness, level) for level in LEVELS]
    cells = [at(curve.faithfulness, size) for size in shown]
    cells += [text for n in needed for text in (("-", "") if n is None else (f"{n:.0f}", f"{n / units:.1%}"))]
    cells += [at(curve.completeness, size) for size in WITHOUT]
    return f"{name:<26}" + "".join(f"{cell:>7}" for cell in [*cells, f"{seconds:.0f}"])


@dataclass(frozen=True)
class Found:
    """A dictionary and its nodes by integrated gradients."""

    name: str
    saes: Mapping[Site, SparseAutoencoder]
    nodes: Nodes
    seconds: float

    @staticmethod
    def of(study: Study, name: str, saes: Mapping[Site, SparseAutoencoder]) -> Found:
        """Effects on the training prompts."""
        begin = time.perf_counter()
        nodes = discover(study.model, saes, study.train, DiscoverOptions(edge_nodes=0), progress=False).nodes
        return Found(name, saes, nodes, time.perf_counter() - begin)


def table(study: Study, dictionaries: list[Found], start: str | None, shown: tuple[int, ...]) -> None:
    """Print one table: all rows from a start site on."""
    name = start or "all sites"
    head = [*map(str, shown), *(text for level in LEVELS for text in (f"n({level})", "")), *(f"-{n}" for n in WITHOUT)]
    print(f"\n{name}, others ablated by {study.ablation}: {len(study.train)} training, {len(study.test)} test pairs")
    print(f"{'':<26}" + "".join(f"{cell:>7}" for cell in [*head, "s"]), flush=True)
    for found in dictionaries:
        sites = [site for site in found.saes if start is None or site >= Site.parse(start)]
        features = sum(len(found.saes[site].W_dec) for site in sites)
        for errors in study.errors if found.name not in DICTIONARIES else ["nodes"]:
            label = f"errors {errors}" if found.name not in DICTIONARIES else found.name
            units = features + len(sites) * (label == "errors nodes")
            for method in ("ig", "mask"):
                begin = time.perf_counter()
                first = None if start is None else sites[0].name
                ranked = found.nodes if method == "ig" else study.mask(found.saes, found.nodes, first, errors)
                seconds = found.seconds + time.perf_counter() - begin
                curve = study.curve(found.saes, ranked, first, errors)
                print(row(f"{label}, {method}", curve, units, shown, seconds), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saes", help="run folder with autoencoders of the shared model")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with models/ and data/")
    parser.add_argument("--starts", nargs="+", default=["attn_2", "all"], help="start sites; all for the first")
    parser.add_argument("--ablation", default="mean", choices=ABLATIONS)
    parser.add_argument(
        "--errors", nargs="+", default=list(get_args(Errors)), choices=get_args(Errors), help="what is done with errors"
    )
    parser.add_argument("--steps", type=int, default=MaskOptions.steps, help="steps of learned masks")
    parser.add_argument("--examples", type=int, help="training pairs; all by default")
    parser.add_argument("--task", help="a task of the bundled model, such as nounpp, in place of the shared one's")
    args = parser.parse_args()
    folder, data = args.shared / "models" / "tinystories-260k", args.shared / "data"
    text, pairs = data / "tinystories" / "train.jsonl", data / "pronoun_gender"
    if args.task:
        folder, text, pairs = AGREEMENT / "model", AGREEMENT / "text" / "train.txt", AGREEMENT / "prompts" / args.task
    if not folder.is_dir():
        print(f"no model in {str(folder)!r}: nothing to measure")
        return
    torch.set_num_threads(1)
    model = load_model(str(folder))
    if args.saes:
        saes = load_saes(args.saes)
    else:
        with tempfile.TemporaryDirectory() as out:
            config = TrainConfig(features=512, k=8, tokens=500_000)
            saes = train_saes(model, str(text), config=config, out=out)
    found_on = load_prompts(pairs / "train.jsonl", model, limit=args.examples)
    test = load_prompts(pairs / "test.jsonl", model)
    study = Study(model, found_on, test, args.ablation, args.errors, args.steps)
    bases = [Found.of(study, "features", saes)]
    bases += [Found.of(study, name, make(model)) for name, make in DICTIONARIES.items()]
    for start in args.starts:
        shown = OF_TASKS if args.task else SHOWN["all sites" if start == "all" else "attn_2"]
        table(study, bases, None if start == "all" else start, shown)


if __name__ == "__main__":
    main()
