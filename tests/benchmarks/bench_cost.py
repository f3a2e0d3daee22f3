"""How the cost of node effects and edges grows with edge nodes, prompts, layers, features and width.

`python -m tests.benchmarks.bench_cost --out cost.svg` varies one size at a time around a base (GPT-NeoX of 3 layers and
width 256, dictionaries of 1,024 features, 16 prompts of 8 tokens, 96 edge nodes), takes the median processor time of
one thread over `--repeats` interleaved rounds, prints a table with the slope in log-log coordinates (1 is linear), and
draws one panel a size.

Expected: everything is linear in prompts and, from some size on, in the features of a dictionary; edges are linear in
edge nodes. What goes site by site and resumes there (`ig`, the measured totals of sites) runs half of the model at
three times as many sites as layers, so it grows with the square of the layers; what takes all sites from the same
passes (`attrib`, `relp`, `ig-inputs`) grows linearly. The model's own matrix products grow with the square of its
width, those of a dictionary with the width.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from circuits.attribution.activations import Setting, capture_activations, site_total_effect
from circuits.attribution.edges import edge_effects
from circuits.attribution.node_effects import Attribution, attribute
from circuits.attribution.nodes import aggregate, select_nodes
from circuits.discovery.batching import lanes_rows, max_rows
from circuits.metrics.metrics import logit_difference
from tests.benchmarks.bench_circuit import make_model, make_prompts, make_saes

VOCAB, LENGTH, STEPS = 1024, 8, 3
COLOURS = {
    "attrib": "#1b6ca8",
    "relp": "#6a9f3a",
    "ig-inputs": "#8a5fb0",
    "ig": "#c1440e",
    "site totals": "#999999",
    "edges": "#d8a100",
}


@dataclass(frozen=True)
class Sizes:
    """What is varied."""

    nodes: int = 96
    """edge nodes"""
    prompts: int = 16
    """prompts"""
    layers: int = 3
    """layers"""
    features: int = 1024
    """features of a dictionary"""
    width: int = 256
    """width of the model"""


GRID = {
    "nodes": ("edge nodes", [24, 48, 96, 192, 384]),
    "prompts": ("prompts", [4, 8, 16, 32, 64]),
    "layers": ("layers", [2, 3, 4, 6, 8]),
    "features": ("features of a dictionary", [512, 1024, 2048, 4096, 8192]),
    "width": ("width of the model", [128, 192, 256, 384, 512]),
}


class Case:
    """One setting, with everything that is timed as a function."""

    def __init__(self, sizes: Sizes, device: str) -> None:
        self.model = make_model(sizes.layers, sizes.width, VOCAB, device)
        self.saes = make_saes(self.model, sizes.features)
        self.prompts = make_prompts(sizes.prompts, LENGTH, VOCAB, device)
        self.rows = max_rows(self.model, LENGTH, memory=1.0)
        self.sites = self.model.sites
        self.states = capture_activations(
            Setting(self.model, self.saes, logit_difference), self.prompts, sites=self.sites
        )
        found = attribute(self.states, sites=self.sites, method="attrib", totals=False)
        nodes = aggregate(found.effects, n_examples=sizes.prompts, n_positions=LENGTH)
        self.gradients, self.nodes = found.gradients, select_nodes(nodes, top=sizes.nodes)

    def node_effects(self, method: str) -> None:
        """Activations, gradients and effects of all sites, without the totals they are held against."""
        at_clean = method == "attrib"
        states = capture_activations(
            Setting(self.model, self.saes, logit_difference), self.prompts, sites=self.sites, gradient=at_clean
        )
        attribute(states, sites=self.sites, method=method, steps=STEPS, totals=False, max_rows=self.rows)  # fmt: skip

    def totals(self) -> None:
        """Every site patched whole."""
        for site in self.sites:
            site_total_effect(self.states, site=site)

    def edges(self) -> None:
        """Edges among the nodes, in batches as `discover` makes them."""
        rows = lanes_rows(self.rows, LENGTH, self.model.device)
        edge_effects(Attribution(self.states, gradients=self.gradients), self.nodes, max_rows=rows)

    def steps(self, size: str) -> dict[str, Callable[[], None]]:
        """What is timed when `size` varies; edge nodes matter to edges alone."""
        methods = ("attrib", "relp", "ig-inputs", "ig")
        node_steps = {name: lambda name=name: self.node_effects(name) for name in methods} | {
            "site totals": self.totals
        }
        return ({} if size == "nodes" else node_steps) | {"edges": self.edges}


def seconds(work: Callable[[], None], device: str) -> float:
    """Processor seconds, wall clock on a GPU."""
    cuda = device.startswith("cuda")
    start = time.perf_counter() if cuda else time.process_time()
    work()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() if cuda else time.process_time()) - start


def measure(size: str, values: list[int], repeats: int, device: str) -> dict[str, list[float]]:
    """Median seconds of every step at every value of one size."""
    cases = [Case(replace(Sizes(), **{size: value}), device) for value in values]
    times: dict[str, list[list[float]]] = {name: [[] for _ in values] for name in cases[0].steps(size)}
    for round_ in range(repeats + 1):
        for column, case in enumerate(cases):
            for name, step in case.steps(size).items():
                took = seconds(step, device)
                if round_:  # the first warms up
                    times[name][column].append(took)
    del cases
    gc.collect()
    return {name: [statistics.median(column) for column in columns] for name, columns in times.items()}


def slope(values: list[int], times: list[float]) -> float:
    """Least-squares slope of log seconds over log size; over the last two points, overheads weigh least."""
    return float(np.polyfit(np.log(values), np.log(times), 1)[0])


def plot(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """A panel a size, log-log, the slope behind each name; the dotted line is linear."""
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    for axes, (size, columns) in zip(panels, found.items(), strict=False):
        label, values = GRID[size]
        for name, times in columns.items():
            text = f"{name}  {slope(values, times):.2f}, {slope(values[-2:], times[-2:]):.2f}"
            axes.plot(values, times, "o-", color=COLOURS[name], ms=4, lw=1.4, label=text)
        middle = [times[len(values) // 2] for times in columns.values()]
        anchor = float(np.exp(np.mean(np.log(middle))))
        axes.plot(values, [anchor * v / values[len(values) // 2] for v in values], ":", color="0.6", lw=1.2)
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds")
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, title="slope in all, at the end", title_fontsize=8, loc="upper left")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (1.3 if len(columns) == 1 else 14))  # room for the legend
    for axes in panels[len(found) :]:
        axes.axis("off")
        base = "\n".join(f"{label}: {getattr(Sizes(), size):,}" for size, (label, _) in GRID.items())
        text = f"Else\n{base}\ntokens of a prompt: {LENGTH}\nnodes of ig and ig-inputs: {STEPS}\n\ndotted: linear"
        axes.text(0.05, 0.95, text, va="top", fontsize=9, color="0.3")
    figure.savefig(path, format=path.suffix[1:], dpi=130)


def main() -> None:
    """Print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", default=",".join(GRID), help="which sizes to vary")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("cost.svg"), help=".svg, .png or .pdf")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for size in args.sizes.split(","):
        label, values = GRID[size]
        found[size] = measure(size, values, args.repeats, args.device)
        print(f"{label:26}" + "".join(f"{value:>9,}" for value in values) + "    slope   at the end")
        for name, times in found[size].items():
            print(f"  {name:24}" + "".join(f"{t:9.3f}" for t in times) + f"{slope(values, times):9.2f}", end="")
            print(f"{slope(values[-2:], times[-2:]):13.2f}", flush=True)
    plot(found, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
