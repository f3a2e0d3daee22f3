from __future__ import annotations

import re

import pytest

from graphs.errors import GraphError
from graphs.tokens import highlight_tokens


def strengths(html: str) -> list[float]:
    return [float(x) for x in re.findall(r"rgb\(214 140 20 / ([\d.]+)\)", html)]


def test_stronger_activations_are_shaded_more_and_inactive_tokens_not_at_all():
    html = highlight_tokens(["The", " cat", " sat"], [0.0, 1.0, 2.0])
    assert "<span>The</span>" in html and 'title="1"' in html
    low, high = strengths(html)
    assert 0 < low < high and strengths(highlight_tokens(["a"], [1.0], largest=2.0)) == [low]


def test_text_is_escaped_and_line_breaks_are_seen():
    html = highlight_tokens(["<script>", "\n", "&"], [1.0, 1.0, 0.0])
    assert "<script>" not in html and "&lt;script&gt;" in html and "⏎" in html and "&amp;" in html
    assert re.sub(r"<[^>]+>", "", html) == "&lt;script&gt;⏎&amp;"


def test_silent_contexts_and_wrong_lengths():
    assert "mark" not in highlight_tokens(["a", "b"], [0.0, 0.0])
    assert highlight_tokens([], []) == ""
    with pytest.raises(GraphError, match=r"2 tokens.*1 activations"):
        highlight_tokens(["a", "b"], [1.0])
