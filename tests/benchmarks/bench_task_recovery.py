"""How well every method recovers what exact patching finds on the bundled model's four tasks.

    python -m tests.benchmarks.bench_task_recovery [--saes RUN] [--methods ig attrib ...] [--pairs 24] [--nodes 40]

1. Every feature and error that differs between clean and patch prompt is patched by itself, in both directions: its
   exact effect is the mean of noising and denoising. True nodes are those whose exact effect is at least `--share` of
   the behaviour, |m(patch) - m(clean)|.
2. Every edge among the strongest `--nodes` nodes of (1) and to the metric is patched by itself in both directions
   (`circuits.attribution.path_patching`); true edges likewise.
3. Each method's |effects| and |edge weights| are scored against that: AUROC, precision of as many of the strongest as
   are true, and Pearson correlation with the exact effects. Edges take the method's own gradient where it has one, and
   that at the clean prompt otherwise.

Without `--saes`, autoencoders are trained first, as `sfc demo` trains them (two minutes).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from circuits.attribution.activations import ActivationPair, Setting, capture_activations
from circuits.attribution.baselines import activation_difference
from circuits.attribution.edges import Edges, edge_effects
from circuits.attribution.node_effects import Attribution, attribute
from circuits.attribution.nodes import Nodes, SiteNodes, aggregate, select_nodes
from circuits.attribution.path_patching import path_effects
from circuits.metrics.metrics import logit_difference
from circuits.options import METHODS
from circuits.prompts.dataset import load_prompts
from examples import agreement
from sae.autoencoder import SparseAutoencoder
from sae.model.language_model import LanguageModel
from sae.model.load import load_model
from sae.model.sites import Site
from sae.saes import load_saes
from sae.training.config import TrainConfig
from sae.training.train import train_saes
from tests.circuits.ground_truth import recovery

MAX_ROWS = 512


def node_scores(nodes: Nodes) -> dict[str, float]:
    """Node name -> effect."""
    return {
        name: effect
        for site, here in nodes.items()
        for name, effect in zip(here.ids(site), here.effect.tolist(), strict=True)
    }


def edge_scores(edges: Edges, nodes: Nodes) -> dict[tuple[str, str], float]:
    """(upstream, downstream name) -> weight."""
    names = {site: here.ids(site) for site, here in nodes.items()}
    return {
        (source, target): weight
        for (up, down), weights in edges.items()
        for target, row in zip(["metric"] if down is None else names[down], weights.tolist(), strict=True)
        for source, weight in zip(names[up], row, strict=True)
    }


class Task:
    """The exact effects of one prompt set, found once, and what a method says beside them."""

    def __init__(
        self, model: LanguageModel, saes: Mapping[Site, SparseAutoencoder], states: ActivationPair, *, n_edge_nodes: int
    ) -> None:
        self.model, self.saes, self.states = model, saes, states
        self.n = len(states.tokens)
        assert states.m_patch is not None
        self.total = (states.m_patch - states.m_clean).mean().item()
        exact = [self._nodes("exact", end) for end in (states, states.reversed())]
        noising, denoising = (node_scores(nodes) for nodes in exact)
        self.exact = {name: (noising.get(name, 0.0) - denoising.get(name, 0.0)) / 2 for name in {*noising, *denoising}}
        self.universe = {*self.exact, *node_scores(self._live())}
        self.among = self._strongest(n_edge_nodes)
        there, back = (
            edge_scores(path_effects(end, self.among, max_rows=MAX_ROWS), self.among)
            for end in (states, states.reversed())
        )
        self.exact_edges = {pair: (there[pair] - back[pair]) / 2 / self.n for pair in there}

    def _nodes(self, method: str, states: ActivationPair) -> Nodes:
        found = attribute(states, sites=list(self.saes), method=method, max_rows=MAX_ROWS, totals=False)  # fmt: skip
        self.gradients = found.gradients
        return aggregate(found.effects, n_examples=self.n, n_positions=states.mask.shape[1])

    def _live(self) -> Nodes:
        """Every node that differs between the prompts."""
        differences = {site: activation_difference(self.states, site=site) for site, sae in self.saes.items()}
        return aggregate(differences, n_examples=self.n, n_positions=self.states.mask.shape[1])

    def _strongest(self, n: int) -> Nodes:
        """The n nodes of largest exact effect."""
        nodes = {}
        for site, here in self._live().items():
            effect = torch.tensor([self.exact.get(name, 0.0) for name in here.ids(site)])
            nodes[site] = SiteNodes(here.n_features, here.feature, here.position, effect)
        return select_nodes(nodes, top=n)

    def estimated(self, method: str) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
        """A method's effects, and edge weights among the exactly strongest nodes."""
        nodes = node_scores(self._nodes(method, self.states))
        batch = Attribution(self.states, gradients=self.gradients)
        edges = edge_effects(batch, self.among, active="either", max_rows=MAX_ROWS)
        weights = edge_scores(edges, self.among)
        return nodes, {pair: weight / self.n for pair, weight in weights.items()}


def row(estimated: Mapping, exact: Mapping, universe, bound: float) -> str:
    """AUROC, precision at the number of true ones, and correlation, as text."""
    truth = {item for item, value in exact.items() if abs(value) >= bound}
    found = recovery(estimated, truth, universe)
    pairs = torch.tensor([(estimated.get(item, 0.0), exact.get(item, 0.0)) for item in universe])
    return f"{found.auroc:>7.3f}{found.precision_at_truth:>7.2f}{torch.corrcoef(pairs.T)[0, 1]:>7.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saes", help="run folder of the bundled model's autoencoders")
    parser.add_argument("--tasks", nargs="+", default=list(agreement.PROMPT_SETS), choices=agreement.PROMPT_SETS)
    parser.add_argument("--methods", nargs="+", default=[m for m in METHODS if m != "exact"], choices=METHODS)
    parser.add_argument("--pairs", type=int, default=24, help="prompt pairs of each task")
    parser.add_argument("--nodes", type=int, default=40, help="nodes among which every edge is patched")
    parser.add_argument("--share", type=float, default=0.01, help="of the behaviour, from where a node or edge is true")
    args = parser.parse_args()
    model = load_model(agreement.MODEL)
    with tempfile.TemporaryDirectory() as folder:
        if not args.saes:
            config = TrainConfig(features=256, k=8, tokens=400_000)
            train_saes(model, agreement.text("train"), config=config, out=folder)
        saes = load_saes(Path(args.saes or folder), device=model.device)
    for name in tqdm(args.tasks, desc="tasks"):
        prompts = load_prompts(agreement.prompts(name, "train"), model, limit=args.pairs)
        states = capture_activations(Setting(model, saes, logit_difference), prompts, sites=list(saes))
        task = Task(model, saes, states, n_edge_nodes=args.nodes)
        bound = args.share * abs(task.total)
        n_nodes, n_edges = (sum(abs(v) >= bound for v in x.values()) for x in (task.exact, task.exact_edges))
        print(f"\n{name}: {n_nodes} of {len(task.universe)} nodes and {n_edges} of {len(task.exact_edges)} edges carry "
              f"at least {args.share:.1%} of the behaviour ({len(prompts)} pairs)")  # fmt: skip
        print(f"{'':<22}{'nodes':^21}   {'edges':^21}\n{'method':<22}{'auroc':>7}{'p=r':>7}{'r':>7}   "
              f"{'auroc':>7}{'p=r':>7}{'r':>7}")  # fmt: skip
        for method in args.methods:
            nodes, edges = task.estimated(method)
            print(f"{method:<22}{row(nodes, task.exact, task.universe, bound)}   "
                  f"{row(edges, task.exact_edges, task.exact_edges, bound)}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
