"""Files for the viewers of circuit-tracer and Neuronpedia, held against the rules of their pages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from graphs.errors import GraphError
from graphs.feature_graph import FeatureGraph, error_node, feature_node, metric_node
from graphs.formats.circuit_tracer import page_address, write_circuit_tracer
from graphs.formats.neuronpedia import from_neuronpedia, model_id, read_neuronpedia, to_neuronpedia
from tests.graphs.formats.test_formats import awkward, foreign, same
from tests.graphs.formats.viewer_rules import check_folder, check_graph


def of_sites(*sites: str, position: int | str | None = None, tokens: tuple[str, ...] = ()) -> FeatureGraph:
    """A graph with a feature and an error at each of the sites."""
    graph = FeatureGraph(sites, metadata={"tokens": list(tokens), "model": "owner/Model B", "metric": 'a "b" (p=c)'})
    for number, site in enumerate(sites):
        graph.add_node(feature_node(site, 3, effect=1.5 - number, position=position))
        graph.add_node(error_node(site, effect=-0.25, position=position))
    graph.add_node(metric_node(effect=2.0))
    graph.add_edge(f"{sites[0]}/3" + ("" if position is None else f"@{position}"), "metric", 1.0)
    return graph


GRAPHS = {
    "summed": {"n_nodes": 20, "n_edges": 45},
    "position": {"n_nodes": 20, "n_edges": 45, "positions": True},
    "spans": awkward,
    "embed and attn_0": lambda: of_sites("embed", "attn_0"),
    "attn_0 at the first of one token": lambda: of_sites("attn_0", position=0, tokens=("The",)),
    "embed": lambda: of_sites("embed"),
    "one span": lambda: of_sites("mlp_3", "resid_41", position="subject"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_files_follow_the_rules_of_both_viewers(make_circuit, tmp_path, name):
    made = GRAPHS[name]
    graph = made() if callable(made) else make_circuit(**made)
    ids = [node.id for node in graph.nodes() if node.kind != "metric"]
    graph.metadata |= {
        "supernodes": [{"name": "plural, subject", "nodes": ids[:2], "collapsed": False}],
        "pinned": ids[-1:],
    }
    check_graph(to_neuronpedia(graph))
    path = write_circuit_tracer(graph, tmp_path, slug="mine")
    write_circuit_tracer(graph, tmp_path)
    check_folder(tmp_path)
    assert [path.name for path in tmp_path.glob("*.json")].count("mine.json") == 1
    assert same(read_neuronpedia(path), graph)
    assert "slug=mine&pinnedIds=" in page_address(path) and "plural%2C+subject" in page_address(path)


def test_the_viewers_text_does_not_replace_names():
    """Neuronpedia overwrites the clerp of the errors it knows and of tokens."""
    data = to_neuronpedia(of_sites("embed", "attn_1", "mlp_1", "resid_1"))
    types = {node["clerp"].split(" ")[0]: node["feature_type"] for node in data["nodes"]}
    assert types["embed/3"] == types["resid_1/3"] == types["mlp_1/3"] == "cross layer transcoder"
    assert types["attn_1/3"] == "lorsa" and types["attn_1/error"] == "lorsa error"
    assert types["mlp_1/error"] == "mlp reconstruction error"
    assert types["embed/error"] == types["resid_1/error"] == "residual error"


def test_names_of_models_and_graphs():
    ids = {"gpt2": "gpt2-small", "EleutherAI/pythia-70m-deduped": "pythia-70m-deduped", "/runs/Ü b/": "b", "": "model"}
    assert {model: model_id(model) for model in ids} == ids
    assert to_neuronpedia(FeatureGraph(["embed"], metadata={"title": "«…»"}))["metadata"]["slug"] == "circuit"
    for slug, wrong in (("a/b", r"slug 'a/b' holds '/'"), ("..", r"slug '\.\.' is no name of a file")):
        with pytest.raises(GraphError, match=wrong):
            to_neuronpedia(of_sites("mlp_1"), slug=slug)
    url = "https://example.org/features"  # read by Neuronpedia only without a schema version
    head = to_neuronpedia(of_sites("mlp_1"), features_url=url)["metadata"]
    assert head["feature_details"] == {"feature_json_base_url": url} and "schema_version" not in head


def test_contexts_are_there_for_the_page(tmp_path):
    context = {"tokens": ["a", "\n", " c"], "activations": [0.0, 2.0, 0.5], "peak": 1}
    graph = FeatureGraph(["resid_0"], metadata={"cases": {"x": 3, "y": 1}})
    attributes = {
        "contexts": [context], "random": [context], "top_logits": [[" is", 2.0]], "bottom_logits": ["was"],
        "samples": [{"low": 0.0, "high": 2.0, "share": 0.1, "contexts": [context]}], "max_activation": 4.0,
        "quantiles": [(0.5, 2.0), (0.9, 3.0)], "histogram": {"edges": [0, 2, 4], "counts": [3, 1]}, "density": 0.25,
        "by_case": {"x": {"subject": 1.0}, "y": {"subject": 5.0}},
    }  # fmt: skip
    graph.add_node(feature_node("resid_0", 7, effect=1.0, position="subject", **attributes))
    path = write_circuit_tracer(graph, tmp_path, slug="g")
    check_folder(tmp_path)
    (page,) = [json.loads(file.read_text()) for file in (tmp_path / "features" / "g").iterdir()]
    names = [quantile["quantile_name"] for quantile in page["examples_quantiles"]]
    assert names == ["Strongest contexts", "Activation 0 to 2", "Random tokens"]
    assert page["examples_quantiles"][0]["examples"][0]["tokens"] == ["a", "⏎", " c"]
    assert [page["quantile_values"][i] for i in (0, 49, 99)] == pytest.approx([0.04, 2.0, 4.0])
    assert page["histogram"] == [3, 1]
    assert (page["top_logits"], page["act_max"], page["activation_frequency"]) == ([" is"], 4.0, 0.25)
    (feature,) = [node for node in json.loads(path.read_text())["nodes"] if node["feature_type"].startswith("cross")]
    assert feature["activation"] == pytest.approx(2.0)  # the mean over all four prompts


def test_a_folder_of_another_program_is_kept(tmp_path):
    listed = tmp_path / "graph-metadata.json"
    listed.write_text('{"graphs": [{"slug": "theirs"}]}')
    with pytest.raises(GraphError, match="another program"):
        write_circuit_tracer(of_sites("mlp_1"), tmp_path, slug="g")
    assert [path.name for path in tmp_path.iterdir()] == [listed.name]
    write_circuit_tracer(of_sites("mlp_1"), tmp_path, slug="g", overwrite=True)
    assert [graph["slug"] for graph in json.loads(listed.read_text())["graphs"]] == ["g", "theirs"]
    with pytest.raises(GraphError, match="was not written by this program"):
        write_circuit_tracer(of_sites("mlp_1"), _with(tmp_path / "new", "g.json"), slug="g")
    with pytest.raises(GraphError, match="is a file"):
        write_circuit_tracer(of_sites("mlp_1"), listed)
    with pytest.raises(GraphError, match="page's own file"):
        write_circuit_tracer(of_sites("mlp_1"), tmp_path, slug="graph-metadata")


def _with(folder: Path, name: str) -> Path:
    folder.mkdir()
    (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("as_text", [True, False])
def test_what_was_saved_in_a_viewer_comes_back(as_text):
    """circuit-tracer's page saves the parameters of its address, which are text; Neuronpedia saves lists."""
    graph = of_sites("embed", "attn_0", "resid_0")
    graph.metadata["supernodes"] = [{"name": "old", "nodes": ["embed/3"], "collapsed": False}]
    data = to_neuronpedia(graph)
    ids = {node["sparse_feature_circuit"]["id"]: node for node in data["nodes"] if "sparse_feature_circuit" in node}
    first, second, third = (ids[name] for name in ("embed/3", "attn_0/3", "resid_0/3"))
    groups = [["old", first["node_id"], second["node_id"]], ["new", ids["resid_0/error"]["node_id"], "9_9_9"]]
    key = f"{second['layer']}_{second['feature']}_{second['ctx_idx']}"
    pinned = [first["node_id"], third["node_id"]]
    if as_text:
        clerps = json.dumps([[str(second["feature"]), "plural"]])
        data["qParams"] = {"supernodes": json.dumps(groups), "pinnedIds": ",".join(pinned), "clerps": clerps}
    else:
        data["qParams"] = {"supernodes": groups, "pinnedIds": pinned, "clerps": [[key, "plural"]]}
    back = from_neuronpedia(json.loads(json.dumps(data)))
    assert back.supernodes == {"old": ["embed/3", "attn_0/3"], "new": ["resid_0/error"]}
    assert back.metadata["supernodes"][0]["collapsed"] is False
    assert back.metadata["pinned"] == ["resid_0/3"]
    assert {node.id: node.label for node in back.nodes() if node.label} == {"attn_0/3": "plural"}


def test_graphs_of_both_engines_of_neuronpedia_are_read():
    graph = from_neuronpedia(foreign())
    assert graph.node("mlp_3/error@1").effect == 0.1 and graph.node("mlp_0/4@1").effect == pytest.approx(0.4)
    graph = from_neuronpedia(llamascopium(), source="crm.json")
    assert graph.sites == ["embed", "bias_attn_bO_3", "attn_3", "mlp_3", "logit"]
    ids = {node.id for node in graph.nodes()}
    assert ids >= {"attn_3/5@1", "attn_3/error@1", "mlp_3/7@1", "bias_attn_bO_3/0@1", "logit/9@1", "embed/12@1"}
    assert graph.node("attn_3/5@1").effect == pytest.approx(0.5) and graph.node("mlp_3/7@1").effect == pytest.approx(
        0.25
    )
    assert {edge[:2]: edge.weight for edge in graph.edges()}["attn_3/5@1", "mlp_3/7@1"] == 2.0
    assert graph.supernodes == {"pair": ["attn_3/5@1", "mlp_3/7@1"]}
    data = llamascopium()
    data["nodes"][1]["layer"] = "third"
    with pytest.raises(GraphError, match=r"crm\.json.*'third'"):
        from_neuronpedia(data, source="crm.json")


def llamascopium() -> dict:
    """A graph as Neuronpedia's second engine writes it: integers as layers, no number for errors and biases."""

    def node(id, kind, **more):
        layer = "E" if id.startswith("E") else int(id.split("_")[0])
        return {"node_id": id, "jsNodeId": id, "layer": layer, "feature_type": kind, "ctx_idx": 1, "clerp": "c", **more}

    nodes = [
        node("E_12_1", "embedding", feature=None, influence=1.0),
        node("3_lor_5_1", "lorsa", feature=41, influence=0.5, activation=1.0),
        node("3_cro_7_1", "cross layer transcoder", feature=62, influence=0.75, activation=2.0),
        node("3_error_attn_1", "lorsa error", feature=None, influence=0.9),
        node("3_bias_attn_bO_1", "bias", feature=None, influence=0.95),
        node("4_9_1", "logit", feature=9, token_prob=0.5),
    ]
    links = [
        ("E_12_1", "3_lor_5_1"),
        ("3_bias_attn_bO_1", "3_lor_5_1"),
        ("3_lor_5_1", "3_cro_7_1"),
        ("3_cro_7_1", "4_9_1"),
    ]
    head = {"slug": "s", "scan": "qwen3-1.7b", "prompt": "a b", "prompt_tokens": ["a", " b"], "schema_version": 1}
    return {
        "metadata": head,
        "qParams": {"supernodes": [["pair", "3_lor_5_1", "3_cro_7_1"]]},
        "nodes": nodes,
        "links": [{"source": source, "target": target, "weight": 2.0} for source, target in links],
    }


def test_a_label_replaces_what_a_node_says_of_itself():
    graph = of_sites("mlp_1").map_nodes(lambda node: replace(node, label='say "is"') if node.kind == "metric" else node)
    (logit,) = [node for node in to_neuronpedia(graph)["nodes"] if node["feature_type"] == "logit"]
    assert logit["clerp"] == "Output \"say 'is'\" (p=1.000)"
