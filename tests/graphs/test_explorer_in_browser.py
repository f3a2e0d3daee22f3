"""The explorer and the report in Chromium, where one is installed: what they draw; mouse, keys and files work."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from circuits.report import write_report
from graphs.annotations import read_annotations
from graphs.explorer import explore, explorer_html
from graphs.feature_graph import FeatureGraph, feature_node, metric_node
from tests.graphs.browser import Page
from tests.graphs.test_explorer import FOLDER, hostile_graph

POINT = "(id => {{ const at = viewer.stage().{method}(id), r = viewer.stage().front.getBoundingClientRect();"
POINT += " return [at.x + r.left, at.y + r.top]; }})({id})"

NOTEBOOK = """(async () => {
  const listeners = {};
  Object.assign(window, { traits: %s, saved: 0, inner: null });
  const model = {
    get: (name) => traits[name],
    set: (name, value) => { traits[name] = value; },
    save_changes: () => { saved++; },
    on: (event, listener) => { (listeners[event] ??= []).push(listener); },
    off: () => {},
  };
  window.change = (name, value) => { traits[name] = value; for (const f of listeners["change:" + name]) f(); };
  const module = await import(URL.createObjectURL(new Blob([%s], { type: "text/javascript" })));
  module.default.render({ model, el: document.body });
})()"""
"""A notebook's side of an anywidget."""


@pytest.fixture
def open_page(browser, tmp_path) -> Iterator[Callable[..., Page]]:
    """Open a graph's explorer offline; the page must raise no error and ask for nothing else."""
    pages: list[Page] = []

    def open_graph(graph: FeatureGraph, fragment: str = "", **options) -> Page:
        path = explore(graph, tmp_path / "circuit.html")
        pages.append(browser.open(**options))
        pages[-1].goto(path.as_uri() + fragment)
        return pages[-1]

    yield open_graph
    problems = [problem for page in pages for problem in page.problems()]
    for page in pages:
        page.close()
    assert problems == []


def where(page: Page, id: str, method: str = "where") -> tuple[float, float]:
    """The middle of a node (or with `whereEdge` of an edge) in the window."""
    x, y = page.evaluate(POINT.format(method=method, id=json.dumps(id)))
    return x, y


def drawn(page: Page) -> tuple[list[str], int]:
    """Ids of the drawn boxes, and the number of curves."""
    return page.evaluate("[viewer.scene.value.items.map((item) => item.id), viewer.scene.value.links.length]")


def slide(page: Page, id: str, value: int) -> None:
    page.evaluate(
        f"(e => {{ e.value = {value}; for (const type of ['input', 'change'])"
        f" e.dispatchEvent(new Event(type, {{bubbles: true}})) }})(document.getElementById('{id}'))"
    )
    page.settle()


def strongest(graph: FeatureGraph):
    return max((node for node in graph.nodes() if node.kind == "feature"), key=lambda node: abs(node.effect))


def with_classes(graph: FeatureGraph) -> FeatureGraph:
    """The graph with activations by case: features of even number are on for one, odd ones for the other."""

    def change(node):
        if node.kind != "feature":
            return node
        values = {"singular": {"": 3.0 * (node.feature % 2 == 0)}, "plural": {"": 2.0 * (node.feature % 2)}}
        peaks = {case: [mean[""], 5.0] for case, mean in values.items()}
        return replace(node, attributes={**node.attributes, "by_case": values, "prompt_peaks": peaks})

    graph = graph.map_nodes(change)
    graph.metadata["example_pairs"] = [{"case": "plural", "clean": "The kings", "clean_answer": " are"}]
    return graph


def test_hostile_text_is_shown_as_text(open_page):
    page = open_page(hostile_graph(), "#node-embed/1@0")
    assert page.evaluate("window.hacked") is None
    assert "<img src=x" in page.text("#panel .context") and "ملك" in page.text("#panel .chips")
    page.evaluate("viewer.state.view.value = 'table'")
    page.settle()
    assert page.count("img") == 0 and "<img" in page.text("#table") and page.count("script") == 3
    assert len(drawn(page)[0]) == 3 and drawn(page)[1] == 2
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("window.hacked") is None and page.count("img") == 0


def test_filters_draw_what_they_say(open_page, make_circuit):
    graph = make_circuit(n_nodes=60, n_edges=200)
    page = open_page(graph, "#nodes=60&edges=200")
    assert len(drawn(page)[0]) == 61 and drawn(page)[1] == 200
    slide(page, "nodes", 10)
    ranked = sorted((n for n in graph.nodes() if n.kind != "metric"), key=lambda n: -abs(n.effect))
    assert set(drawn(page)[0]) == {"metric", *(node.id for node in ranked[:10])}
    slide(page, "nodes", 60)
    slide(page, "edges", 0)
    assert len(drawn(page)[0]) == 61 and drawn(page)[1] == 0
    page.click("#connected")
    assert drawn(page)[0] == ["metric"]
    page.click("#connected")
    page.click("#errors")
    assert set(drawn(page)[0]) == {node.id for node in graph.nodes() if node.kind != "error"}
    assert "errors=0" in page.evaluate("location.hash")
    page.evaluate("history.back()")
    page.wait("document.getElementById('errors').checked && !location.hash.includes('errors')")
    page.key("z", ctrl=True)
    assert not page.evaluate("location.hash.includes('connected')")


@pytest.mark.slow
def test_labels_can_be_read_at_the_start(open_page, make_circuit):
    page = open_page(with_classes(make_circuit(n_nodes=120, n_edges=400)))
    tally = page.evaluate("viewer.stage().tally")
    assert tally["labels"] >= 25 and tally["smallest"] >= 10 and tally["cut"] <= 0.05 * tally["labels"]
    assert page.evaluate("viewer.state.lens.value") == "class" and page.count("#legend .kind") == 2
    before = len(drawn(page)[0])
    page.click("#legend .kind")
    assert 1 < len(drawn(page)[0]) <= before
    kinds = page.evaluate(
        "viewer.scene.value.items.filter((i) => i.node.kind === 'feature').map((i) => i.node.feature % 2)"
    )
    assert set(kinds) == {0}  # the classes come in the order of their names: plural, singular
    page.evaluate("(viewer.state.hiddenKinds.value = [], viewer.state.lens.value = 'prompt:0')")
    page.settle()
    assert "The kings" in page.text("#lens option:checked")
    page.click("#legend .kind")  # those that are silent on the prompt
    features = "viewer.scene.value.items.filter((i) => i.node.kind === 'feature').map((i) => i.node.feature % 2)"
    assert set(page.evaluate(features)) == {1}


def test_hover_click_and_edges(open_page, make_circuit):
    graph = make_circuit(n_nodes=30, n_edges=80)
    page = open_page(with_classes(graph), "#nodes=30&edges=80")
    node = strongest(graph)
    page.move(*where(page, node.id))
    page.settle()
    page.wait("document.querySelector('#hover .context')")
    assert (
        node.name in page.text("#hover") and page.count("#hover .bars tr") == 2 and page.count("#hover .context") == 3
    )
    around = [edge for edge in graph.edges() if node.id in edge[:2]]
    assert len(page.evaluate("viewer.stage().outstanding().links.map((l) => l.key)")) == len(around)
    page.click_at(*where(page, node.id))
    page.click_at(*where(page, "metric"))
    assert page.count("#panel .card") == 2 and node.name in page.text("#panel")
    assert page.count(f"#panel [data-id='{node.id}'] .context") == 5
    page.key("Escape")
    assert page.text("#panel h2") == "This circuit"
    key = page.evaluate("viewer.scene.value.links.find((l) => Math.abs(l.source.y - l.target.y) > 60).key")
    x, y = where(page, key, "whereEdge")
    corner = "viewer.stage().front.getBoundingClientRect()"
    near = f"viewer.stage().linkAtPoint({x} + 5 - {corner}.left, {y} - {corner}.top)"
    found = page.evaluate(f"{near}?.key")
    assert found is not None  # within the band of 8 pixels
    page.evaluate(f"viewer.state.openEdge.value = '{key}'")
    page.settle()
    assert "weight" in page.text("#panel .edge-card") and page.count("#panel .edge-card .pair > div") == 3
    with_cases = next(n for n, edge in enumerate(graph.edges()) if edge.by_case)
    page.evaluate(f"viewer.state.openEdge.value = viewer.scene.value.links.find((l) => l.index === {with_cases}).key")
    page.settle()
    assert "weight by case" in page.text("#panel .edge-card")
    assert "singular" in page.text("#panel .edge-card") and page.count("#panel .edge-card .negative, .positive") >= 2


def test_whole_paths_follow_edges_to_the_end(open_page):
    graph = FeatureGraph(["a", "b", "c"])
    for site in "abc":
        graph.add_node(feature_node(site, 0, effect=1.0))
    graph.add_node(metric_node())
    for source, target in (("a/0", "b/0"), ("b/0", "c/0"), ("c/0", "metric")):
        graph.add_edge(source, target, 1.0)
    page = open_page(graph, "#node-a/0")
    lit = "viewer.stage().outstanding().links.length"
    assert page.evaluate(lit) == 1
    page.click("#paths")
    assert page.evaluate(lit) == 3


def test_search_finds_what_is_not_drawn(open_page, make_circuit):
    graph = make_circuit(n_nodes=60, n_edges=100)
    weakest = min((n for n in graph.nodes() if n.kind == "feature"), key=lambda n: abs(n.effect))
    rare = replace(
        weakest,
        attributes={**weakest.attributes, "contexts": [{"tokens": [" zebra", " 斑马"], "activations": [1.0, 0.5]}]},
    )
    page = open_page(graph.map_nodes(lambda node: rare if node.id == weakest.id else node), "#nodes=10")
    for words in (weakest.name, "zebra", "斑马"):
        page.evaluate(f"viewer.state.query.value = {json.dumps(words)}")
        page.settle()
        assert weakest.id in page.evaluate(
            "[...document.querySelectorAll('#panel .link small')].map((e) => e.textContent).join()"
        )
    assert page.text("#found") == "1" and "not drawn" in page.text("#panel .link")
    page.click("#panel .link")
    assert weakest.id in drawn(page)[0]


def test_keyboard_alone_is_enough(open_page, make_circuit):
    graph = make_circuit(positions=True)
    page = open_page(graph, "#nodes=30")
    page.key("/")
    page.type(strongest(graph).id)
    assert page.text("#found") == "1"
    page.key("Enter")
    assert strongest(graph).name in page.text("#panel .card h2")
    page.key("Escape")
    page.key("Escape")
    page.evaluate("document.getElementById('nodes-list').focus()")
    page.key("ArrowDown")
    reached = page.evaluate("viewer.state.hovered.value")
    active = "document.getElementById(document.activeElement.getAttribute('aria-activedescendant'))"
    assert reached not in (None, "metric") and page.evaluate(f"{active}.dataset.id") == reached
    page.key("Enter")
    assert page.evaluate("viewer.state.pins.value") == [reached]
    assert page.evaluate(f"{active}.ariaSelected") == "true"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, select')]"
        ".filter((e) => !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)).length"
    )
    assert unnamed == 0


def test_labels_are_kept_and_saved_as_annotations(open_page, make_circuit):
    graph = make_circuit(labels=0.0)
    graph.metadata["saes_fingerprint"] = "abc"
    node = strongest(graph)
    page = open_page(graph, f"#node-{node.id}")
    page.evaluate("document.querySelector('.label input').focus()")
    page.type('number of the "subject"')
    page.key("Enter")
    page.send("Page.reload")
    page.wait("document.documentElement?.dataset.ready && document.querySelector('.label input')?.value")
    assert page.evaluate("document.querySelector('.label input').value") == 'number of the "subject"'
    fewer = graph.subgraph([n.id for n in graph.nodes() if n.kind == "metric" or n.id == node.id])
    page.goto(explore(fewer, Path(page.evaluate("decodeURI(location.pathname)"))).as_uri() + "?again")
    assert node.name in page.evaluate("JSON.stringify(viewer.state.labels.value)")  # another graph of the same SAEs
    page.click("#save")
    assert read_annotations(page.download("#save-labels")) == {node.name: 'number of the "subject"'}


def test_supernodes_are_made_kept_and_loaded(open_page, make_circuit):
    graph = make_circuit(n_nodes=20, n_edges=60)
    page = open_page(graph, "#nodes=20&edges=60")
    two = [node.id for node in sorted(graph.nodes(), key=lambda n: -abs(n.effect)) if node.kind == "feature"][:2]
    for id in two:
        page.click_at(*where(page, id), shift=True)
    assert page.evaluate("viewer.state.selected.value") == two
    page.evaluate("document.getElementById('group-name').focus()")
    page.type("my group")
    page.key("Enter")
    items, _ = drawn(page)
    assert "group:my group" in items and not set(two) & set(items)
    total = sum(
        edge.weight
        for edge in graph.edges()
        if edge.source in two and edge.target not in two and edge.target == "metric"
    )
    weight = page.evaluate(
        "viewer.scene.value.links.find((l) => l.source.group && l.target.id === 'metric')?.weight ?? 0"
    )
    assert weight == pytest.approx(total)
    saved = page.download("#save-groups")
    assert json.loads(saved.read_text())["groups"] == [{"name": "my group", "nodes": two, "collapsed": True}]
    page.key("z", ctrl=True)
    assert set(two) <= set(drawn(page)[0])
    text = json.dumps(saved.read_text())
    page.evaluate(
        f"""(() => {{
            const files = new DataTransfer();
            files.items.add(new File([{text}], "groups.json"));
            const input = document.getElementById("load-groups");
            input.files = files.files;
            input.dispatchEvent(new Event("change", {{ bubbles: true }}));
        }})()"""
    )
    page.wait("viewer.state.groups.value.length === 1")
    page.send("Page.reload")
    page.wait("document.documentElement?.dataset.ready && viewer.state.groups.value.length === 1")
    x, y = where(page, "group:my group")
    page.drag(
        [(x - 120, y - 40), (x + 120, y - 40), (x + 120, y + 40), (x - 120, y + 40), (x - 120, y - 40)], shift=True
    )
    assert set(two) <= set(page.evaluate("viewer.state.selected.value"))


def test_what_is_shown_is_saved(open_page, make_circuit, tmp_path):
    graph = make_circuit(n_nodes=30, n_edges=80, positions=True)
    page = open_page(graph, "#nodes=20&edges=30")
    items, links = drawn(page)
    files = {}
    for name in ("svg", "json", "nodes", "edges", "png"):
        page.click("#save")
        files[name] = page.download(f"#save-{name}")
    root = ElementTree.parse(files["svg"]).getroot()
    texts = " ".join(element.text or "" for element in root.iter())
    assert len([e for e in root.iter() if e.get("class") == "node"]) == len(items)
    assert len([e for e in root.iter() if e.get("class") == "edge"]) == links
    assert graph.metadata["title"] in texts and "raises the metric" in texts
    assert "var(" not in files["svg"].read_text(encoding="utf-8")
    shown = FeatureGraph.load(files["json"])
    assert {node.id for node in shown.nodes()} == set(items) and len(shown.edges()) == links
    assert all(shown.node(id).effect == graph.node(id).effect for id in items)
    rows = list(csv.DictReader(files["nodes"].open(newline="", encoding="utf-8")))
    assert {row["id"] for row in rows} == set(items)
    assert len(list(csv.DictReader(files["edges"].open(newline="")))) == links
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_touch_and_narrow_windows(open_page, make_circuit):
    graph = make_circuit(n_nodes=40, n_edges=100)
    page = open_page(graph, width=390, height=844, touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    id = next(id for id in drawn(page)[0] if id != "metric")
    x, y = where(page, id)
    count = len(drawn(page)[0])
    page.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    page.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    page.wait("viewer.state.pins.value.length === 1")
    page.settle()
    assert len(drawn(page)[0]) == count
    before = page.evaluate("viewer.stage().transform.k")
    for kind, spread in (("touchStart", 20), ("touchMove", 40), ("touchMove", 80)):
        points = [{"x": 195 - spread, "y": 260, "id": 0}, {"x": 195 + spread, "y": 260, "id": 1}]
        page.send("Input.dispatchTouchEvent", type=kind, touchPoints=points)
    page.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    page.settle()
    assert page.evaluate("viewer.stage().transform.k") > 1.5 * before


def test_no_accessibility_faults(open_page, make_circuit):
    axe = FOLDER / "node_modules" / "axe-core" / "axe.min.js"
    if not axe.is_file():
        pytest.skip("axe-core is not installed: npm ci in graphs/explorer")
    graph = with_classes(make_circuit(n_nodes=40, n_edges=100))
    for dark in (False, True):
        page = open_page(graph, f"#pin={strongest(graph).id}", dark=dark)
        page.evaluate(axe.read_text(encoding="utf-8") + ";0")
        for step in ("0", "viewer.state.view.value = 'table'", "viewer.state.query.value = 'girls'"):
            page.evaluate(f"void ({step})")
            page.settle()
            found = page.evaluate("axe.run().then((r) => r.violations.map((v) => [v.id, v.nodes[0].html]))")
            assert found == [], (dark, step)


def test_a_notebooks_widget_is_in_step_with_its_page(browser, tmp_path, make_circuit):
    """The ES module with a stand-in for a notebook's model: pins, labels and groups go both ways."""
    graph = make_circuit()
    first, second = (node.id for node in graph.nodes()[:2])
    traits = {"page": explorer_html(graph), "height": 600, "selected": [first], "labels": {}, "groups": []}
    module = (FOLDER / "widget.js").read_text()
    page = browser.open()
    (tmp_path / "notebook.html").write_text("<!DOCTYPE html><body>")
    page.send("Page.navigate", url=(tmp_path / "notebook.html").as_uri())
    page.wait("document.readyState === 'complete'")
    page.evaluate(NOTEBOOK % (json.dumps(traits), json.dumps(module)))
    page.wait("document.body.dataset.ready === 'true'")
    page.evaluate(f"inner = document.querySelector('iframe').contentWindow.viewer; inner.state.togglePin({second!r})")
    assert page.evaluate("[traits.selected, saved]") == [[second, first], 1]
    page.evaluate(
        f"change('labels', {{'{first}': '<b>x'}}); change('groups', [{{name: 'g', nodes: ['{first}', '?']}}])"
    )
    labels, groups = page.evaluate("[inner.state.labels.value, traits.groups]")
    assert labels == {first: "<b>x"} and groups == [{"name": "g", "nodes": [first], "collapsed": True}]
    assert page.problems() == []
    page.close()


def test_the_report_shows_hostile_text_as_text_and_has_no_accessibility_faults(browser, tmp_path):
    """A script in every text, letters that run to the left, a feature that never fires, and a file's name with HTML."""
    graph = hostile_graph()
    silent = {"density": 0.0, "max_activation": 0.0, "contexts": [], "top_tokens": [], "by_case": {"b": {"0": 0.0}}}
    graph.add_node(feature_node("resid_0", 3, effect=0.1, position=1, **silent))
    run = tmp_path / "<img src=x onerror=hacked=1>"
    graph.save(run / "circuit" / "circuit.json")
    path = write_report(run)
    axe = FOLDER / "node_modules" / "axe-core" / "axe.min.js"
    for dark, width in ((False, 1400), (True, 390)):
        page = browser.open(width=width, dark=dark)
        page.send("Page.navigate", url=path.as_uri())
        page.wait("document.readyState === 'complete'")
        page.settle()
        assert page.evaluate("window.hacked") is None and page.count("img, script") == 0
        assert "<img src=x" in page.text("#features") and "ملك" in page.text("#features")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        if axe.is_file():
            page.evaluate(axe.read_text(encoding="utf-8") + ";0")
            assert page.evaluate("axe.run().then((r) => r.violations.map((v) => [v.id, v.nodes[0].html]))") == []
        assert page.problems() == []
        page.close()
