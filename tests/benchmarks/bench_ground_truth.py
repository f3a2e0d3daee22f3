"""How well every node method recovers circuits that are known because their weights were set by hand.

`python -m tests.benchmarks.bench_ground_truth` prints, for the induction and the number circuit of
`tests.circuits.ground_truth`, AUROC over all features and errors, precision (and recall) of as many of the strongest
nodes as are true, the same for edges between all nodes and between features alone, and precision at recalls of a half
and of all true nodes. Edges come from the gradient of the method where it has one.
"""

from __future__ import annotations

import argparse

import torch

from circuits.discovery.discover import discover
from circuits.options import METHODS, DiscoverOptions
from tests.circuits.attribution.test_ground_truth import edge_scores, node_scores
from tests.circuits.ground_truth import GroundTruth, Recovery, agreement, induction, recovery

TASKS = {"induction": (induction, "sum"), "agreement": (agreement, "position")}


def recovered(truth: GroundTruth, method: str, aggregation: str) -> tuple[Recovery, Recovery, Recovery]:
    """Of the nodes, of all edges, and of the edges between features."""
    options = DiscoverOptions(method=method, aggregation=aggregation, edge_nodes=2000)
    circuit = discover(truth.model, truth.saes, truth.prompts, options, progress=False)
    nodes, edges = node_scores(circuit), edge_scores(circuit)
    everything = {*nodes, *truth.nodes, *(truth.all_nodes() if aggregation == "sum" else ())}
    pairs = {*edges, *truth.edges}
    between_features = [pair for pair in pairs if not any("error" in end for end in pair)]
    return (
        recovery(nodes, truth.nodes, everything),
        recovery(edges, truth.edges, pairs),
        recovery(edges, truth.edges, between_features),
    )


def precision_at(result: Recovery, recall: float) -> float:
    """Precision at the first threshold that reaches this recall."""
    return next(p for p, r in zip(result.precision, result.recall, strict=True) if r >= recall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for task, (make, aggregation) in TASKS.items():
        truth = make()
        print(f"\n{task}: {len(truth.nodes)} true nodes, {len(truth.edges)} true edges, {len(truth.prompts)} pairs")
        print(f"{'':22}{'nodes':^28}{'edges':^16}{'between features':^18}")
        print(
            f"{'method':<22}{'auroc':>7}{'p=r':>7}{'p@r=.5':>7}{'p@r=1':>7}{'auroc':>9}{'p=r':>7}{'auroc':>9}{'p=r':>7}"
        )
        for method in args.methods:
            nodes, edges, between = recovered(truth, method, aggregation)
            print(
                f"{method:<22}{nodes.auroc:>7.3f}{nodes.precision_at_truth:>7.2f}{precision_at(nodes, 0.5):>7.2f}"
                f"{precision_at(nodes, 1):>7.2f}{edges.auroc:>9.3f}{edges.precision_at_truth:>7.2f}"
                f"{between.auroc:>9.3f}{between.precision_at_truth:>7.2f}"
            )


if __name__ == "__main__":
    main()
