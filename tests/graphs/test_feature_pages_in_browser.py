"""The feature pages in Chromium: what they show, that texts in them are inert, and the way to the drawing and back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graphs.explorer import explore, explore_features
from graphs.feature_graph import FeatureGraph, feature_node
from tests.graphs.test_explorer import FOLDER, HOSTILE

CONTEXT = {
    "tokens": [HOSTILE, " ملوك", " \u2067b"],
    "activations": [0.0, 2.0, 0.5],
    "peak": 1,
    "change": [None, -0.9, 0.4],
}
FULL = {
    "density": 0.125, "max_activation": 2.0, "mean_activation": 1.0, "contexts": [CONTEXT], "random": [CONTEXT],
    "samples": [{"low": 1.0, "high": 2.0, "share": 0.04, "contexts": [CONTEXT]}],
    "histogram": {"edges": [0.0, 1.0, 2.0], "counts": [100, 3]}, "quantiles": [(0.5, 0.4), (0.9, 1.1)],
    "logit_histogram": {"edges": [-1.0, 0.0, 1.0], "counts": [40, 2]}, "top_logits": [(HOSTILE, 0.9)],
    "bottom_logits": [("b", -0.9)], "top_tokens": ["ملوك", HOSTILE], "prompt_peaks": {"one": [1.5, 0.0], "two": [0.2]},
    "by_case": {"one": {"subject": 2.0, "verb": 0.0}, "two": {"subject": 0.1, "verb": 0.0}},
    "similar": {"decoder": [("resid_0/3", 0.8), ("attn_0/9", 0.5)], "activation": [("resid_0/3", 0.7)]},
    "attention": {"attn_1 head 0 looks here": [("resid_0/3", 0.75), ("resid_0/bias " + HOSTILE, -0.25)]},
}  # fmt: skip
NEVER = {"density": 0.0, "max_activation": 0.0, "top_logits": [("a", 1.0)], "bottom_logits": [("b", -1.0)]}


def features() -> FeatureGraph:
    graph = FeatureGraph(["embed", "resid_0", "resid_1"], metadata={"title": HOSTILE})
    graph.add_node(replace(feature_node("resid_1", 2, effect=1.5, position="subject", **FULL), label=HOSTILE))
    automatic = {**FULL, "automatic_label": "guessed"}
    graph.add_node(feature_node("resid_0", 3, effect=-0.5, position="subject", **automatic))
    graph.add_node(feature_node("embed", 4, effect=0.0, **NEVER, outside=True))
    graph.add_edge("resid_0/3@subject", "resid_1/2@subject", 0.25)
    return graph


@pytest.fixture
def pages(browser, tmp_path):
    """Open a run's feature page, which leads to its drawing and back."""
    opened = []

    def open_pages(fragment: str = "", *, graph: FeatureGraph | None = None, **options):
        graph = features() if graph is None else graph
        (tmp_path / "graph").mkdir(exist_ok=True)
        (tmp_path / "features").mkdir(exist_ok=True)
        explore(features(), tmp_path / "graph" / "circuit.html", links={"features": "../features/index.html"})
        links = {"circuit": "../graph/circuit.html"}
        path = explore_features(
            graph, tmp_path / "features" / "index.html", title=HOSTILE, about="9 tokens", links=links
        )
        opened.append(browser.open(**options))
        opened[-1].goto(path.as_uri() + fragment)
        return opened[-1]

    yield open_pages
    problems = [problem for page in opened for problem in page.problems()]
    for page in opened:
        page.close()
    assert problems == []


def test_a_page_shows_everything_and_texts_are_inert(pages):
    page = pages("#resid_1%2F2")
    page.wait("document.querySelectorAll('#feature svg').length === 2")
    assert page.evaluate("window.hacked") is None and page.count("#feature img") == 0
    text = page.text("#feature")
    assert HOSTILE.split("{{")[0] in text and "ملوك" in text and "labelled" in text and "Never on at verb" in text
    assert "effect +1.50" in text and "rank 1 of 2" in text and "4 % of tokens" in text and "attn_0/9" in text
    assert "ATTN_1 HEAD 0 LOOKS HERE" in text and "resid_0/bias" in text and "−0.25" in text
    assert page.count("#feature .context") == 3 and page.count("#feature .reading u.change.negative") == 4
    assert page.evaluate("document.querySelector('.context mark').title").startswith("activation 2; log p −0.90")
    assert page.count(".bars tbody tr") == 3 and page.count("#feature svg [stroke='#2468b0'], #feature rect") > 3


def test_the_list_is_searched_sorted_and_walked(pages):
    page = pages()
    assert page.count("#list li") == 3 and page.text("#feature h2").startswith("resid_1/2")
    page.key("ArrowDown")
    assert page.evaluate("location.hash") == "#resid_0%2F3" and "automatic label" in page.text("#feature .title")
    page.evaluate("(e => { e.value = 'site'; e.dispatchEvent(new Event('change', {bubbles: true})) })(order)")
    page.settle()
    assert "embed/4" in page.text("#list li:first-child")
    page.click("#list li:first-child a")
    assert "never on in the text" in page.text("#feature") and "not in the circuit" in page.text("#feature")
    page.evaluate("document.getElementById('search').focus()")
    page.type("guess")
    assert page.count("#list li") == 1
    empty = pages(graph=FeatureGraph(["embed"]))
    assert "no feature on this page" in empty.text("#feature")


def test_drawing_and_page_lead_to_each_other(pages):
    page = pages("#resid_0%2F3")
    page.goto(page.evaluate("document.querySelector('#feature .places a').href"))
    assert page.text(".card h2").startswith("resid_0/3") and page.count(".card .context") == 1
    page.goto(page.evaluate("document.querySelector('.card .hint a').href"))
    assert page.text("#feature h2").startswith("resid_0/3")


def test_no_accessibility_faults(pages):
    axe = FOLDER / "node_modules" / "axe-core" / "axe.min.js"
    if not axe.is_file():
        pytest.skip("axe-core is not installed: npm ci in graphs/explorer")
    for options in ({}, {"dark": True}, {"width": 390}):
        page = pages("#resid_1%2F2", **options)
        page.wait("document.querySelectorAll('#feature svg').length === 2")
        page.evaluate(axe.read_text(encoding="utf-8") + ";0")
        found = page.evaluate("axe.run().then((r) => r.violations.map((v) => [v.id, v.nodes[0].html]))")
        assert found == [], options
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
