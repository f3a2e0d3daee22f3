"""Supernodes of a circuit: named groups of its nodes, in `supernodes.json` beside `circuit.json`.

    {"schema_version": 1, "kind": "supernodes", "digest": "0f3a...", "similarity": 0.7,
     "groups": [{"name": "plural subject", "nodes": ["resid_1/12@subject"], "collapsed": true, "automatic": true}]}

1. What the explorer saves has the same `groups`, and may be put there as it is.
2. Groups that a person made stay when the circuit is discovered again; automatic ones are of the circuit with the
   `digest` and are not shown beside another. Nodes that a circuit does not have are left out wherever it is shown.
3. A group that a person made takes its nodes out of automatic ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import NotRequired, TypedDict

from graphs.schema import SupernodeFile
from graphs.supernodes import clean_name, find_named
from sae._files import read_json, write_json
from sae._run.outputs import check_output, is_json
from sae.errors import UserError, unknown

SUPERNODES_FILE = "supernodes.json"
SCHEMA_VERSION = 1


class SupernodesFile(TypedDict):
    """The file, or what the explorer saved."""

    groups: list[SupernodeFile]
    digest: NotRequired[str | None]


def read_supernodes(folder: Path, digest: str | None) -> list[SupernodeFile]:
    """The groups of the circuit in a folder, whose digest is given: those of people, then automatic ones of this very
    circuit; none where there is no file.
    """
    path = folder / SUPERNODES_FILE
    if not path.is_file():
        return []
    data = read_json(path, SupernodesFile)
    by_hand = [group for group in data["groups"] if not group.get("automatic")]
    automatic = [group for group in data["groups"] if group.get("automatic")] if data.get("digest") == digest else []
    return by_hand + without_members(automatic, by_hand)


def without_members(groups: Iterable[SupernodeFile], others: Iterable[SupernodeFile]) -> list[SupernodeFile]:
    """Groups without the nodes that other groups have; those of fewer than two nodes then are left out."""
    taken = {node for group in others for node in group["nodes"]}
    smaller: list[SupernodeFile] = []
    for group in groups:
        nodes = [node for node in group["nodes"] if node not in taken]
        if len(nodes) > 1:
            smaller.append({**group, "nodes": nodes})  # type: ignore[typeddict-item]
    return smaller


def write_supernodes(folder: Path, groups: Sequence[SupernodeFile], *, digest: str | None, **made_with: Any) -> Path:
    """Write the groups of the circuit in a folder; UserError for a file of another program of this name."""
    path = folder / SUPERNODES_FILE
    data = {
        "schema_version": SCHEMA_VERSION, "kind": "supernodes", "digest": digest, **made_with, "groups": list(groups),
    }  # fmt: skip
    check_output(path, is_json(lambda entries: isinstance(entries.get("groups"), list)))
    write_json(path, data)
    return path


def with_named(
    groups: Iterable[SupernodeFile], name: str, nodes: Sequence[str], known: Iterable[str]
) -> list[SupernodeFile]:
    """The groups with one of this name, in place of an earlier one; without nodes, the groups without it.

    known: ids of the circuit's nodes. Raises UserError for a name with a sign that means something in names of
    features, for one that there is not where it is to be removed, or for a node that is not in the circuit.
    """
    if not name or clean_name(name) != name:
        raise UserError(f"{name!r} is no name of a supernode: give words without / , @ and :")
    known = set(known)
    for node in nodes:
        if node not in known:
            raise UserError(f"{node!r} is no node of this circuit, which has such as {min(known, default='none')}")
    same = find_named(name, by_name(groups))
    if not nodes and same is None:
        raise UserError(f"there is no supernode {name!r} to remove")
    others = [group for group in groups if group["name"] != same]
    made: list[SupernodeFile] = [{"name": name, "nodes": list(dict.fromkeys(nodes)), "collapsed": True}]
    others = [{**g, "nodes": [n for n in g["nodes"] if n not in nodes]} for g in others]  # type: ignore[typeddict-item]
    return (made if nodes else []) + [group for group in others if group["nodes"]]


def by_name(groups: Iterable[SupernodeFile]) -> dict[str, list[str]]:
    """Name -> ids of the nodes."""
    return {group["name"]: group["nodes"] for group in groups}


def members(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The features of the supernode that is meant; UserError where there is none of this name."""
    found = find_named(name, groups)
    if found is None:
        made = "" if groups else ": make some with sfc supernodes"
        raise UserError(f"there is no supernode {name!r}{made}") if made else unknown("supernode", name, groups)
    return [node for node in groups[found] if node.partition("@")[0].rpartition("/")[2].isdecimal()]


def as_groups(supernodes: Mapping[str, Sequence[str]], *, automatic: bool) -> list[SupernodeFile]:
    """Groups by name as files and metadata have them."""
    return [
        SupernodeFile(name=name, nodes=list(nodes), collapsed=True, automatic=automatic)
        for name, nodes in supernodes.items()
    ]
