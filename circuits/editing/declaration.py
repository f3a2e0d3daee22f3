"""An edit as a small object that says what becomes of which features, where and when: JSON in and out.

    {"schema_version": 1, "kind": "edits", "edits": [
        {"features": ["resid_3/120", "mlp_2/7@subject"], "operation": "mean", "reference": {"resid_3/120": 0.8, ...}},
        {"features": ["my supernode"], "operation": "scale", "value": 0.5, "where": "generated", "schedule": [1, 1, 0]}
    ], "groups": [{"name": "my supernode", "nodes": ["resid_1/4", "resid_1/9@subject"]}]}

`groups` are what the explorer saves as supernodes; a name without a slash, or `supernode:NAME`, is one of them. A
report of `sfc ablate` or `sfc steer` (edits/NAME.json) holds the edits it was made with, under "edits", and is read as
such a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import FiniteFloat
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from circuits.editing.targets import EVERYWHERE, GENERATED, feature_names, parse_features, split_by_span
from circuits.labels import SupernodesFile, group_members, groups_by_name
from circuits.options import EditedTokens, Freeze, Operation
from graphs.schema import SupernodeFile
from graphs.supernodes import PREFIX
from sae._files import check_type, read_json, write_json
from sae._run.outputs import check_output, like
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError, unknown
from sae.model.sites import Site

SCHEMA_VERSION = 1
NEEDS_VALUE = ("set", "clamp", "scale", "steer")
CAN_BE_RELATIVE = ("set", "clamp", "steer")
Reference = Mapping[str, float | Sequence[float]]


@dataclass(frozen=True)
class Edit:
    """Which features become what, where, and from which generated token on how strongly.

    Raises:
        UserError: For an unknown operation, or a value that is missing, not finite or not needed.
    """

    features: str | Sequence[str]
    """Names such as `resid_3/120`, comma-separated or in a list; `resid_3/120@subject` at a span of the prompts alone,
    `resid_3/120@5` at a position, `resid_3/120@generated` at the tokens generated after the prompts.
    """
    operation: Operation = "zero"
    """What the features become: see the head of `circuits.editing.edit`."""
    value: float | None = None
    """Of `set`, `clamp` and `steer`, in units of the feature's activation, for `scale` a factor."""
    relative: bool = False
    """Whether the value of `set`, `clamp` and `steer` is in units of the feature's largest activation instead."""
    where: EditedTokens = "all"
    """At which tokens: all, those where the feature is active, the prompt's alone, or generated ones alone."""
    schedule: Sequence[float] = ()
    """Strength at the first, second, ... generated token, the last going on; 1 throughout where it is empty."""
    strength: float = 1.0
    """What the change is multiplied by at every token: `mean` at 2 mirrors a feature about its mean."""
    by_template: bool = False
    """Whether `mean` is, at tokens of the prompts, over those at the same place of the same template (or span)."""
    freeze: Freeze | None = None
    """attention: every head looks where it looks without edits, at the tokens of the prompts or of a text."""
    reference: Reference = field(default_factory=dict)
    """What the operation refers to, by name of the feature: its mean for `mean`, its largest activation where the value
    is relative, for `resample` some of its activations. What is missing is measured on the prompts or text at hand.
    """

    def __post_init__(self) -> None:
        check_operation(self.operation, self.value)
        if self.where not in get_args(EditedTokens):
            raise unknown("where", self.where, get_args(EditedTokens))
        if self.freeze not in (None, *get_args(Freeze)):
            raise unknown("freeze", str(self.freeze), get_args(Freeze))
        if self.relative and self.operation not in CAN_BE_RELATIVE:
            raise UserError(f"the value of {self.operation!r} is never relative: of {', '.join(CAN_BE_RELATIVE)} alone")
        if self.by_template and self.operation != "mean":
            raise UserError(f"by_template is about the operation 'mean', not {self.operation!r}: leave it out")
        if not math.isfinite(self.strength):
            raise UserError(f"strength is {self.strength}: it must be a finite number")
        if any(not math.isfinite(strength) for strength in self.schedule):
            raise UserError(f"schedule is {list(self.schedule)}: it must be finite numbers")
        self._check_tokens()

    def _check_tokens(self) -> None:
        """`UserError` where names and options are of different tokens, so that a feature would be edited nowhere."""
        for span, names in split_by_span(self.features).items():
            of_prompt = span not in (EVERYWHERE, GENERATED)
            if (self.where == "generated" and of_prompt) or (self.where == "prompt" and span == GENERATED):
                kind = "tokens of prompts" if of_prompt else "generated tokens"
                raise UserError(
                    f"where is {self.where!r}, and {names[0]}@{span} is of {kind} alone: leave one of them out"
                )
        if self.schedule and self.where == "prompt":
            raise UserError("a schedule is of generated tokens, and where is 'prompt': leave one of them out")

    @property
    def names(self) -> list[str]:
        """The features' names, one by one."""
        names = self.features.split(",") if isinstance(self.features, str) else self.features
        return [name.strip() for name in names]

    def by_span(self, saes: Mapping[Site, SparseAutoencoder]) -> dict[str, dict[Site, Tensor]]:
        """The edited features by span and site."""
        return {span: parse_features(names, saes) for span, names in split_by_span(self.features).items()}

    @property
    def refers(self) -> Literal["mean", "largest", "draws"] | None:
        """The kind of number that `reference` holds of each feature; None where the operation refers to nothing."""
        kinds: dict[str, Literal["mean", "draws"]] = {"mean": "mean", "resample": "draws"}
        return "largest" if self.relative else kinds.get(self.operation)

    def listed(self, saes: Mapping[Site, SparseAutoencoder]) -> list[str]:
        """The features' names as reports and `reference` have them: by span, in the order of the sites, each once."""
        return [
            f"{name}@{span}" if span else name
            for span, features in self.by_span(saes).items()
            for name in feature_names(features)
        ]

    @property
    def is_everywhere(self) -> bool:
        """Whether it is an edit of any token, whatever text that belongs to."""
        return self.where in ("all", "active") and set(split_by_span(self.features)) == {EVERYWHERE}

    def everywhere(self) -> Edit:
        """The same edit at all tokens, wherever it was, as on text that has no spans and no generated tokens."""
        names = list(dict.fromkeys(name.partition("@")[0] for name in self.names))
        where: EditedTokens = "active" if self.where == "active" else "all"
        return replace(self, features=names, where=where, schedule=(), reference={})

    def to_dict(self) -> dict[str, Any]:
        """The edit as JSON values; what is as usual is left out."""
        usual = Edit(self.features)
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        told = {name: value for name, value in values.items() if name == "operation" or value != getattr(usual, name)}
        return {"features": self.names, **{name: _plain(value) for name, value in told.items()}}


def check_operation(operation: str, value: float | None) -> None:
    """`UserError` unless the operation is known and has a value exactly where it needs one."""
    if operation not in get_args(Operation):
        raise unknown("operation", operation, get_args(Operation))
    if operation in NEEDS_VALUE and value is None:
        raise UserError(f"the operation {operation!r} needs a value")
    if value is not None and not math.isfinite(value):
        raise UserError(f"value is {value}: it must be a finite number")
    if operation not in NEEDS_VALUE and value is not None:
        raise UserError(f"the operation {operation!r} takes no value (given {value}); {', '.join(NEEDS_VALUE)} do")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


# ------------------------------------------------------------------------------------------ files


class EditFile(TypedDict):
    """An edit as a file has it."""

    features: list[str] | str
    operation: Operation
    value: NotRequired[FiniteFloat | None]
    relative: NotRequired[bool]
    where: NotRequired[EditedTokens]
    schedule: NotRequired[list[FiniteFloat]]
    strength: NotRequired[FiniteFloat]
    by_template: NotRequired[bool]
    freeze: NotRequired[Freeze | None]
    reference: NotRequired[dict[str, FiniteFloat | list[FiniteFloat]]]


class EditsFile(TypedDict):
    """Edits in a file of their own, or in the report of an edit."""

    schema_version: Literal[1]
    kind: Literal["edit", "edits"]
    edits: list[EditFile]
    groups: NotRequired[list[SupernodeFile]]


def load_edits(path: str | Path) -> list[Edit]:
    """Read the edits of a file, or those that a report of `sfc ablate` or `sfc steer` was made with.

    Args:
        path: A file of `save_edits`, or a report such as `edits/NAME.json` of a run.

    Returns:
        The edits, in their order.

    Raises:
        UserError: With the file, the key and what is allowed, for a file that holds no edits, or damaged ones.
    """
    data = read_json(path)
    if data.get("kind") == "edit" and "edits" not in data:
        raise UserError(f"{path}: a report without the edits it was made with, of an earlier version: edit again")
    checked: EditsFile = check_type(data, EditsFile, path)
    if not checked["edits"]:
        raise UserError(f"{path}: holds no edits")
    if data["kind"] == "edits":
        _check_keys(data, EditsFile, str(path))
    for number, edit in enumerate(data["edits"]):
        _check_keys(edit, EditFile, f"{path}: edits[{number}]")
    groups = groups_by_name(checked.get("groups", ()))
    try:
        return [_edit(entry, groups) for entry in checked["edits"]]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _edit(entry: EditFile, groups: Mapping[str, Sequence[str]]) -> Edit:
    values: dict[str, Any] = {**entry, "features": expanded(entry["features"], groups)}
    return Edit(**values)


def save_edits(edits: Edit | Sequence[Edit], path: str | Path, *, overwrite: bool = False) -> Path:
    """Write edits as a JSON file that `load_edits` reads.

    Args:
        edits: One edit, or several in the order in which they apply.
        path: The file.
        overwrite: Whether a file of another kind is replaced.

    Returns:
        The path.

    Raises:
        UserError: For a file there that holds no edits, unless `overwrite`.
    """
    listed = [edits] if isinstance(edits, Edit) else edits
    data = {"schema_version": SCHEMA_VERSION, "kind": "edits", "edits": [edit.to_dict() for edit in listed]}
    check_output(path, like(data), overwrite=overwrite)
    write_json(path, data)
    return Path(path)


def load_groups(path: str | Path) -> dict[str, list[str]]:
    """The supernodes of a file that the explorer saved: name -> its nodes."""
    return groups_by_name(read_json(path, SupernodesFile)["groups"])


def expanded(features: str | Sequence[str], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of features, each supernode among them (a name without a slash, or `supernode:NAME`) replaced by the
    features in it.
    """
    names = features.split(",") if isinstance(features, str) else features
    listed: list[str] = []
    for name in (name.strip() for name in names):
        if name.startswith(PREFIX) or (groups and "/" not in name):
            listed += group_members(name.removeprefix(PREFIX), groups)
        else:
            listed.append(name)
    return list(dict.fromkeys(listed))


def _check_keys(data: Mapping[str, Any], schema: Any, where: str) -> None:
    """`UserError` for a key that means nothing, such as a misspelt one."""
    for key in data:
        if key not in schema.__annotations__:
            raise UserError(f"{where}: {unknown('key', key, schema.__annotations__)}")
