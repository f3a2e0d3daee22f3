"""`sfc supernodes`: groups of features that are shown and edited as one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from circuits.cli.options import HasCircuit, Output, Prints
from sae._options import Positive, Range
from sae._run.locks import lock
from sae.errors import UserError

if TYPE_CHECKING:
    from circuits.circuit import Circuit
    from graphs.schema import SupernodeFile


@dataclass(frozen=True, kw_only=True)
class SupernodesCommand(Prints, HasCircuit):
    """Group features that read and feed the same nodes into supernodes, which drawings, pages, exports and edits know;
    or make a group by hand with --name and --members. Groups made by hand stay.
    """

    similarity: Annotated[float, Range(0, 1, above=True)] = 0.7
    """The least cosine between the edges, in and out, of any two features of a group."""
    nodes: Positive = 100
    """Nodes that take part at most, the strongest."""
    name: str | None = None
    """Make a group of this name by hand, of the nodes of --members; without them, remove it."""
    members: str | None = None
    """Nodes of the group --name, such as resid_1/12@subject,resid_2/7@subject."""
    read: Path | None = None
    """Take groups from a file: what the explorer saved, or a graph that was saved in circuit-tracer's or Neuronpedia's
    viewer.
    """
    show: bool = False
    """Group nothing: print the groups there are."""

    def run(self) -> Output:
        from circuits.circuit import Circuit, circuit_folder
        from circuits.labels import as_groups, without_members, write_supernodes

        if self.members is not None and self.name is None:
            raise UserError("members are given without a name of their group: give --name as well")
        folder = circuit_folder(self.circuit)
        with lock(folder.parent, shared=True):
            circuit = Circuit.load(self.circuit)
            digest = circuit.metadata.get("digest")
            if self.show:
                return _output(circuit, circuit.supernodes, "")
            groups = self._by_hand(circuit)
            if groups is None:
                by_hand = [group for group in circuit.supernodes if not group.get("automatic")]
                made = as_groups(circuit.find_supernodes(nodes=self.nodes, similarity=self.similarity), automatic=True)
                groups = by_hand + without_members(made, by_hand)
            path = write_supernodes(folder, groups, digest=digest, similarity=self.similarity)
        return _output(circuit, groups, f"wrote {path}")

    def _by_hand(self, circuit: Circuit) -> list[SupernodeFile] | None:
        """The groups with those that a person gives; None where none are given."""
        from circuits.labels import with_group, without_members

        if self.name is not None:
            names = [name.strip() for name in (self.members or "").split(",") if name.strip()]
            ids = [id for site, nodes in circuit.nodes.items() for id in nodes.ids(site)]
            return with_group(circuit.supernodes, self.name, names, ids)
        if self.read is None:
            return None
        given = _read(self.read)
        others = [group for group in circuit.supernodes if group["name"] not in {new["name"] for new in given}]
        return given + without_members(others, given)


def _read(path: Path) -> list[SupernodeFile]:
    """The groups of a file of the explorer or of a viewer; UserError where it holds none."""
    from circuits.labels import SupernodesFile, as_groups
    from graphs.formats.neuronpedia import from_neuronpedia
    from sae._files import check_type, read_json

    data = read_json(path)
    if "nodes" in data and "links" in data:
        groups = as_groups(from_neuronpedia(data, source=path).supernodes, automatic=False)
    else:
        groups = check_type(data, SupernodesFile, path)["groups"]
    if not groups:
        raise UserError(f"{path}: holds no supernodes")
    return [{**group, "automatic": False} for group in groups]  # type: ignore[typeddict-item]


def _output(circuit: Circuit, groups: list[SupernodeFile], wrote: str) -> Output:
    """A line a group: its name, how many nodes, their summed effect and the strongest of them."""
    effects = {
        id: effect
        for site, nodes in circuit.nodes.items()
        for id, effect in zip(nodes.ids(site), nodes.effect.tolist(), strict=True)
    }
    rows: list[dict[str, Any]] = []
    for group in groups:
        nodes = sorted((id for id in group["nodes"] if id in effects), key=lambda id: -abs(effects[id]))
        rows.append({**group, "nodes": nodes, "effect": sum(effects[id] for id in nodes)})
    rows.sort(key=lambda row: -abs(row["effect"]))
    wide = max((len(row["name"]) for row in rows), default=0)
    lines = [
        f"{row['name']:<{wide}} {len(row['nodes']):>4} nodes {row['effect']:+9.4f}  {', '.join(row['nodes'][:4])}"
        f"{', ...' if len(row['nodes']) > 4 else ''}{'' if row.get('automatic') else '  (by hand)'}"
        for row in rows
    ]
    return Output("\n".join([*lines, *([wrote] if wrote else [])]) or "no supernodes yet", {"supernodes": rows})
