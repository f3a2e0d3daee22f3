"""Verified circuits: the strongest nodes patched for real, beside what was estimated of them.

1. Take the n nodes of largest |effect|.
2. Patch each of them alone, in every prompt, from its clean to its patch value
   (`circuits.attribution.activation_patching`): at all positions at once, or at its own position or span where the
   circuit keeps them.
3. A node disagrees in `sign`, or in `size` where estimate and exact effect are more than a factor of two apart.

This is exact noising: what a node does to the clean run by itself. Attribution patching estimates it. Integrated
gradients give a node's share in moving its whole site to the patch run, with others on the way, and may differ rightly:
in the demo embed/90 has 2.67 by integrated gradients, 2.25 as the mean over random orders of patching the features of
its site one after the other, and .25 alone, from either end. The mark says that the drawn number is not what patching
this node alone does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch

from circuits._results import format_table
from circuits.attribution.activation_patching import exact_effects
from circuits.attribution.activations import capture_activations
from circuits.attribution.effects import SiteEffects
from circuits.attribution.nodes import SiteNodes, ranked
from circuits.circuit import Circuit
from circuits.metrics.metrics import Metric
from circuits.prompts.dataset import PromptSet
from sae._frames import Result
from sae._progress import ProgressBar
from sae.errors import UserError

FACTOR = 2.0
"""Estimates further than this factor from the exact effect disagree in size."""


@dataclass(frozen=True)
class Verification(Result):
    """Exact beside estimated effects, strongest node first."""

    names: list[str]
    """Nodes, `resid_3/120` or with a position `resid_3/120@5`."""
    estimated: list[float]
    """Effects as the circuit has them."""
    exact: list[float]
    """Mean over prompts of m(the node alone patched) - m(clean)."""
    shared: bool = False
    """Whether the estimates are shares in moving the whole site (integrated gradients)."""

    @property
    def disagreements(self) -> dict[str, str]:
        """Node -> `sign` or `size`, for those that disagree."""
        rows = zip(self.names, self.estimated, self.exact, strict=True)
        kinds = {name: disagreement(estimated, exact) for name, estimated, exact in rows}
        return {name: kind for name, kind in kinds.items() if kind}

    @property
    def correlation(self) -> float | None:
        """Pearson correlation of estimated and exact effects; None for fewer than three nodes."""
        if len(self.names) < 3:
            return None
        r = torch.corrcoef(torch.tensor([self.estimated, self.exact], dtype=torch.float64))[0, 1].item()
        return r if r == r else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; `nodes` are attributes of the graph's nodes."""
        marks = self.disagreements
        return {
            "n": len(self.names),
            "correlation": self.correlation,
            "disagree": marks,
            "summary": self.summary(),
            "nodes": {
                name: {"exact_effect": exact, **({"disagrees": marks[name]} if name in marks else {})}
                for name, exact in zip(self.names, self.exact, strict=True)
            },
        }

    def to_frame(self) -> pd.DataFrame:
        """One row a node: node, estimated, exact, and `sign` or `size` where they disagree."""
        frame = pd.DataFrame({"node": self.names, "estimated": self.estimated, "exact": self.exact})
        return frame.assign(disagrees=[self.disagreements.get(name, "") for name in self.names])

    def text(self) -> str:
        """The summary, and a row a node."""
        table = self.to_frame().set_index("node").rename_axis(None)
        table = table.assign(**{name: table[name].map("{:+.3f}".format) for name in ("estimated", "exact")})
        return f"{self.summary()}\n{format_table(table)}"

    def summary(self) -> str:
        """One line for the terminal."""
        kinds = list(self.disagreements.values())
        r = "" if self.correlation is None else f", correlation {self.correlation:.3f}"
        marked = [f"{kinds.count(kind)} disagree in {kind}" for kind in ("sign", "size") if kind in kinds]
        text = f"verified {len(self.names)} nodes by exact patching{r}: {' and '.join(marked) or 'all agree'}"
        why = (
            "; integrated gradients give a node's share in moving its whole site, which is more than patching it alone "
            "does where features stand in for one another"
        )
        return text + (why if self.shared and "size" in kinds else "")


def disagreement(estimated: float, exact: float) -> str | None:
    """`sign` where the two point apart, `size` where one is more than FACTOR times the other, else None."""
    if estimated * exact < 0:
        return "sign"
    small, large = sorted((abs(estimated), abs(exact)))
    return "size" if large > FACTOR * small else None


def verify(
    circuit: Circuit,
    prompts: PromptSet | None = None,
    *,
    nodes: int = 20,
    metric: str | Metric | None = None,
    batch_size: int = 16,
    max_rows: int = 512,
    progress: bool = True,
) -> Verification:
    """Patch the strongest nodes of a circuit one by one, and compare with the estimates.

    Args:
        circuit: The circuit, whose model, SAEs and metric are used.
        prompts: The prompts to patch; those the circuit was found on by default.
        nodes: How many of the strongest nodes.
        metric: The circuit's own, given again where it is Python code and the circuit is from a file.
        batch_size: Prompts whose activations are held at once.
        max_rows: Patched prompts that go through the model at once.
        progress: Whether to show a progress bar.

    Returns:
        Exact beside estimated effects, in units of the metric.

    Raises:
        UserError: If `nodes` is below 1.
    """
    if nodes < 1:
        raise UserError(f"verify is {nodes}: at least 1 node can be verified")
    setting = circuit.setting(metric)
    prompts = setting.prepare(circuit.prompts if prompts is None else prompts)
    chosen = {site: site_nodes for site, site_nodes in circuit.strongest(nodes).items() if len(site_nodes)}
    totals = {site: torch.zeros(len(site_nodes), dtype=torch.float64) for site, site_nodes in chosen.items()}
    n_batches = -(-len(prompts) // batch_size)
    with ProgressBar(total=n_batches * len(chosen), desc="verify", unit="site", disable=not progress) as bar:
        for batch in prompts.batches(batch_size):
            states = capture_activations(setting, batch)
            for site, site_nodes in chosen.items():
                where = None if site_nodes.summed else site_nodes.token_positions(states.prompts)
                effects = exact_effects(
                    states, site=site, positions=where if where is None else where.expand(len(batch), -1),
                    features=site_nodes.feature.unique(), max_rows=max_rows,
                )  # fmt: skip
                totals[site] += _total(effects, site_nodes)
                bar.update()
    shared = circuit.metadata["options"]["method"] in ("ig", "ig-adaptive")
    exact = {
        name: total / len(prompts)
        for site, site_nodes in chosen.items()
        for name, total in zip(site_nodes.ids(site), totals[site].tolist(), strict=True)
    }
    estimated = dict(ranked(chosen))
    return Verification(list(estimated), list(estimated.values()), [exact[name] for name in estimated], shared=shared)


def _total(effects: SiteEffects, nodes: SiteNodes) -> torch.Tensor:
    """Sum over examples of the effects of these nodes, [n]."""
    same = (effects.feature == nodes.feature[:, None]) & (effects.position == nodes.position[:, None])  # [n, entries]
    return same.double() @ effects.value.double()


def verified(circuit: Circuit, verification: Verification) -> Circuit:
    """The circuit with the verification in its metadata, from where its graphs take exact effects and marks."""
    return replace(circuit, metadata={**circuit.metadata, "verification": verification.to_dict()})
