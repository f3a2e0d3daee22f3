"""Effects of a model in bfloat16 and with weights in 8 and 4 bits beside those in float32.

    python -m tests.benchmarks.bench_precision [--saes RUN] [--model MODEL] [--prompts FILE] [--examples 40]

For each number type: the share of the sites' total that the effects miss (the sum check), Spearman's rank correlation
of |effect| over all nodes, and how many of the 10 and 100 strongest nodes of float32 are among the strongest; with
integrated gradients and with attribution patching. The last row has other prompts of the same behaviour in float32,
for what no number type can be asked to beat. Autoencoders are trained for it where none are given.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile

import torch
from scipy.stats import spearmanr

from circuits.circuit import Circuit
from circuits.cli.commands.demo import bundled
from circuits.discovery.discover import discover
from circuits.options import DiscoverOptions
from circuits.prompts.dataset import load_prompts
from sae.model.load import load_model
from sae.saes import load_saes
from sae.training.config import TrainConfig
from sae.training.train import train_saes

KINDS = {"float32": {}, "bfloat16": {"dtype": "bfloat16"}, "8bit": {"quantize": "8bit"}, "4bit": {"quantize": "4bit"}}


def effects_of(circuit: Circuit) -> dict[str, float]:
    """|effect| by name of every node with one."""
    frame = circuit.nodes_frame()
    return dict(zip(frame["node"], frame["effect"].abs(), strict=True))


def overlap(expected: dict[str, float], found: dict[str, float], k: int) -> float:
    """Share of the k strongest nodes that are the same."""
    strongest = [set(sorted(effects, key=lambda name: -effects[name])[:k]) for effects in (expected, found)]
    return len(strongest[0] & strongest[1]) / min(k, len(strongest[0]))


def rank_correlation(expected: dict[str, float], found: dict[str, float]) -> float:
    """Spearman's over the nodes that either has."""
    names = sorted({*expected, *found})
    pairs = [[effects.get(name, 0.0) for name in names] for effects in (expected, found)]
    return float(spearmanr(*pairs).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=bundled("model"))
    parser.add_argument("--saes")
    parser.add_argument("--prompts", default=bundled("prompts", "nounpp", "train.jsonl"))
    parser.add_argument("--examples", type=int, default=40)
    options = parser.parse_args()
    plain = load_model(options.model)
    if options.saes:
        saes = load_saes(options.saes)
    else:
        config = TrainConfig(features=256, k=8, tokens=400_000)
        saes = train_saes(plain, bundled("text", "train.txt"), config=config, out=tempfile.mkdtemp())
    prompts = load_prompts(options.prompts, plain, limit=2 * options.examples)
    halves = {"": prompts[: options.examples], "other prompts": prompts[options.examples :]}
    kinds = {name: kind for name, kind in KINDS.items() if "quantize" not in kind or has_bitsandbytes()}
    print(f"{'':14}{'method':8}{'missed':>8}{'Spearman':>10}{'top 10':>8}{'top 100':>9}")
    for method in ("ig", "attrib"):
        expected: dict[str, float] = {}
        discovery = DiscoverOptions(method=method, edge_nodes=0)
        for name, kind, half in [
            *((name, kind, "") for name, kind in kinds.items()),
            *[(h, {}, h) for h in halves if h],
        ]:
            model = load_model(options.model, **kind)
            circuit = discover(model, saes, halves[half], discovery, progress=False)
            found = effects_of(circuit)
            expected = expected or found
            missed = (circuit.metadata["completeness"] or {}).get("mean_residual", float("nan"))
            print(
                f"{name:14}{method:8}{missed:8.1%}{rank_correlation(expected, found):10.3f}"
                f"{overlap(expected, found, 10):8.0%}{overlap(expected, found, 100):9.0%}",
                flush=True,
            )


def has_bitsandbytes() -> bool:
    """Whether weights can be held in 8 and 4 bits here."""
    return importlib.util.find_spec("bitsandbytes") is not None


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
