"""Names of features and of groups of them: `labels.jsonl` and `supernodes.json`.

One file of names for each set of SAEs: whoever names a feature in one circuit finds the name in all.

    {"site": "resid_3", "feature": 120, "label": "plural nouns", "by": "anna", "date": "2026-11-29",
     "automatic": false, "saes": "0f3a..."}

1. The file is `labels.jsonl` in the folder of the SAEs, or in the run folder where the SAEs are another project's.
2. A line counts where the SAE at its site is the one it was written for (`saes`, its fingerprint): names of features
   that were trained again are kept and not shown.
3. The last line of a feature counts; an empty label takes a name away, a person's or an automatic one, as its line is.
   A person's name stands before an automatic one.

Supernodes are named groups of a circuit's nodes, in `supernodes.json` beside `circuit.json`:

    {"schema_version": 1, "kind": "supernodes", "digest": "0f3a...", "similarity": 0.7,
     "groups": [{"name": "plural subject", "nodes": ["resid_1/12@subject"], "collapsed": true, "automatic": true}]}

1. What the explorer saves has the same `groups`, and may be put there as it is.
2. Groups that a person made stay when the circuit is discovered again; automatic ones are of the circuit with the
   `digest` and are not shown beside another. Nodes that a circuit does not have are left out wherever it is shown.
3. A group that a person made takes its nodes out of automatic ones.
"""

from __future__ import annotations

import datetime
import itertools
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import FiniteFloat
from typing_extensions import NotRequired, TypedDict

from graphs.feature_graph import OTHERS, FeatureGraph, Node
from graphs.schema import Index, SupernodeFile
from graphs.supernodes import clean_name, find_named, slug
from sae._files import parse_json, read_json, read_text, to_json, write_json, write_text
from sae._run.outputs import check_no_link, check_output, is_json
from sae.errors import UserError, unknown
from sae.formats.locate import sae_folders
from sae.saes import stored_fingerprint

LABELS_FILE = "labels.jsonl"
_adding = threading.Lock()  # two names given at once in a page: the file is read and written whole


class Label(TypedDict):
    """A line of the file."""

    site: str
    feature: Index | Literal["error", "skip"]
    label: str
    by: NotRequired[str]
    date: NotRequired[str]
    automatic: NotRequired[bool]
    saes: NotRequired[str | None]
    score: NotRequired[FiniteFloat | None]


class LabelsFile:
    """The names of the features of some SAEs."""

    def __init__(self, saes: str | Path | None, run: str | Path, fingerprint: str | None = None) -> None:
        """saes: where the SAEs are; run: the run folder; fingerprint: of SAEs that are not in a folder of our own."""
        folders = sae_folders(saes) if saes is not None and Path(saes).is_dir() else []
        self.path = (folders[0].parent if folders else Path(run)) / LABELS_FILE
        self._folders = {folder.name: folder for folder in folders}
        self._fingerprint = fingerprint
        self._by_site: dict[str, str | None] = {}

    @classmethod
    def of(cls, metadata: Mapping[str, object], run: str | Path) -> LabelsFile:
        """The file of the SAEs that a circuit's metadata name, with paths as they are now."""
        saes, fingerprint = metadata.get("saes"), metadata.get("saes_fingerprint")
        return cls(saes if isinstance(saes, str) else None, run, fingerprint if isinstance(fingerprint, str) else None)

    def fingerprint(self, site: str) -> str | None:
        """The fingerprint of the SAE at a site; None where there is none."""
        if site not in self._by_site:
            folder = self._folders.get(site)
            if not self._folders:
                self._by_site[site] = self._fingerprint
            else:
                self._by_site[site] = None if folder is None else stored_fingerprint(folder)
        return self._by_site[site]

    def lines(self) -> list[Label]:
        """Every line of the file; UserError, with its number, for one that is damaged."""
        if not self.path.is_file():
            return []
        lines = enumerate(read_text(self.path).split("\n"), start=1)
        return [parse_json(line, f"{self.path}, line {number}", Label) for number, line in lines if line.strip()]

    def read(self) -> dict[str, Label]:
        """The line that counts of each named feature, `resid_3/120`."""
        ordered = sorted(self._last().items(), key=lambda entry: not entry[0][1])  # a person's come last and stay
        return {name: line for (name, _), line in ordered if line["label"].strip()}

    def _last(self) -> dict[tuple[str, bool], Label]:
        """The last line of each feature that is of these SAEs, a person's and an automatic one (True) apart."""
        last: dict[tuple[str, bool], Label] = {}
        for line in self.lines():
            noted = line.get("saes")
            if noted is None or noted == self.fingerprint(line["site"]):
                last[f"{line['site']}/{line['feature']}", bool(line.get("automatic"))] = line
        return last

    def add(
        self, labels: Mapping[str, str], *, by: str, automatic: bool = False, scores: Mapping[str, float] | None = None
    ) -> int:
        """Write names down, `{"resid_3/120": "plural nouns"}`, with how good each was found to be where that is in
        `scores`; those that are there already are left out.

        Returns how many were new. Raises UserError for a name of no feature, or of a site without an SAE.
        """
        with _adding:
            return self._add(labels, by=by, automatic=automatic, scores=scores)

    def _add(self, labels: Mapping[str, str], *, by: str, automatic: bool, scores: Mapping[str, float] | None) -> int:
        here, new = self._last(), []
        for name, text in labels.items():
            site, feature = self._parse(name)
            kinds = [here.get((f"{site}/{feature}", kind)) for kind in ((False, True) if automatic else (False,))]
            existing = [line for line in kinds if line is not None]  # an automatic name may be a person's already
            score = (scores or {}).get(name)
            if not existing and not text.strip():
                continue
            if any(line["label"] == text.strip() and score in (None, line.get("score")) for line in existing):
                continue
            line = Label(
                site=site, feature=feature, label=text.strip(), by=by, date=datetime.date.today().isoformat(),
                automatic=automatic, saes=self.fingerprint(site),
            )  # fmt: skip
            new.append(line if score is None else {**line, "score": score})
        if new:
            check_no_link(self.path)
            lines = [to_json(line) for line in [*self.lines(), *new]]
            write_text(self.path, "\n".join(lines) + "\n")
        return len(new)

    def _parse(self, name: str) -> tuple[str, int | Literal["error", "skip"]]:
        site, _, rest = name.partition("/")
        feature = rest.partition("@")[0]
        if not (feature.isdecimal() or feature in OTHERS):
            raise UserError(f"{name!r} is not a feature: write site/index, such as resid_3/120")
        if self._folders and site not in self._folders:
            raise UserError(f"{name!r} is of no site that has an autoencoder here: {', '.join(self._folders)} have one")
        return site, int(feature) if feature.isdecimal() else "error" if feature == "error" else "skip"


def labelled(graph: FeatureGraph, labels: Mapping[str, Label]) -> FeatureGraph:
    """The graph with the names: a person's as its nodes' labels, automatic ones as an attribute, so that they are told
    apart wherever they are shown.
    """

    def change(node: Node) -> Node:
        line = labels.get(node.name)
        if line is None:
            return node
        if line.get("automatic"):
            return replace(node, attributes={**node.attributes, "automatic_label": line["label"]})
        return replace(node, label=line["label"])

    return graph.map_nodes(change) if labels else graph


# --- supernodes -------------------------------------------------------------------------------------------------------

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
    """Groups without the nodes that other groups have, numbered where these have their name; those of fewer than two
    nodes then are left out.
    """
    others = list(others)
    taken = {node for group in others for node in group["nodes"]}
    names = {slug(group["name"]) for group in others}
    smaller: list[SupernodeFile] = []
    for group in groups:
        nodes = [node for node in group["nodes"] if node not in taken]
        if len(nodes) > 1:
            numbered = (group["name"] if n == 1 else f"{group['name']} {n}" for n in itertools.count(1))
            name = next(name for name in numbered if slug(name) not in names)
            names.add(slug(name))
            smaller.append({**group, "name": name, "nodes": nodes})  # type: ignore[typeddict-item]
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


def with_group(
    groups: Iterable[SupernodeFile], name: str, nodes: Sequence[str], ids: Iterable[str]
) -> list[SupernodeFile]:
    """The groups with one of this name, in place of an earlier one; without nodes, the groups without it.

    ids: those of the circuit's nodes. Raises UserError for a name with a sign that means something in names of
    features, for one that there is not where it is to be removed, or for a node that is not in the circuit.
    """
    if not name or clean_name(name) != name:
        raise UserError(f"{name!r} is no name of a supernode: give words without / , @ and :")
    ids = set(ids)
    for node in nodes:
        if node not in ids:
            raise UserError(f"{node!r} is no node of this circuit, which has such as {min(ids, default='none')}")
    same = find_named(name, groups_by_name(groups))
    if not nodes and same is None:
        raise UserError(f"there is no supernode {name!r} to remove")
    others = [group for group in groups if group["name"] != same]
    made: list[SupernodeFile] = [{"name": name, "nodes": list(dict.fromkeys(nodes)), "collapsed": True}]
    others = [{**g, "nodes": [n for n in g["nodes"] if n not in nodes]} for g in others]  # type: ignore[typeddict-item]
    return (made if nodes else []) + [group for group in others if group["nodes"]]


def groups_by_name(groups: Iterable[SupernodeFile]) -> dict[str, list[str]]:
    """Name -> ids of the nodes."""
    return {group["name"]: group["nodes"] for group in groups}


def group_members(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The features of the supernode that is meant; UserError where there is none of this name."""
    match = find_named(name, groups)
    if match is None:
        made = "" if groups else ": make some with sfc supernodes"
        raise UserError(f"there is no supernode {name!r}{made}") if made else unknown("supernode", name, groups)
    return [node for node in groups[match] if node.partition("@")[0].rpartition("/")[2].isdecimal()]


def as_groups(supernodes: Mapping[str, Sequence[str]], *, automatic: bool) -> list[SupernodeFile]:
    """Groups by name as files and metadata have them."""
    return [
        SupernodeFile(name=name, nodes=list(nodes), collapsed=True, automatic=automatic)
        for name, nodes in supernodes.items()
    ]
