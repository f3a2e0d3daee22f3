"""The report's table of `sfc validate`: a verdict a line with its number on an axis, and the tables behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from circuits.report.files import RunFiles

LOW, HIGH = -0.1, 1.1
"""Ends of the axis; what lies beyond stands at its end."""
WIDTH = 150
"""Points that it is wide."""
PROMPTS_SHOWN, NODES_SHOWN = 5, 8


@dataclass(frozen=True)
class CheckRow:
    """One line."""

    check: dict[str, Any]
    """The check as the file has it."""
    ends: tuple[str, str] | None
    """Where the interval begins and ends on the axis."""
    dot: str | None
    """Where the number is."""
    bar: str | None
    """Where the bar is."""


def validity_block(run: RunFiles) -> dict[str, Any] | None:
    """The lines and tables; None where nothing was validated."""
    data = run.validity
    if data is None:
        return None
    rows = []
    for check in data["checks"]:
        low, high = check["interval"] or (None, None)
        ends = None if low is None or high is None else (_x(low), _x(high))
        rows.append(
            CheckRow(check, ends, *(None if check[name] is None else _x(check[name]) for name in ("value", "bar")))
        )
    families, backups, prompts = data["families"], data["backups"], data["prompts"]
    grown = [] if not backups else list(zip(backups["names"], backups["before"], backups["after"], strict=False))
    return {
        "rows": rows,
        "width": WIDTH,
        "zero_one": (_x(0), _x(1)),
        "nodes": data["nodes"],
        "n_prompts": data["n_prompts"],
        "drawn": data["drawn"],
        "families": families if families and families["faithfulness"] else None,
        "backups": backups,
        "grown": grown[:NODES_SHOWN],
        "worst": prompts["worst"][:PROMPTS_SHOWN] if prompts else [],
    }


def _x(value: float) -> str:
    share = (min(max(value, LOW), HIGH) - LOW) / (HIGH - LOW)
    return f"{4 + (WIDTH - 8) * share:.1f}"
