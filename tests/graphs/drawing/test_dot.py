from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphs.drawing import style
from graphs.drawing.dot import draw, to_dot
from graphs.errors import GraphError
from graphs.feature_graph import FeatureGraph, error_node, feature_node, metric_node

SVG = "{http://www.w3.org/2000/svg}"
CIRCUITS = [
    {"n_nodes": 30, "n_edges": 80},
    {"n_nodes": 30, "n_edges": 80, "positions": True},
    {"n_nodes": 80, "n_edges": 240, "n_layers": 6},
]


def parse(path):
    return ElementTree.fromstring(path.read_bytes())


def groups(svg, kind):
    return {g.get("id"): g for g in svg.iter(f"{SVG}g") if g.get("class") == kind}


@pytest.mark.parametrize("options", CIRCUITS)
def test_svg_holds_every_node_and_edge_with_its_description(make_circuit, tmp_path, options):
    graph = make_circuit(**options)
    svg = parse(draw(graph, tmp_path / "circuit.svg"))
    nodes, edges = groups(svg, "node"), groups(svg, "edge")
    for node in graph.nodes():
        element = nodes[f"drawn-{node.id}"]
        assert element.find(f"{SVG}title").text == style.tooltip(graph, node)
        link = next(iter(element.iter(f"{SVG}a")))
        assert link.get("{http://www.w3.org/1999/xlink}href") == f"#node-{node.id}"
    for edge in graph.edges():
        assert style.number(edge.weight) in edges[f"drawn-{edge.source}--{edge.target}"].find(f"{SVG}title").text
    assert len(edges) == len(graph.edges())


def test_text_stands_in_the_middle_of_its_box_whatever_the_viewers_font(make_circuit, tmp_path):
    svg = parse(draw(make_circuit(), tmp_path / "circuit.svg"))
    for group in groups(svg, "node").values():
        boxes = [e for e in group.iter() if e.tag in (f"{SVG}path", f"{SVG}polygon")]
        if boxes and group.get("id").startswith("drawn-"):
            outline = boxes[0].get("d") or boxes[0].get("points")
            places = [float(x) for x in re.findall(r"(-?[\d.]+),-?[\d.]+", outline)]
            for text in group.iter(f"{SVG}text"):
                assert text.get("text-anchor") == "middle"
                assert float(text.get("x")) == pytest.approx((min(places) + max(places)) / 2, abs=0.2)


def test_colours_and_shapes_say_what_a_node_is(tmp_path):
    graph = FeatureGraph(["resid_0"])
    graph.add_node(feature_node("resid_0", 1, effect=2.0))
    graph.add_node(feature_node("resid_0", 2, effect=-2.0))
    graph.add_node(error_node("resid_0", effect=0.0))
    graph.add_node(metric_node())
    graph.add_edge("resid_0/1", "metric", 1.0)
    graph.add_edge("resid_0/2", "metric", -1.0)
    svg = parse(draw(graph, tmp_path / "g.svg"))
    nodes, edges = groups(svg, "node"), groups(svg, "edge")

    def fill(id):
        return next(e.get("fill") for e in nodes[id].iter() if e.tag in (f"{SVG}path", f"{SVG}polygon"))

    assert fill("drawn-resid_0/1") == style.DIVERGING[-1] and fill("drawn-resid_0/2") == style.DIVERGING[0]
    triangle = nodes["drawn-resid_0/error"].find(f".//{SVG}polygon").get("points").split()
    assert len(set(triangle)) == 3 and fill("drawn-resid_0/error") == style.DIVERGING[3]
    strokes = [edges[f"drawn-resid_0/{i}--metric"].find(f".//{SVG}path").get("stroke") for i in (1, 2)]
    assert strokes == [style.POSITIVE_EDGE, style.NEGATIVE_EDGE]


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_every_format_is_written(make_circuit, tmp_path, suffix, start):
    path = draw(make_circuit(), tmp_path / f"circuit{suffix}")
    assert path.read_bytes().startswith(start) and len(list(tmp_path.iterdir())) == 1


def test_dot_is_written_as_text_with_positions(make_circuit, tmp_path):
    text = draw(make_circuit(positions=True), tmp_path / "circuit.dot").read_text()
    assert "layout=nop2" in text and text.count("subgraph") > 3 and "girls" in text


def test_unknown_extension_is_refused_before_anything_is_written(make_circuit, tmp_path):
    with pytest.raises(GraphError, match=r"'circuit\.gif'.*\.dot, \.svg, \.png, \.pdf"):
        draw(make_circuit(), tmp_path / "circuit.gif")
    with pytest.raises(GraphError, match="no nodes"):
        to_dot(FeatureGraph(["a"]))
    assert not list(tmp_path.iterdir())


def test_labels_come_from_annotations_then_top_tokens(make_circuit, tmp_path):
    graph = FeatureGraph(["embed"])
    graph.add_node(feature_node("embed", 0, effect=1.0, top_tokens=[" girls", " boys"]))
    graph.add_node(replace(feature_node("embed", 1, effect=1.0, top_tokens=[" x"]), label="plural nouns"))
    svg = draw(graph, tmp_path / "g.svg").read_text()
    assert "girls · boys" in svg and "plural nouns" in svg and ">x<" not in svg
    assert "embed/0" in svg and "+1.00" in svg


@given(st.text(max_size=30), st.text(max_size=12), st.text(max_size=12))
def test_any_text_gives_a_picture(label, token, position):
    graph = FeatureGraph(["embed"], metadata={"title": label, "metric": token, "positions": [position]})
    node = feature_node("embed", 0, effect=1.0, position=position, top_tokens=[token, "\\N", "</svg>", "\n"])
    graph.add_node(replace(node, label=label or None))
    graph.add_node(metric_node(effect=1.0))
    graph.add_edge(node.id, "metric", 1.0)
    assert "digraph" in to_dot(graph)


@pytest.mark.parametrize(
    "text", ["a\nb\\n\\N", '</g><script>alert("1")</script>', "ξ漢字🙂", "&amp; <b>", "\x00\x07\ud800\uffff"]
)
def test_awkward_text_survives_as_itself(tmp_path, text):
    graph = FeatureGraph(["embed"], metadata={"title": text})
    graph.add_node(replace(feature_node("embed", 0, effect=1.0, position=text), label=text))
    graph.add_node(metric_node(effect=1.0))
    graph.add_edge(f"embed/0@{text}", "metric", 1.0)
    svg = parse(draw(graph, tmp_path / "g.svg"))
    words = {"".join(element.itertext()).replace("\u200b", "") for element in svg.iter(f"{SVG}text")}
    assert style.visible(text) in words
    assert not [element for element in svg.iter() if element.tag.endswith("script")]
    assert len(groups(svg, "node")) >= 1


def test_large_graphs_drop_the_labels_of_weak_nodes_but_not_their_ids(make_circuit, tmp_path):
    graph = make_circuit(n_nodes=160, n_edges=80, n_layers=6, labels=1.0)
    source = to_dot(graph)
    features = sorted((n for n in graph.nodes() if n.kind == "feature"), key=lambda n: -abs(n.effect))
    words = {n.id: re.search(rf'"?{re.escape(n.id)}"? \[label=<(.*?)>\s*\w+=', source) for n in features}
    assert words[features[0].id].group(1).count("<BR/>") == 1
    assert words[features[-1].id].group(1).count("<BR/>") == 0 and features[-1].name in words[features[-1].id].group(1)


def test_edge_width_grows_with_weight(tmp_path):
    graph = FeatureGraph(["a", "b"])
    for site in "ab":
        for feature in range(2):
            graph.add_node(feature_node(site, feature, effect=1.0))
    graph.add_edge("a/0", "b/0", 4.0)
    graph.add_edge("a/1", "b/1", -0.5)
    edges = groups(parse(draw(graph, tmp_path / "g.svg")), "edge")
    paths = [edges[id].find(f".//{SVG}path") for id in ("drawn-a/0--b/0", "drawn-a/1--b/1")]
    assert float(paths[0].get("stroke-width", 1)) > float(paths[1].get("stroke-width", 1))
    assert float(paths[0].get("stroke-opacity", 1)) > float(paths[1].get("stroke-opacity", 1))


def test_text_is_cut_to_fit():
    assert style.fit("short", 10, 100) == "short"
    cut = style.fit("a very long label that cannot fit", 10, 60)
    assert cut.endswith("…") and style.text_width(cut, 10) <= 60
    assert style.text_width("a very long label that cannot fit"[: len(cut)] + "…", 10) > 60  # no shorter than it must
    assert style.fit("word " * 10**5, 10, 60) == "word wor…"  # in no time
    assert style.fit("long", 10, 1) == "…"
    lines = style.wrap("subject plural verb expected here now", 10, 80, lines=2)
    assert len(lines) == 2 and all(style.text_width(line, 10) <= 80 for line in lines)


def test_text_on_colours_is_readable():
    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for step in range(-20, 21):
        fill = style.diverging_colour(step / 20, 1.0)
        light, dark = sorted((luminance(fill), luminance(style.ink_on(fill))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.0, fill
