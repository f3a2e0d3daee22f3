"""The rules of the viewers of attribution graphs, as their pages apply them to a file.

Sources: Neuronpedia's `graph/utils.ts`, `graph-schema.json` and `save-to-db`; circuit-tracer's `index.html`,
`util-cg.js`, `init-cg-link-graph.js`, `init-cg-feature-detail.js` and `init-feature-examples.js`.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from graphs._files import check_type

KNOWN_ERRORS = ("mlp reconstruction error", "lorsa error")


class _Head(TypedDict):
    slug: str
    scan: str
    prompt_tokens: list[str]
    prompt: str


class _State(TypedDict, total=False):
    pinnedIds: list[str]
    supernodes: list[Any]
    linkType: str
    clickedId: str
    sg_pos: str


class _Node(TypedDict):
    node_id: str
    feature: int | None
    layer: str | int
    ctx_idx: int
    feature_type: str
    jsNodeId: str
    clerp: str


class _Link(TypedDict):
    source: str
    target: str
    weight: float


class _Graph(TypedDict):
    metadata: _Head
    qParams: _State
    nodes: list[_Node]
    links: list[_Link]


class _Example(TypedDict):
    tokens: list[str]
    tokens_acts_list: list[float]


class _Quantile(TypedDict):
    quantile_name: str
    examples: list[_Example]


class _Feature(TypedDict):
    index: int
    examples_quantiles: list[_Quantile]


def check_graph(data: Any) -> None:
    """What both viewers and the upload ask of a graph's file."""
    check_type(data, _Graph, "graph-schema.json")
    head, nodes, tokens = data["metadata"], data["nodes"], data["metadata"]["prompt_tokens"]
    for name in ("scan", "slug"):
        assert head[name] and not re.search(r"[^a-zA-Z0-9_.-]", head[name]), head[name]
    ids = {node["node_id"] for node in nodes}
    assert len(ids) == len(nodes)
    assert all({link["source"], link["target"]} <= ids for link in data["links"])
    layers = [float(node["layer"]) for node in nodes if node["layer"] != "E" and node["feature_type"] != "logit"]
    assert max(layers, default=1) > 0  # "No layer found"
    for node in nodes:
        if node["feature_type"] == "logit":
            assert float(node["clerp"].split("(p=")[1].split(")")[0]) >= 0
            assert node["clerp"].split('"')[1]
            assert not layers or float(node["layer"]) > max(layers)
        if node["feature_type"] in ("cross layer transcoder", "lorsa"):
            x, y = unpaired(node["feature"])
            assert (str(x), str(y)) == tuple(node["node_id"].split("_")[:2]) and str(node["layer"]) == str(x)
    feature_ids = [f"{n['layer']}_{n['feature']}_{n['ctx_idx']}" for n in nodes if "error" not in n["feature_type"]]
    assert len(set(feature_ids)) == len(feature_ids) and len(tokens) * 2 / 3 >= 1  # else they are deleted
    assert {node["ctx_idx"] for node in nodes} <= set(range(len(tokens)))
    assert max(node["ctx_idx"] for node in nodes) >= 1  # else every x is NaN
    named = {node["ctx_idx"] for node in nodes if node["feature_type"] == "embedding"}
    assert {node["ctx_idx"] for node in nodes} <= named  # else the axis says no token
    _check_influence(data)
    state = data["qParams"]
    groups = [set(members) for _, *members in state["supernodes"]]
    assert set().union(*groups) <= set(state["pinnedIds"]) <= ids  # only pinned nodes are drawn as supernodes
    assert not any("," in id for id in ids)  # the page keeps ids in its address, between commas


def _check_influence(data: Any) -> None:
    """Cumulative: within [0, 1], 1 for the weakest, rising as the effects fall."""
    own = [
        (abs(node["sparse_feature_circuit"]["effect"]), node["influence"])
        for node in data["nodes"]
        if node["feature_type"] not in ("embedding", "logit")
    ]
    ranked = sorted(own, key=lambda entry: -entry[0])
    assert all(0 <= influence <= data["metadata"]["node_threshold"] for _, influence in own)
    assert all(a[1] <= b[1] or a[0] == b[0] for a, b in pairwise(ranked))
    if ranked and ranked[0][0]:
        assert ranked[-1][1] > 1 - 1e-9 and abs(ranked[0][1] - ranked[0][0] / sum(e for e, _ in own)) < 1e-9


def unpaired(z: int) -> tuple[int, int]:
    """The numbers that the page reads back out of a Cantor pairing, in double precision as JavaScript has it."""
    w = int(((8.0 * z + 1) ** 0.5 - 1) // 2)
    y = z - (w * w + w) // 2
    return w - y, y


def check_folder(folder: Path) -> None:
    """What circuit-tracer's local server and page ask of the folder they serve."""
    offered = json.loads((folder / "graph-metadata.json").read_text())["graphs"]
    assert offered and len({graph["slug"] for graph in offered}) == len(offered)
    for entry in offered:
        data = json.loads((folder / f"{entry['slug']}.json").read_text())
        check_graph(data)
        assert entry["prompt"] and entry["node_threshold"] == data["metadata"]["node_threshold"]
        head = data["metadata"]
        assert head["scan"].startswith("custom-")
        for node in data["nodes"]:
            assert node["feature_type"] in ("cross layer transcoder", "embedding", "logit", KNOWN_ERRORS[0])
            assert node["feature_type"] != KNOWN_ERRORS[0] or node["clerp"]
            if node["feature_type"] == "cross layer transcoder":
                where = head["transcoder_list"][int(node["layer"])]
                assert where.startswith("./") and not where.startswith("./features/")  # which is fetched elsewhere
                page = json.loads((folder / where.removeprefix("./data/") / f"{node['feature']}.json").read_text())
                _check_feature(page, node)


def _check_feature(page: Any, node: Any) -> None:
    check_type(page, _Feature, "feature-details-schema.json")
    assert page["index"] == unpaired(node["feature"])[1]
    assert page["act_min"] == 0 < page["act_max"]
    for quantile in page["examples_quantiles"]:
        for example in quantile["examples"]:
            assert len(example["tokens"]) == len(example["tokens_acts_list"]) > example["train_token_ind"]
    assert len(page.get("quantile_values", range(100))) == 100
