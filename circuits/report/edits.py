"""Edits: the behaviour before and after, beside the same edit of random features, and what the model then says."""

from __future__ import annotations

import difflib

from circuits.editing.results import Continuation, EditReport
from circuits.report.markup import Html, missing, number, section, share, signed, text

FEATURES_SHOWN = 20


def headline_edit(edits: dict[str, EditReport]) -> tuple[str, str, str]:
    """What the edit that leaves least of the behaviour leaves of it, for the head of the page."""
    edit = min(
        edits.values(), key=lambda report: abs(report.remaining) if report.remaining is not None else float("inf")
    )
    drawn = [left for left in edit.random_remaining if left is not None]
    beside = f"; random features leave {share(sum(drawn) / len(drawn))}" if drawn else ""
    n = len(edit.features)
    shares = [left for left in edit.remaining_by_case.values() if left is not None]
    by_case = f"by case {share(min(shares))} to {share(max(shares))}; " if shares else ""
    n_reversed, n_cases = len(edit.reversed_cases), len(edit.before.by_case)
    turned = f"reversed in {n_reversed} of {n_cases} cases; " if n_reversed else ""
    return (
        "–" if edit.remaining is None else share(edit.remaining),
        "left after an edit",
        f"{by_case}{turned}{n} {'feature' if n == 1 else 'features'} {edit.action}{beside}",
    )


def edits_section(edits: dict[str, EditReport]) -> Html:
    """A block for each edit."""
    if not edits:
        command = "sfc ablate --circuit RUN --top 10 --prompts P.jsonl"
        return section("edits", "Edits", missing("Nothing was edited yet.", command))
    lead = (
        "Features are changed inside the running model, errors and all other features stay as they are. An edit means "
        "something when it moves the behaviour, leaves other text alone, and the same edit of as many random active "
        "features does neither. What is left is told by case; over cases it is the mean size, so that a reversed case "
        "does not make up for another. ○ before, ● after, the line is the range over the draws of random features."
    )
    in_order = sorted(edits, key=lambda name: (len(edits[name].features), name))
    blocks = "".join(_block(name, edits[name]) for name in in_order)
    return section("edits", "Edits", f'<p class="lead">{lead}</p>{blocks}')


def _block(name: str, edit: EditReport) -> str:
    cases = list(edit.before.by_case)
    title = f"{edit.metric}, mean size" if cases else edit.metric
    rows = [_row(title, [run.size for run in edit.runs], left=edit.remaining, strong=True)]
    for case in cases:
        values = [run.by_case[case].metric for run in edit.runs]
        rows.append(_row(case, values, left=edit.left(edit.after, case), case=True))
    if edit.before.overall.accuracy is not None:
        rows.append(_row("accuracy", [run.overall.accuracy or 0.0 for run in edit.runs], strong=True))
        for case in cases:
            rows.append(_row(case, [run.by_case[case].accuracy or 0.0 for run in edit.runs], case=True))
    if edit.before.ce is not None:
        values = [run.ce or 0.0 for run in edit.runs]
        rows.append(_row(f"cross-entropy, {edit.n_texts} other texts", values, strong=True, digits=3))
    head = '<th class="name"></th><th class="dots"></th><th>before</th><th>after</th><th>left</th>'
    head += f"<th>{text(edit.random_title())}</th>" if edit.random else ""
    names = ", ".join(text(feature) for feature in edit.features[:FEATURES_SHOWN])
    more = len(edit.features) - FEATURES_SHOWN
    listed = f'<p class="cap">{names}{f" and {more} more" if more > 0 else ""}</p>'
    table = f'<table class="numbers edit"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    remarks = "".join(f'<p class="cap">{text(remark)}</p>' for remark in edit.remarks())
    samples = "".join(_sample(sample) for sample in edit.continuations)
    heading = f"<h3>{text(edit.title())}</h3>"
    return f'<div class="edit" id="edit-{text(name)}">{heading}{listed}{table}{remarks}{samples}</div>'


def _row(
    name: str,
    values: list[float],
    *,
    left: float | None = None,
    strong: bool = False,
    case: bool = False,
    digits: int = 2,
) -> str:
    before, after, *drawn = values
    cells = [f"<td>{number(before, digits)}</td>", f"<td><b>{number(after, digits)}</b></td>"]
    cells.append(f"<td>{'' if left is None else share(left)}</td>")
    if drawn:
        mean = sum(drawn) / len(drawn)
        span = f"{number(min(drawn), digits)} to {number(max(drawn), digits)}"
        cells.append(f"<td>{number(mean, digits)} <small>{span}</small></td>")
    kind = "case" if case else "strong" if strong else ""
    dots = f'<td class="dots">{_dots(before, after, drawn)}</td>'
    return f'<tr class="{kind}"><td class="name">{text(name)}</td>{dots}{"".join(cells)}</tr>'


def _dots(before: float, after: float, drawn: list[float]) -> str:
    """A line from before to after over the range of the random draws, scaled to the row."""
    values = [0.0, before, after, *drawn]
    low, high = min(values), max(values)
    span = (high - low) or 1.0

    def x(value: float) -> float:
        return 6 + 168 * (value - low) / span

    parts = [f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="1" y2="17"/>']
    parts.append(f'<line class="move" x1="{x(before):.1f}" x2="{x(after):.1f}" y1="9" y2="9"/>')
    if drawn:
        left, right = x(min(drawn)), x(max(drawn))
        parts.append(f'<line class="range" x1="{left - 1:.1f}" x2="{right + 1:.1f}" y1="14" y2="14"/>')
    parts.append(f'<circle class="before" cx="{x(before):.1f}" cy="9" r="3.6"/>')
    parts.append(f'<circle class="after" cx="{x(after):.1f}" cy="9" r="3.8"/>')
    label = f"from {signed(before)} to {signed(after)}"
    return f'<svg class="dots" viewBox="0 0 180 18" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _sample(sample: Continuation) -> str:
    """A prompt and both continuations, the words that differ marked."""
    before, after = sample.before.split(), sample.after.split()
    old, new = [], []
    for kind, a, b, c, d in difflib.SequenceMatcher(a=before, b=after, autojunk=False).get_opcodes():
        old.append(_words(before[a:b], changed=kind != "equal"))
        new.append(_words(after[c:d], changed=kind != "equal"))
    return (
        f'<div class="sample"><p>{text(sample.prompt)}</p><dl><dt>before</dt><dd>{" ".join(filter(None, old))}</dd>'
        f"<dt>after</dt><dd>{' '.join(filter(None, new))}</dd></dl></div>"
    )


def _words(words: list[str], *, changed: bool) -> str:
    joined = text(" ".join(words))
    return f"<em>{joined}</em>" if changed and joined else joined
