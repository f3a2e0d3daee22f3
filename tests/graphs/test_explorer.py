"""The explorer as a file, and in a browser where one is installed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from graphs.annotations import read_annotations
from graphs.errors import GraphError
from graphs.explorer import embedded_json, explore, explorer_html
from graphs.feature_graph import FeatureGraph, feature_node, metric_node

HOSTILE = "</script><script>window.hacked = 1</script>{{script}} <!-- \u2028 &amp; \\ \" ' <img src=x onerror=alert(1)>"


class Elements(HTMLParser):
    """The texts of script elements and all attributes that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.loads: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = False


def hostile_graph() -> FeatureGraph:
    graph = FeatureGraph(["embed", "resid_0"], metadata={"title": HOSTILE, "metric": HOSTILE, "tokens": [HOSTILE, "b"]})
    attributes: dict[str, Any] = {
        "top_tokens": [HOSTILE, "\n"],
        "top_logits": [[HOSTILE, 1.0]],
        "contexts": [{"tokens": [HOSTILE, " b"], "activations": [1.0, 0.0]}],
    }
    graph.add_node(replace(feature_node("embed", 1, effect=1.0, position=0, **attributes), label=HOSTILE))
    graph.add_node(feature_node("resid_0", 2, effect=-1.0, position=1, **attributes))
    graph.add_node(metric_node(effect=1.0))
    graph.add_edge("embed/1@0", "resid_0/2@1", 0.5)
    graph.add_edge("resid_0/2@1", "metric", 0.5)
    return graph


def parsed(html: str) -> Elements:
    elements = Elements()
    elements.feed(html)
    return elements


def test_nothing_in_the_data_can_leave_its_script_element():
    text = explorer_html(hostile_graph())
    scripts = parsed(text).scripts
    assert len(scripts) == 2
    data = json.loads(scripts[0])
    assert data["nodes"][0]["label"] == HOSTILE and data["title"] == HOSTILE
    assert "hacked" not in scripts[1] and text.count("<img") == 0
    assert not set("<>&\u2028") & set(embedded_json({HOSTILE: HOSTILE}))


def test_the_file_stands_alone(make_circuit, tmp_path):
    path = explore(make_circuit(), tmp_path / "circuit.html")
    text = path.read_text(encoding="utf-8")
    assert parsed(text).loads == []
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", text)
    assert set(re.findall(r"https?://[^\"'\s<]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "{{" not in re.sub(r"(?s)<script.*?</script>", "", text)


def test_every_node_and_edge_is_in_the_data(make_circuit):
    graph = make_circuit(n_nodes=60, n_edges=200, positions=True)
    data = json.loads(parsed(explorer_html(graph)).scripts[0])
    assert [node["id"] for node in data["nodes"]] == [node.id for node in graph.nodes()]
    ends = [(data["nodes"][s]["id"], data["nodes"][t]["id"], *known) for s, t, *known in data["edges"]]
    assert ends == [(*edge[:3], edge.interval and list(edge.interval)) for edge in graph.edges()]
    assert [position for position, _ in data["positions"]] == graph.positions


def test_mistakes_are_refused(make_circuit, tmp_path):
    with pytest.raises(GraphError, match=r"'circuit\.pdf'.*\.html"):
        explore(make_circuit(), tmp_path / "circuit.pdf")
    with pytest.raises(GraphError, match="no nodes"):
        explorer_html(FeatureGraph(["a"]))


# --- in a browser -----------------------------------------------------------------------------------------------------

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on the path")
    with playwright.sync_playwright() as running:
        try:
            started = running.chromium.launch(executable_path=chromium, args=FLAGS)
        except playwright.Error as error:
            pytest.skip(f"Chromium does not start: {str(error).splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Open a graph's explorer offline; the page must raise no error and ask for nothing else."""
    problems: list[str] = []
    context = browser.new_context(viewport={"width": 1500, "height": 950}, offline=True, accept_downloads=True)

    def open_graph(graph: FeatureGraph, fragment: str = "") -> Any:
        path = explore(graph, tmp_path / "circuit.html")
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("request", lambda r: problems.append(r.url) if not r.url.startswith(("file:", "blob:")) else None)
        page.goto(path.as_uri() + fragment)
        page.wait_for_selector(".node")
        settle(page)
        return page

    yield open_graph
    context.close()
    assert problems == []


def settle(page) -> None:
    """Wait until a redraw that was asked for has happened."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def drawn(page) -> tuple[int, int]:
    return page.locator("#nodes .node").count(), page.locator("#edges .edge").count()


def move_slider(page, id: str, value: int) -> None:
    page.evaluate(f"e = document.getElementById('{id}'); e.value = {value}; e.dispatchEvent(new Event('input'))")
    settle(page)


def strongest(graph: FeatureGraph):
    return max((node for node in graph.nodes() if node.kind == "feature"), key=lambda node: abs(node.effect))


def test_hostile_text_is_shown_as_text(open_page):
    page = open_page(hostile_graph(), "#node-embed/1@0")
    assert page.evaluate("window.hacked") is None
    assert "<img src=x" in page.locator("#panel .context").first.inner_text()
    assert page.locator("img").count() == 0 and drawn(page) == (3, 2)


def test_filters_draw_what_they_say(open_page, make_circuit):
    graph = make_circuit(n_nodes=60, n_edges=200)
    page = open_page(graph)
    assert drawn(page) == (61, 200)
    move_slider(page, "nodes", 10)
    kept = sorted((n for n in graph.nodes() if n.kind != "metric"), key=lambda n: -abs(n.effect))[:10]
    ids = page.evaluate("[...document.querySelectorAll('#nodes .node')].map((e) => e.id)")
    assert set(ids) == {"node-metric", *(f"node-{node.id}" for node in kept)}
    move_slider(page, "nodes", 60)
    move_slider(page, "edges", 0)
    assert drawn(page) == (61, 0)
    page.check("#connected")
    settle(page)
    assert drawn(page) == (1, 0)
    page.uncheck("#connected")
    page.uncheck("#errors")
    settle(page)
    assert page.locator("#nodes polygon").count() == 0
    assert drawn(page)[0] == 1 + sum(node.kind == "feature" for node in graph.nodes())


def test_hover_and_click_show_a_nodes_edges(open_page, make_circuit):
    graph = make_circuit()
    page = open_page(graph)
    node = strongest(graph)
    element = page.locator(f'[id="node-{node.id}"]')
    element.hover()
    around = [edge for edge in graph.edges() if node.id in edge[:2]]
    assert page.locator("#highlight path[stroke]").count() == len(around)
    assert "faded" not in element.get_attribute("class")
    element.click()
    panel = page.locator("#panel")
    assert node.name in panel.inner_text() and panel.locator(".context").count() == 5
    listed = page.locator("#panel section", has_text=re.compile("reads from", re.I)).locator(".link")
    sources = sorted((e for e in around if e.target == node.id), key=lambda e: -abs(e.weight))
    assert listed.count() == len(sources)
    if sources:
        listed.first.click()
        assert graph.node(sources[0].source).name in page.locator("#panel h2").inner_text()
    page.mouse.move(5, 500)
    page.keyboard.press("Escape")
    assert page.locator("#panel h2").inner_text() == "This circuit"
    assert page.locator("#highlight path").count() == 0


def test_whole_paths_follow_edges_to_the_end(open_page):
    graph = FeatureGraph(["a", "b", "c"])
    for site in "abc":
        graph.add_node(feature_node(site, 0, effect=1.0))
    graph.add_node(metric_node())
    for source, target in (("a/0", "b/0"), ("b/0", "c/0"), ("c/0", "metric")):
        graph.add_edge(source, target, 1.0)
    page = open_page(graph, "#node-a/0")
    assert page.locator("#highlight path[stroke]").count() == 1
    page.check("#paths")
    settle(page)
    assert page.locator("#highlight path[stroke]").count() == 3


def test_keyboard_alone_is_enough(open_page, make_circuit):
    graph = make_circuit(positions=True)
    page = open_page(graph)
    page.keyboard.press("/")
    page.keyboard.type(strongest(graph).name)
    assert page.locator("#found").inner_text() == "1"
    page.keyboard.press("Enter")
    assert strongest(graph).name in page.locator("#panel h2").inner_text()
    page.keyboard.press("Escape")
    page.locator('[id="node-metric"]').focus()
    page.keyboard.press("ArrowDown")
    focused = page.evaluate("document.activeElement.id")
    assert focused.startswith("node-") and focused != "node-metric"
    page.keyboard.press("Enter")
    assert page.locator(".node.pinned").get_attribute("id") == focused
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, .node')]"
        ".filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)).length"
    )
    assert unnamed == 0


def test_labels_are_kept_and_saved_as_annotations(open_page, make_circuit, tmp_path):
    graph = make_circuit(labels=0.0)
    node = strongest(graph)
    page = open_page(graph, f"#node-{node.id}")
    page.fill("#label", 'number of the "subject"')
    settle(page)
    assert "number of the" in page.locator(f'[id="node-{node.id}"]').text_content()
    page.reload()
    page.wait_for_selector(".node")
    assert page.input_value("#label") == 'number of the "subject"'
    with page.expect_download() as download:
        page.click("#save-labels")
    download.value.save_as(tmp_path / "labels.jsonl")
    assert read_annotations(tmp_path / "labels.jsonl") == {node.name: 'number of the "subject"'}


def test_the_view_is_saved_as_an_svg_of_its_own(open_page, make_circuit, tmp_path):
    from xml.etree import ElementTree

    page = open_page(make_circuit())
    with page.expect_download() as download:
        page.click("#save-svg")
    download.value.save_as(tmp_path / "view.svg")
    root = ElementTree.parse(tmp_path / "view.svg").getroot()
    text = (tmp_path / "view.svg").read_text(encoding="utf-8")
    assert root.tag.endswith("svg") and root.get("viewBox") and "var(" not in text
    assert len([e for e in root.iter() if e.get("class", "").startswith("node")]) == 31


def test_boxes_of_a_large_circuit_do_not_overlap(open_page, make_circuit):
    page = open_page(make_circuit(n_nodes=300, n_edges=1500, n_layers=6))
    move_slider(page, "edges", 1000)
    move_slider(page, "nodes", 300)
    page.wait_for_function("document.querySelectorAll('#nodes .node').length === 301")
    overlaps = page.evaluate(
        """() => {
            const boxes = [...document.querySelectorAll('#nodes .shape')].map((e) => e.getBBox());
            let count = 0;
            for (const [i, a] of boxes.entries()) for (const b of boxes.slice(i + 1))
                if (a.x < b.x + b.width && b.x < a.x + a.width && a.y < b.y + b.height && b.y < a.y + a.height) count++;
            return count;
        }"""
    )
    assert overlaps == 0 and drawn(page)[1] == 1500
