"""The story of the debiased classifier, in small."""

from __future__ import annotations

import pytest

from circuits.debiasing.results import ShiftReport
from examples.agreement.make_labelled import labelled
from examples.debiasing import DebiasingConfig, debias


def test_labelled_texts():
    for name in ("attractor", "subject"):
        train, concept, test = (labelled(name, split, 80) for split in ("train", "concept", "test"))
        assert len({row["text"] for row in train}) == 80 and all("intended" not in row for row in concept)
        groups = {(row["intended"], row["spurious"]) for row in train}
        assert len(groups) == 4 and groups == {(row["intended"], row["spurious"]) for row in test}
        nouns = [{row["text"].split()[1] for row in rows} for rows in (train, test)]
        assert not nouns[0] & nouns[1]
    for row in labelled("subject", "train", 80):
        subject, other = (row["text"].split()[number] for number in (1, 4))
        assert row["intended"] == ("plural" if subject.endswith("s") or subject in ("men", "women", "children") else
                                   "singular") and subject != other  # fmt: skip


@pytest.mark.slow
def test_the_story_in_small(tmp_path):
    reports = debias(DebiasingConfig(out=tmp_path, tokens=2_000, train=48, concept=24, test=24, steps=1), ["attractor"])
    for name, report in reports.items():
        assert report.score("original probe").spurious > 0.8, "the ambiguous probe goes by what is spurious"
        assert report.score("oracle").intended > 0.8
        assert ShiftReport.load(tmp_path / f"{name}.json").title() == report.title()
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
