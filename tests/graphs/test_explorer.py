"""The explorer as a file: what its data hold, and that nothing in them can leave their place."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import graphs.explorer
from graphs.errors import GraphError
from graphs.explorer import explore, explorer_html, unpacked
from graphs.feature_graph import FeatureGraph, feature_node, metric_node

FOLDER = Path(graphs.explorer.__file__).parent
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
        "top_tokens": [HOSTILE, "\n", "ملك"],
        "top_logits": [[HOSTILE, 1.0]],
        "contexts": [{"tokens": [HOSTILE, " b"], "activations": [1.0, 0.0]}],
        "by_case": {HOSTILE: {"0": 2.0}, "b": {"0": 0.0}},
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
    assert len(scripts) == 3 and re.fullmatch(r"[A-Za-z0-9+/=]+", scripts[0])
    data = unpacked(text)
    assert data["nodes"][0]["label"] == HOSTILE and data["title"] == HOSTILE
    assert "hacked" not in "".join(scripts[1:]) and text.count("<img") == 0
    with pytest.raises(GraphError, match="holds no circuit"):
        unpacked("<html></html>")


def test_the_file_stands_alone(make_circuit, tmp_path):
    path = explore(make_circuit(), tmp_path / "circuit.html")
    text = path.read_text(encoding="utf-8")
    assert parsed(text).loads == []
    assert "default-src 'none'" in text  # the browser refuses whatever a page would load
    assert not re.search(r"@import|url\((?!#)|(?<![\w.}])fetch\(|XMLHttpRequest|\bimport\(", text)
    assert all(url.startswith("http://www.w3.org/") for url in re.findall(r"https?://[^\"'`\s<]+", text))
    assert "{{" not in re.sub(r"(?s)<script.*?</script>", "", text)
    assert sum((FOLDER / name).stat().st_size for name in ("viewer.js", "charts.js")) <= 450_000


@pytest.mark.slow
def test_every_node_and_edge_is_in_the_data(make_circuit):
    graph = make_circuit(n_nodes=60, n_edges=200, positions=True)
    data = unpacked(explorer_html(graph))
    assert [node["id"] for node in data["nodes"]] == [node.id for node in graph.nodes()]
    for edge, (source, target, weight, interval, *by_case) in zip(graph.edges(), data["edges"], strict=True):
        assert (data["nodes"][source]["id"], data["nodes"][target]["id"], weight) == edge[:3]
        assert (interval or []) == pytest.approx(edge.interval or [], rel=1e-4)
        weights = dict(zip(data["edge_cases"], by_case[0], strict=True)) if by_case else {}
        assert weights == pytest.approx(edge.by_case or {}, rel=1e-3)
    assert [position for position, *_ in data["positions"]] == graph.positions
    for node, written in zip(graph.nodes(), data["nodes"], strict=True):
        assert written["effect"] == node.effect
        for context, shown in zip(
            node.attributes.get("contexts", ()), written["attributes"].get("contexts", ()), strict=True
        ):
            assert shown["tokens"] == context["tokens"]
            assert shown["activations"] == pytest.approx(context["activations"], rel=5e-3)


@pytest.mark.slow
def test_layouts_hold_the_strongest_nodes_without_overlap(make_circuit):
    graph = make_circuit(n_nodes=100, n_edges=300, positions=True)
    data = unpacked(explorer_html(graph))
    nodes = data["nodes"]
    ranked = sorted((i for i, n in enumerate(nodes) if n["kind"] != "metric"), key=lambda i: -abs(nodes[i]["effect"]))
    assert data["layouts"][-1]["size"] == 100
    for layout in data["layouts"]:
        width, height, metric_width, metric_height = layout["box"]
        assert {i for i, *_ in layout["nodes"] if nodes[i]["kind"] != "metric"} == set(ranked[: layout["size"]])
        boxes = [
            (x, y, metric_width, metric_height) if nodes[i]["kind"] == "metric" else (x, y, width, height)
            for i, x, y in layout["nodes"]
        ]
        for place, (x, y, w, h) in enumerate(boxes):
            assert all(abs(x - a) >= (w + c) / 2 or abs(y - b) >= (h + d) / 2 for a, b, c, d in boxes[place + 1 :])
        assert all(len(route) % 6 == 2 for route in layout["routes"].values())


def test_two_graphs_are_compared(make_circuit):
    graph = make_circuit(n_nodes=40, n_edges=100)
    fewer = graph.subgraph([node.id for node in graph.nodes()][:30])
    other = graph.subgraph([node.id for node in graph.nodes()][10:])
    data = unpacked(explorer_html(fewer, compare_with=other))
    only_first = [
        node["id"] for node, effect in zip(data["nodes"], data["comparison"]["effects"], strict=True) if effect is None
    ]
    only_second = [data["nodes"][i]["id"] for i in data["comparison"]["only_nodes"]]
    assert only_first == [node.id for node in graph.nodes()][:10]
    assert set(only_second) == {node.id for node in graph.nodes()[30:]}
    assert len(data["edges"]) == len({edge[:2] for edge in [*fewer.edges(), *other.edges()]})


def test_mistakes_are_refused(make_circuit, tmp_path):
    with pytest.raises(GraphError, match=r"'circuit\.pdf'.*\.html"):
        explore(make_circuit(), tmp_path / "circuit.pdf")
    with pytest.raises(GraphError, match="no nodes"):
        explorer_html(FeatureGraph(["a"]))


@pytest.mark.slow
def test_the_bundle_is_what_the_sources_build(tmp_path):
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    for name in ("package.json", "package-lock.json", "build.mjs", "tsconfig.json"):
        shutil.copy(FOLDER / name, tmp_path)
    shutil.copytree(FOLDER / "src", tmp_path / "src")
    if (FOLDER / "node_modules").is_dir():
        (tmp_path / "node_modules").symlink_to(FOLDER / "node_modules")
    else:
        command = ["npm", "ci", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
        try:
            installed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            pytest.skip("the packages of the explorer could not be installed within two minutes")
        if installed.returncode:
            pytest.skip(f"the packages of the explorer cannot be installed: {installed.stderr.strip()[-200:]}")
    subprocess.run(["node", "--preserve-symlinks", "build.mjs"], cwd=tmp_path, check=True, timeout=60)
    for name in ("viewer.js", "charts.js", "live.js", "viewer.licences.txt"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (FOLDER / name).read_text(encoding="utf-8")
