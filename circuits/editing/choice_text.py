"""How features were chosen, in words, and whether their edit is surgical."""

from __future__ import annotations

from circuits.editing.records import Choice

SURGICAL_LEFT, SURGICAL_COST, NO_COST = 0.15, 1 / 3, 0.002
"""A surgical edit leaves at most this share at this share of the cost of zeroing the ten strongest, or at a cost of no
matter, in nats a token.
"""
Measured = tuple[float | None, float | None]
"""Cost of an edit elsewhere, in nats a token, and the share of the behaviour it leaves; None where unknown."""


def about_choice(
    choice: Choice, chosen: Measured, strongest: Measured = (None, None), *, surgical: bool | None
) -> list[str]:
    """The steps of a choice, what it costs beside zeroing the ten strongest, and what it lacks to be surgical."""
    lines = [
        f"chosen from {choice.n_candidates} features by {choice.n_trials} trials on training prompts and text, in "
        f"{choice.seconds:.0f} s; in the order of choice (left and cost elsewhere there):"
    ]
    for step in choice.steps:
        signs = [f"+ {name}" for name in step.added] + [f"- {name}" for name in step.dropped]
        signs += [f"x {step.strength:g}"] if step.strength != 1 else []
        lines.append(f"  {', '.join(signs):<40} {_percent(step.left):>6} {step.ce_elsewhere:+8.4f}")
    (cost, left), (of_strongest, left_by_strongest) = chosen, strongest
    if cost is not None and of_strongest is not None:
        lines.append(
            f"elsewhere it costs {cost:+.4f} nats a token; zeroing the ten strongest costs {of_strongest:+.4f} and "
            f"leaves {_percent(left_by_strongest or 0.0)}"
        )
    if surgical is False:
        lines.append(
            _not_surgical(choice, cost or 0.0, left or 0.0, max(SURGICAL_COST * (of_strongest or 0.0), NO_COST))
        )
    return lines


def _not_surgical(choice: Choice, cost: float, left: float, bar: float) -> str:
    """A sentence on what the edit leaves and costs beside the bars, and which earlier features would do instead."""
    dearest, cheap = choice.dearest, choice.cheap
    text = (
        f"this edit is not surgical: it leaves {_percent(left)} and costs {cost:+.4f} elsewhere, where the bar is "
        f"{_percent(SURGICAL_LEFT)} at {bar:+.4f}, a third of what zeroing the ten strongest costs"
    )
    if cost > bar and dearest:
        text += f", for what {dearest} writes is needed elsewhere"
    if cheap is None:
        return f"{text}; no feature before it takes any of the behaviour away at little cost"
    enough = abs(cheap.left) <= SURGICAL_LEFT and cheap.ce_elsewhere <= bar
    which = "surgical would be" if enough else "the best at little cost are"
    return (
        f"{text}; of the features before {dearest or 'it'} {which} {', '.join(cheap.added)}, which leave "
        f"{_percent(cheap.left)} at {cheap.ce_elsewhere:+.4f}"
    )


def _percent(share: float) -> str:
    return f"{round(100 * share)} %"
