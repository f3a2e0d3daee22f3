"""The sections of the report, as plain values; the templates lay them out and escape every text.

Each function takes what the run folder holds and returns what its template names: curves, features, edits, facts.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from circuits.editing.results import Continuation, EditReport
from circuits.report.files import RunFiles
from circuits.report.plot import Line, curves_plot, doses_plot
from graphs.classes import case_means
from graphs.drawing.style import describe, is_late, position_name, visible
from graphs.feature_graph import FeatureGraph, Node


def number(value: float | None, digits: int = 2) -> str:
    """`0.97`, `−0.04`, and never `−0.00`; a dash where there is none."""
    if value is None:
        return "–"
    shown = f"{value:.{digits}f}"
    return shown.replace("-", "" if float(shown) == 0 else "−")


def signed(value: float, digits: int = 2) -> str:
    """`+1.87`, `−0.04`, `0.00`."""
    shown = number(value, digits)
    return f"+{shown}" if float(f"{value:.{digits}f}") > 0 else shown


def share(value: float, digits: int = 0) -> str:
    """`97 %`."""
    return f"{number(100 * value, digits)} %"


# ------------------------------------------------------------------------------------------ key figures


Figure = tuple[str, str, str]
"""A number that a reader wants first, what it is, and on what or beside what."""


def key_figures(run: RunFiles) -> list[Figure]:
    """The behaviour, the accuracy, the faithfulness and the strongest edit, as far as they were measured."""
    figures: list[Figure] = []
    metadata = run.graph.metadata if run.graph else {}
    if metadata.get("m_clean") is not None:
        is_logit = (metadata.get("options") or {}).get("metric", "logit_difference") == "logit_difference"
        sign, name = (-1, "logit difference") if is_logit else (1, "metric")
        patch = metadata.get("m_patch")
        note = f"to {signed(sign * patch)} on the patch prompts" if patch is not None else "on the clean prompts"
        figures.append((signed(sign * metadata["m_clean"]), name, note))
    if metadata.get("accuracy") is not None:
        figures.append((share(metadata["accuracy"]), "accuracy", "of the model on the clean prompts"))
    if run.faithfulness:
        figures.append(_faithfulness_figure(run.faithfulness))
    if run.edits:
        figures.append(_edit_figure(run.edits))
    return figures


def _faithfulness_figure(data: dict[str, Any]) -> Figure:
    """The smallest circuit that explains 80 %, or the best one measured."""
    rows = [(size, f) for size, f in zip(data["sizes"], data["faithfulness"], strict=True) if f is not None]
    rows = [row for row in rows if row[0] != data.get("n_nodes")] or rows  # all nodes are no circuit
    reached = [row for row in rows if row[1] >= 0.8]
    size, f = reached[0] if reached else max(rows, key=lambda row: row[1], default=(data["sizes"][-1], None))
    return (number(f), "faithfulness", f"with {size} nodes from {data.get('start_site', 'the start')} on")


def _edit_figure(edits: dict[str, EditReport]) -> Figure:
    """The share of the behaviour left by the edit that leaves least."""
    edit = min(edits.values(), key=lambda edit: float("inf") if edit.remaining is None else abs(edit.remaining))
    left = [value for value in edit.random_remaining if value is not None]
    beside = f"; random features leave {share(sum(left) / len(left))}" if left else ""
    n = len(edit.features)
    shares = [value for value in edit.remaining_by_case.values() if value is not None]
    by_case = f"by case {share(min(shares))} to {share(max(shares))}; " if shares else ""
    n_reversed, n_cases = len(edit.reversed_cases), len(edit.before.by_case)
    turned = f"flips in {n_reversed} of {n_cases} cases; " if n_reversed else ""
    note = f"{by_case}{turned}{n} {'feature' if n == 1 else 'features'} {edit.action}{beside}"
    return ("–" if edit.remaining is None else share(edit.remaining), "left after an edit", note)


# ------------------------------------------------------------------------------------------ curves

ABLATED = {
    "mean": "their mean over the reference prompts of the same template",
    "optimal": "constants fitted so that the model does best with the circuit alone",
    "counterfactual": "the value they have on the patch prompt",
    "mean-pooled": "one mean over all reference prompts and positions",
    "zero": "the value zero",
    "resample": "the value they have on another prompt of the same template",
}


INTERVALS = "Below each number, and as a band in the picture, its 95 % interval, by drawing the prompts anew."
Cell = tuple[str, str]
"""A number in a table, and its interval where it is known."""


@dataclass(frozen=True)
class CurveBlock:
    """A plot of curves over sizes with what was measured beside it."""

    lead: str
    """The setting of the measurement."""
    plot: Markup
    """An `<svg>` element."""
    columns: list[str]
    """Headings of the table."""
    rows: list[list[Cell]]
    """One a size."""
    captions: list[str]
    """Captions below the table."""


def curve_blocks(run: RunFiles) -> list[CurveBlock]:
    """Blocks on the results of `sfc faithfulness`, its `--edges`, `sfc mask` and its `--edges` in the run folder."""
    measured = ((run.faithfulness, _nodes), (run.edge_faithfulness, _edges), *((m, _mask) for m in run.masks))
    return [make_block(data) for data, make_block in measured if data is not None]


def _nodes(data: dict[str, Any]) -> CurveBlock:
    lead = (
        "How much of the behaviour is left when only the strongest nodes are kept, and when only they are removed. "
        f"Measured on {data.get('n_prompts', '?')} prompts; removed nodes take {_ablation(data)}"
    )
    intervals = data.get("intervals") or {}
    rows = [
        [
            (str(size), ""),
            *(_with_interval(data[name], intervals.get(name), row) for name in ("faithfulness", "completeness")),
            _random_range(data, row),
        ]
        for row, size in enumerate(data["sizes"])
    ]
    captions = [INTERVALS] if intervals else []
    if "cpr" in data:
        captions.append(
            f"CPR {number(data['cpr'], 3)}, CMD {number(data.get('cmd'), 3)} (areas under faithfulness and its "
            f"distance to 1 over the share of all {data['n_nodes']} nodes)."
        )
    lines = [
        Line(data["faithfulness"], "only the circuit", "circuit", intervals.get("faithfulness") or ()),
        Line(data["completeness"], "all but the circuit", "complement", intervals.get("completeness") or ()),
    ]
    random = data.get("random") or []
    if data["sizes"][-1] >= data["n_nodes"]:  # all nodes are no draw
        random = [[*curve[:-1], None] for curve in random]
    plot = curves_plot(data["sizes"], lines, random=random, unit="nodes")
    return CurveBlock(lead, plot, ["nodes", "faithfulness", "completeness", "random"], rows, captions)


def _edges(data: dict[str, Any]) -> CurveBlock:
    lead = (
        f"And the edges: every node is recomputed from only those of the {data['n_nodes']} nodes whose edge "
        f"to it is kept, and all its other inputs take {_ablation(data)} With all nodes joined, "
        f"{number(data['all_joined'])} of the behaviour is there; {data['n_edges']} edges have a weight."
    )
    rows = [
        [(str(size), ""), _with_interval(data["faithfulness"], data.get("intervals"), row), _random_range(data, row)]
        for row, size in enumerate(data["sizes"])
    ]
    lines = [Line(data["faithfulness"], "strongest edges", "circuit", data.get("intervals") or ())]
    plot = curves_plot(data["sizes"], lines, random=data.get("random") or [], unit="edges", level=data["all_joined"])
    captions = [INTERVALS] if data.get("intervals") else []
    return CurveBlock(lead, plot, ["edges", "faithfulness", "random"], rows, captions)


MASKED = (("nodes", "effect", "removed nodes"), ("edges", "weight", "all other inputs"))
"""What a mask is on, what it is compared with, and what is ablated: of nodes, and of edges."""


def _mask(data: dict[str, Any]) -> CurveBlock:
    mask, effects = data["mask"], data["effects"]
    unit, by, removed = MASKED["n_edges" in mask]
    lead = (
        f"A mask learned for all {unit} together: faithfulness of the {unit} it keeps longest, beside that of the "
        f"strongest by {by}, on {mask.get('n_prompts', '?')} prompts "
        f"({'held-out prompts' if data.get('held_out') else 'the prompts it was learned on'}); {removed} take "
        f"{_ablation(mask)}"
    )
    curves = zip(mask["sizes"], mask["faithfulness"], effects["faithfulness"], strict=True)
    rows = [[(str(size), ""), *((number(f, 3), "") for f in values)] for size, *values in curves]
    ranked = Line(effects["faithfulness"], f"ranked by {by}", "complement")
    plot = curves_plot(mask["sizes"], [Line(mask["faithfulness"], "learned mask", "circuit"), ranked], unit=unit)
    return CurveBlock(lead, plot, [unit, "learned mask", f"by {by}"], rows, [])


def _ablation(data: dict[str, Any]) -> str:
    """Words for the values that ablated nodes take and the sites that are given, to the end of the sentence."""
    kind, start = data.get("ablation", "mean"), data.get("start_site", "embed")
    given = "" if start == "embed" else f" Everything before {start} is given."
    return f"{ABLATED.get(kind, kind)}.{given}"


def _random_range(data: dict[str, Any], row: int) -> Cell:
    """The range of random sets of the same size."""
    drawn = [curve[row] for curve in data.get("random") or [] if curve[row] is not None]
    return (f"{number(min(drawn))} to {number(max(drawn))}" if drawn else "", "")


def _with_interval(values: list[float | None], intervals: list[list[float | None]] | None, row: int) -> Cell:
    low, high = intervals[row] if intervals else (None, None)
    return (number(values[row], 3), f"{number(low)} to {number(high)}" if intervals else "")


# ------------------------------------------------------------------------------------------ features

TOKENS_SHOWN = 8
TOKEN_LISTS = {"fires on": "top_tokens", "raises": "top_logits", "lowers": "bottom_logits"}


def card(graph: FeatureGraph, node: Node) -> dict[str, Any]:
    """A node with what is known of it: numbers, the tokens it fires on, raises and lowers, and the text it fires on."""
    is_feature = node.kind == "feature"
    contexts = (node.attributes.get("contexts") or []) if is_feature else []
    tokens = {}
    for words, key in TOKEN_LISTS.items() if is_feature else ():
        items = (node.attributes.get(key) or [])[:TOKENS_SHOWN]
        early = key != "top_tokens" and not is_late(graph, node)
        words = f"{words} (early site: means little)" if early else words
        tokens[words] = [visible(str(item[0] if isinstance(item, list | tuple) else item)) for item in items]
    return {
        "by_case": _bars(case_means(node)),
        "node": node,
        "words": "" if node.label or node.kind != "feature" else describe(graph, node),
        "position": "" if node.position is None else position_name(graph, node.position),
        "facts": _facts(node.attributes),
        "tokens": {words: names for words, names in tokens.items() if names},
        "contexts": [split_at_peak(context) for context in contexts],
        "largest_change": max(
            (abs(change or 0.0) for context in contexts for change in context.get("change") or ()), default=0.0
        ),
        "activations": bars(node.attributes.get("histogram")) if is_feature else [],
        "most": ((node.attributes.get("histogram") or {}).get("edges") or [0.0])[-1],
        "largest_activation": max((max(context["activations"], default=0.0) for context in contexts), default=0.0),
    }


def _bars(means: dict[str, float]) -> list[tuple[str, float, float]]:
    """(case, mean activation, its share of the largest) for a row of bars."""
    largest = max(map(abs, means.values()), default=0.0) or 1.0
    return [(case.replace("_", " "), mean, abs(mean) / largest) for case, mean in means.items()]


def _facts(attributes: dict[str, Any]) -> list[str]:
    facts = []
    if isinstance(attributes.get("density"), int | float):
        facts.append(f"active on {100 * attributes['density']:.2g} % of tokens")
    if isinstance(attributes.get("max_activation"), int | float):
        facts.append(f"peak {attributes['max_activation']:.3g}")
    if isinstance(attributes.get("exact_effect"), int | float):
        facts.append(f"exact effect {signed(attributes['exact_effect'], 3)}")
    if "disagrees" in attributes:
        facts.append(f"the estimate differs in {attributes['disagrees']}")
    if "interval" in attributes:
        low, high = attributes["interval"]
        facts.append(f"interval {signed(low, 3)} to {signed(high, 3)}")
    return facts


class Token(NamedTuple):
    """A token of a context."""

    text: str
    """Readable; line breaks and tabs as signs."""
    activation: float
    """Activation of the feature."""
    change: float
    """Change of the token's log-probability when the feature is ablated; 0 where that was not measured."""


LEAST_CHANGE = 0.02
"""Changes below this are not underlined."""


def split_at_peak(context: dict[str, Any]) -> tuple[list[Token], list[Token]]:
    """The tokens before the strongest one, and from there on."""
    activations, peak = context["activations"], context.get("peak")
    if peak is None:
        peak = max(range(len(activations)), key=activations.__getitem__)
    shown = ["".join(visible(c) if c in "\n\r\t" else c for c in token) for token in context["tokens"]]
    change = [
        value if abs(value or 0.0) >= LEAST_CHANGE else 0.0 for value in context.get("change") or [0.0] * len(shown)
    ]
    tokens = [Token(*values) for values in zip(shown, activations, change, strict=True)]
    return tokens[:peak], tokens[peak:]


def bars(counts: dict[str, Any] | None) -> list[tuple[float, float, float]]:
    """(left, width, height) of a histogram's bars as shares, heights by the logarithm of the count."""
    edges, values = (counts or {}).get("edges") or [], (counts or {}).get("counts") or []
    if len(edges) != len(values) + 1 or not values or edges[-1] <= edges[0]:
        return []
    span, most = edges[-1] - edges[0], math.log1p(max(values))
    rows = zip(edges, edges[1:], values, strict=False)
    return [((low - edges[0]) / span, (high - low) / span, math.log1p(n) / most) for low, high, n in rows if n > 0]


# ------------------------------------------------------------------------------------------ edits


class EditRow(NamedTuple):
    """One quantity before and after an edit, beside the same edit of random features."""

    name: str
    """Name of the quantity."""
    values: list[float]
    """Before, after, and of each random draw."""
    kind: str
    """`strong` or `case`, which sets how the row looks."""
    left: float | None = None
    """Share that the edit leaves, where that is defined."""
    digits: int = 2
    """Digits behind the point."""
    flips: bool = False
    """Whether the quantity has the other sign after the edit."""
    axis: tuple[float, float] = (0.0, 1.0)
    """Ends of the axis, which the rows of one quantity share; zero lies on it."""

    def x(self, value: float, shift: float = 0.0) -> str:
        """The x of a value on a line of 180 points."""
        low, high = self.axis
        return f"{10 + 160 * (value - low) / ((high - low) or 1.0) + shift:.1f}"

    @property
    def ticks(self) -> list[float]:
        """Zero and the ends of the axis, as far as their numbers do not run into one another."""
        low, high = self.axis
        return sorted({0.0, *(end for end in self.axis if abs(end) > 0.25 * (high - low))})


def edit_block(name: str, edit: EditReport) -> dict[str, Any]:
    """An edit, its table, and the continuations with the words that differ."""
    cases = list(edit.before.by_case)
    title = f"{edit.metric}, mean size" if cases else edit.metric
    rows = [EditRow(title, [run.size for run in edit.runs], "strong", edit.remaining)]
    for case in cases:
        values = [run.by_case[case].metric for run in edit.runs]
        left, flips = edit.left(edit.after, case), case in edit.reversed_cases
        rows.append(EditRow(case.replace("_", " "), values, "case", left, flips=flips))
    rows = _on_one_axis(rows)
    if edit.before.overall.accuracy is not None:
        rows.append(EditRow("accuracy", [run.overall.accuracy or 0.0 for run in edit.runs], "strong"))
        rows += [
            EditRow(case.replace("_", " "), [run.by_case[case].accuracy or 0.0 for run in edit.runs], "case")
            for case in cases
        ]
    if edit.before.ce is not None:
        name_of_ce = f"cross-entropy, {edit.n_texts} other texts"
        rows += _on_one_axis([EditRow(name_of_ce, [run.ce or 0.0 for run in edit.runs], "strong", digits=3)])
        costs = {"at the behaviour's tokens": "ce_behaviour", "elsewhere": "ce_elsewhere", "KL": "kl"}
        for title, cost in costs.items():
            if getattr(edit.before, cost) is not None:
                values = [getattr(run, cost) or 0.0 for run in edit.runs]
                rows += _on_one_axis([EditRow(title, values, "case", digits=3)])
    return {
        "name": name,
        "edit": edit,
        "rows": rows,
        "samples": [_sample(sample) for sample in edit.continuations],
        "doses": _doses(edit),
    }


def _doses(edit: EditReport) -> dict[str, Any] | None:
    """The edit at other strengths: a plot of what is left and, where it was measured, of the cost; and a table."""
    if not edit.doses:
        return None
    table = edit.dose_table().sort_values("scale")
    costs = list(table["CE elsewhere"]) if "CE elsewhere" in table else []
    rows = [[number(value, 3) for value in row] for row in table.itertuples(index=False)]
    plot = doses_plot(list(table["scale"]), list(table["left"]), costs) if edit.shares else None
    return {"columns": [name.replace("_", " ") for name in table.columns], "rows": rows, "plot": plot}


def _on_one_axis(rows: list[EditRow]) -> list[EditRow]:
    """The rows with an axis that has room for zero and for all of their values, to two figures."""
    values = [value for row in rows for value in row.values]
    low, high = (float(f"{value:.2g}") for value in (min(0.0, *values), max(0.0, *values)))
    return [row._replace(axis=(min(low, *values), max(high, *values))) for row in rows]


def _sample(sample: Continuation) -> dict[str, Any]:
    """A prompt and both continuations as (words, whether the other has different ones in their place)."""
    before, after = sample.before.split(), sample.after.split()
    old, new = [], []
    for kind, a, b, c, d in difflib.SequenceMatcher(a=before, b=after, autojunk=False).get_opcodes():
        old += [(" ".join(before[a:b]), kind != "equal")] if b > a else []
        new += [(" ".join(after[c:d]), kind != "equal")] if d > c else []
    return {"prompt": sample.prompt, "before": old, "after": new}
