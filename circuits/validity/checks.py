"""The lines of a validity report in words: what each number says, and the bar it is held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scipy.stats import binomtest

from circuits.uncertainty.verification import Verification
from circuits.validity.elsewhere import Elsewhere
from circuits.validity.families import MIN_FAMILY, Transfer
from circuits.validity.overlap import Interval, Overlap
from circuits.validity.results import Backups, Check, PromptSpread, Verdict, judge

FAITHFUL, EXPLAINED, MOST_PROMPTS = 0.8, 0.5, 0.8
"""Bars: share of the behaviour that is explained; of a single prompt; of the prompts that are."""
SAME_CIRCUIT = 0.8
"""Jaccard index that Méloux et al. 2025 (arXiv 2510.00845) suggest as a bar."""
TRANSFERS = 0.8
"""Share of what a family's own circuit restores that those of others have to restore."""
LEFT = 0.2
"""Share of the behaviour that may be left without the strongest nodes."""
AGREE = 0.7
"""Share of the strongest nodes whose estimates exact patching has to confirm."""


def _share(value: float) -> str:
    """`97 %`, never `-0 %`."""
    return f"{round(100 * value)} %"


def faithfulness(f: float, interval: Interval | None, left: float, n: int) -> Check:
    """The circuit over all prompts; left: the share without it."""
    words = f"the {n} strongest nodes alone explain {_share(f)} of the behaviour; without them {_share(left)} is left"
    return Check("faithfulness", "Does the circuit explain the behaviour?", judge(f, FAITHFUL, interval), words, f,
                 interval, FAITHFUL)  # fmt: skip


def prompts(share: float, interval: Interval | None, spread: PromptSpread) -> Check:
    """The circuit on single prompts; share: of the prompts of which it explains at least half."""
    question = "Does it on every single prompt?"
    if not spread.quartiles:
        return Check("prompts", question, "untold", "ablation moves the metric of no prompt")
    low, median, high = spread.quartiles
    words = (
        f"at least half is explained on {_share(share)} of the prompts; median {median:.2f}, quartiles {low:.2f} to "
        f"{high:.2f}, worst {spread.worst[0].faithfulness:.2f}"
    )
    if spread.left_out:
        are = (
            "prompt that ablation hardly moves is" if spread.left_out == 1 else "prompts that ablation hardly moves are"
        )
        words += f"; {spread.left_out} {are} left out"
    return Check("prompts", question, judge(share, MOST_PROMPTS, interval), words, share, interval, MOST_PROMPTS)


def resamples(overlap: Overlap, n_groups: int, needed: int, k: int) -> Check:
    """Circuits of other samples of the prompts. The bar is for the mean; the interval is of single pairs."""
    question = "Would other prompts of this kind give the same nodes?"
    if overlap.interval is None:
        few = f"{n_groups} prompts or templates are too few to tell: {needed} are needed"
        return Check("resamples", question, "untold", few, bar=SAME_CIRCUIT)
    verdict: Verdict = (
        "holds" if overlap.value >= SAME_CIRCUIT else judge(overlap.value, SAME_CIRCUIT, overlap.interval)
    )
    meaning = {"holds": "mostly the same nodes", "doubtful": "in part other nodes: read it as a set, not node by node",
               "fails": "other nodes with every sample: do not read it node by node"}  # fmt: skip
    words = f"{meaning[verdict]}; {overlap.core} of {k} nodes are in 95 % of the resamples"
    return Check("resamples", question, verdict, words, overlap.value, overlap.interval, SAME_CIRCUIT)


def families(transfer: Transfer) -> Check:
    """Families of prompts, and how far their circuits stand for one another."""
    question, split = "Is one mechanism behind all prompts?", transfer.families
    sizes = " and ".join(map(str, split.sizes))
    if split.likeness is None:
        words = f"{sizes} prompts are too few to tell: {2 * MIN_FAMILY} are needed"
        return Check("families", question, "untold", words)
    if len(split.sizes) == 1:
        words = f"no families: the effects of two prompts have a cosine of {split.likeness:.2f} on average"
        return Check("families", question, "holds", words, split.likeness)
    assert transfer.value is not None
    verdict = judge(transfer.value, TRANSFERS, transfer.interval)
    n = len(split.sizes)
    meaning = {
        "holds": "but the circuit of each explains the others as well: one mechanism",
        "doubtful": "whose circuits stand for one another in part",
        "fails": f"whose circuits do not stand for one another: {n} mechanisms, each to be read by itself",
        "untold": "whose circuits explain nothing",
    }
    words = (
        f"{n} families of prompts by their effects ({sizes} prompts, silhouette {split.silhouette or 0:.2f}), "
        f"{meaning[verdict]}; other families' circuits restore {_share(transfer.value)} of what the own one does"
    )
    return Check("families", question, verdict, words, transfer.value, transfer.interval, TRANSFERS)


def backups(result: Backups, interval: Interval | None) -> Check:
    """Check whether other nodes take over without the strongest."""
    verdict = judge(result.left, LEFT, interval, at_most=True)
    words = f"without the {result.removed} strongest nodes {_share(result.left)} of the behaviour is left"
    beside, alone = result.left_without_backups, result.left_without_next
    if verdict == "holds" or beside is None or alone is None:
        words += ", and nothing takes over" if verdict == "holds" else ", and no node's effect grows"
    elif abs(beside) < abs(alone):
        words += (
            f"; {len(result.names)} nodes take over, {result.names[0]} most: without them too {_share(beside)} is "
            f"left, without as many of the next strongest {_share(alone)}"
        )
    else:
        words += (
            f"; the {len(result.names)} nodes whose effects grow matter no more ({_share(beside)} left) than the next "
            f"strongest ({_share(alone)} left): the rest is spread"
        )
    return Check(
        "backups", "Does nothing take over without the strongest?", verdict, words, result.left, interval, LEFT
    )


def sum_check(metadata: Mapping[str, Any], *, adds_up: bool, bar: float) -> Check:
    """How nearly the effects of each site add up to patching it whole."""
    question, measured = "Do the effects of a site add up?", metadata.get("completeness")
    if not measured:
        return Check("sums", question, "untold", "the circuit does not say")
    mean, worst = measured["mean_residual"], measured["worst_residual"]
    words = f"within {100 * mean:.1f} % of the total on average, {100 * worst:.1f} % at {measured['worst_site']}"
    if not adds_up:
        return Check("sums", question, "untold", f"{words}; the method does not promise it", mean, None, bar)
    return Check("sums", question, judge(mean, bar, at_most=True), words, mean, None, bar)


def exact(verification: Verification) -> Check:
    """The strongest nodes patched one by one. Integrated gradients are shares, of which only the sign is compared."""
    marks = list(verification.disagreements.values())
    n = len(verification.names)
    wrong = marks.count("sign") if verification.shared else len(marks)
    low, high = binomtest(n - wrong, n).proportion_ci(method="wilson")
    share, what = (n - wrong) / n, "sign" if verification.shared else "sign and size"
    r = verification.correlation
    words = f"exact patching confirms the {what} of {n - wrong} of the {n} strongest nodes"
    words += "" if r is None else f", correlation {r:.2f}"
    if verification.shared and "size" in marks:
        words += f"; {marks.count('size')} have another size alone than in their site"
    interval = (float(low), float(high))
    return Check("exact", "Do the estimates agree with patching?", judge(share, AGREE, interval), words, share,
                 interval, AGREE)  # fmt: skip


def paraphrases(result: Elsewhere) -> Check:
    """The circuit on prompts in other words."""
    verdict = judge(result.faithfulness, FAITHFUL, result.interval)
    words = (
        f"on prompts in other words its nodes explain {_share(result.faithfulness)}; the circuit found there overlaps "
        f"by {result.overlap.value:.2f}"
    )
    return Check("paraphrases", "Does it hold in other words?", verdict, words, result.faithfulness, result.interval,
                 FAITHFUL)  # fmt: skip


def other_saes(result: Elsewhere) -> Check:
    """The circuit beside that of other autoencoders. The bar is for the circuits of all prompts."""
    overlap = result.overlap
    verdict: Verdict = (
        "holds" if overlap.value >= SAME_CIRCUIT else judge(overlap.value, SAME_CIRCUIT, overlap.interval)
    )
    words = (
        f"{_share(result.matched)} of its features have a partner in the other autoencoders, whose circuit of as many "
        f"nodes explains {_share(result.faithfulness)}"
    )
    return Check("other-saes", "Do other autoencoders give the same circuit?", verdict, words, overlap.value,
                 overlap.interval, SAME_CIRCUIT)  # fmt: skip
