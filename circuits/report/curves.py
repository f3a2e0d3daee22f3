"""The report's section on how much of the behaviour the circuit explains: curves over nodes, over edges, and those of a
learned mask.
"""

from __future__ import annotations

from typing import Any

from circuits.report.markup import Html, missing, number, section, text
from circuits.report.plot import Curve, curves_plot

ABLATIONS = {
    "mean": "their mean over the reference prompts of the same template",
    "optimal": "constants fitted so that the model does best with the circuit alone",
    "counterfactual": "the value they have on the patch prompt",
    "mean-pooled": "one mean over all reference prompts and positions",
    "zero": "the value zero",
    "resample": "the value they have on another prompt of the same template",
}


def faithfulness_section(
    nodes: dict[str, Any] | None, edges: dict[str, Any] | None, mask: dict[str, Any] | None
) -> Html:
    """What `sfc faithfulness`, its `--edges`, and `sfc mask` left in the run folder."""
    if nodes is None:
        body = missing("Not measured yet.", "sfc faithfulness --circuit RUN --prompts P.jsonl")
    else:
        body = _nodes(nodes)
    if edges is not None:
        body += _edges(edges)
    if mask is not None:
        body += _mask(mask)
    return section("faithfulness", "Faithfulness", body)


def _nodes(data: dict[str, Any]) -> str:
    lead = (
        f"How much of the behaviour is left when only the strongest nodes are kept, and when only they are removed. "
        f"Measured on {text(data.get('n_prompts', '?'))} prompts; removed nodes take {_ablation(data)}.{_given(data)}"
    )
    rows = []
    for row, size in enumerate(data["sizes"]):
        f, c = (_with_interval(data[name], (data.get("intervals") or {}).get(name), row) for name in CURVES)
        rows.append([text(size), f, c, _beside(data, row)])
    below = _table(["nodes", "faithfulness", "completeness", "random"], rows, intervals=bool(data.get("intervals")))
    if "cpr" in data:
        below += (
            f'<p class="cap">CPR {number(data["cpr"], 3)}, CMD {number(data.get("cmd"), 3)} (areas under faithfulness '
            f"and its distance to 1 over the share of all {text(data['n_nodes'])} nodes).</p>"
        )
    curves = [
        Curve(data["faithfulness"], "only the circuit", "circuit"),
        Curve(data["completeness"], "all but the circuit", "complement"),
    ]
    return _split(lead, curves_plot(data["sizes"], curves, random=data.get("random") or [], unit="nodes"), below)


CURVES = ("faithfulness", "completeness")


def _edges(data: dict[str, Any]) -> str:
    lead = (
        f"And the edges: every node is recomputed from only those of the {text(data['n_nodes'])} nodes whose edge "
        f"to it is kept, and all its other inputs take {_ablation(data)}.{_given(data)} With all nodes joined, "
        f"{number(data['all_joined'])} of the behaviour is there; {text(data['n_edges'])} edges have a weight."
    )
    rows = [
        [text(size), _with_interval(data["faithfulness"], data.get("intervals"), row), _beside(data, row)]
        for row, size in enumerate(data["sizes"])
    ]
    table = _table(["edges", "faithfulness", "random"], rows, intervals=bool(data.get("intervals")))
    curves = [Curve(data["faithfulness"], "strongest edges", "circuit")]
    plot = curves_plot(data["sizes"], curves, random=data.get("random") or [], unit="edges", level=data["all_joined"])
    return _split(lead, plot, table)


def _mask(data: dict[str, Any]) -> str:
    mask, effects = data["mask"], data["effects"]
    which = "held-out prompts" if data.get("held_out") else "the prompts it was learned on"
    lead = (
        f"A mask learned for all nodes together: faithfulness of the nodes it keeps longest, beside that of the "
        f"strongest by effect, on {text(mask.get('n_prompts', '?'))} prompts ({which}); removed nodes take "
        f"{_ablation(mask)}.{_given(mask)}"
    )
    rows = [
        [text(size), *(number(curve["faithfulness"][row], 3) for curve in (mask, effects))]
        for row, size in enumerate(mask["sizes"])
    ]
    curves = [
        Curve(mask["faithfulness"], "learned mask", "circuit"),
        Curve(effects["faithfulness"], "ranked by effect", "complement"),
    ]
    return _split(
        lead, curves_plot(mask["sizes"], curves, unit="nodes"), _table(["nodes", "learned mask", "by effect"], rows)
    )


def _ablation(data: dict[str, Any]) -> str:
    kind = data.get("ablation", "mean")
    return ABLATIONS.get(kind, text(kind))


def _given(data: dict[str, Any]) -> str:
    start = data.get("start_site", "embed")
    return "" if start == "embed" else f" Everything before {text(start)} is given."


def _beside(data: dict[str, Any], row: int) -> str:
    """The range of random sets of the same size."""
    drawn = [curve[row] for curve in data.get("random") or [] if curve[row] is not None]
    return f"{number(min(drawn))} to {number(max(drawn))}" if drawn else ""


def _with_interval(values: list[float | None], intervals: list[list[float | None]] | None, row: int) -> str:
    """A number, its interval below where it is known."""
    shown = number(values[row], 3)
    if not intervals:
        return shown
    low, high = intervals[row]
    return f"{shown}<br><small>{number(low, 2)} to {number(high, 2)}</small>"


def _table(head: list[str], rows: list[list[str]], *, intervals: bool = False) -> str:
    cells = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    names = "".join(f"<th>{name}</th>" for name in head)
    table = f'<table class="numbers"><thead><tr>{names}</tr></thead><tbody>{cells}</tbody></table>'
    if intervals:
        table += '<p class="cap">Below each number its 95 % interval, by drawing the prompts anew.</p>'
    return table


def _split(lead: str, plot: str, beside: str) -> str:
    return f'<p class="lead">{lead}</p><div class="split">{plot}<div>{beside}</div></div>'
