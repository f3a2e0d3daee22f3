"""Names of features, one file for each set of SAEs: whoever names a feature in one circuit finds the name in all.

    {"site": "resid_3", "feature": 120, "label": "plural nouns", "by": "anna", "date": "2026-11-29",
     "automatic": false, "saes": "0f3a..."}

1. The file is `labels.jsonl` in the folder of the SAEs, or in the run folder where the SAEs are another project's.
2. A line counts where the SAE at its site is the one it was written for (`saes`, its fingerprint): names of features
   that were trained again are kept and not shown.
3. The last line of a feature counts; an empty label takes a name away. A person's name stands before an automatic one.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from typing_extensions import NotRequired, TypedDict

from graphs.feature_graph import OTHERS, FeatureGraph, Node
from graphs.schema import Index
from sae._files import parse_json, read_text, to_json, write_text
from sae._run.outputs import check_no_link
from sae.errors import UserError
from sae.formats.locate import sae_folders
from sae.saes import stored_fingerprint

LABELS_FILE = "labels.jsonl"


class Label(TypedDict):
    """A line of the file."""

    site: str
    feature: Index | Literal["error", "skip"]
    label: str
    by: NotRequired[str]
    date: NotRequired[str]
    automatic: NotRequired[bool]
    saes: NotRequired[str | None]


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
        chosen: dict[tuple[str, bool], Label] = {}
        for line in self.lines():
            noted = line.get("saes")
            if noted is None or noted == self.fingerprint(line["site"]):
                chosen[f"{line['site']}/{line['feature']}", bool(line.get("automatic"))] = line
        ordered = sorted(chosen.items(), key=lambda entry: not entry[0][1])  # a person's come last and stay
        return {name: line for (name, _), line in ordered if line["label"].strip()}

    def add(self, labels: Mapping[str, str], *, by: str, automatic: bool = False) -> int:
        """Write names down, `{"resid_3/120": "plural nouns"}`; those that are there already are left out.

        Returns how many were new. Raises UserError for a name of no feature, or of a site without an SAE.
        """
        here, new = self.read(), []
        for name, text in labels.items():
            site, feature = self._parse(name)
            known = here.get(f"{site}/{feature}")
            if text.strip() == (known["label"] if known else "") and (not known or not known.get("automatic")):
                continue
            new.append(
                Label(
                    site=site, feature=feature, label=text.strip(), by=by, date=datetime.date.today().isoformat(),
                    automatic=automatic, saes=self.fingerprint(site),
                )
            )  # fmt: skip
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
