"""The report shows what the run folder holds, says what it lacks, and needs nothing but itself."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from circuits.editing.records import Behaviour, Continuation, Score
from circuits.editing.results import EditReport
from circuits.report import write_report
from circuits.report.files import read_run
from graphs.drawing.dot import draw
from graphs.errors import GraphError
from graphs.explorer import explorer_html, unpacked
from graphs.feature_graph import FeatureGraph, error_node, feature_node, metric_node
from sae._files import write_json
from sae.errors import UserError

CONTEXT = {"tokens": ["Lily", " was", " <b>sad"], "activations": [0.2, 0.0, 1.5], "peak": 2}


def example_graph() -> FeatureGraph:
    sites = ["embed", "mlp_0", "resid_0"]
    completeness = {
        "mean_residual": 0.0019,
        "worst_residual": 0.014,
        "worst_site": "embed",
        "sites": {site: {"sum_of_effects": 3.7, "measured": 3.71, "residual": 0.002} for site in sites},
    }
    metadata = {
        "title": "Gender <of> pronouns",
        "model": "models/tiny",
        "options": {"method": "ig", "metric": "logit_difference"},
        "n_examples": 100,
        "m_clean": -1.87,
        "m_patch": 1.87,
        "accuracy": 1.0,
        "completeness": completeness,
    }
    graph = FeatureGraph(sites, metadata=metadata)
    graph.add_node(feature_node("embed", 3, effect=0.4, top_tokens=[" she", "<script>"], contexts=[CONTEXT] * 5))
    graph.add_node(feature_node("mlp_0", 120, effect=-1.2, density=0.01, top_logits=[[" he", 0.4]]))
    graph.add_node(error_node("resid_0", effect=0.1))
    graph.add_node(metric_node(effect=3.74))
    graph.add_edge("embed/3", "mlp_0/120", 0.3)
    graph.add_edge("mlp_0/120", "metric", -1.2)
    return graph


def example_edit() -> EditReport:
    def run(metric: float, accuracy: float, ce: float) -> Behaviour:
        cases = {"female": Score(5, metric + 0.5, accuracy), "male": Score(5, metric - 0.5, accuracy)}
        return Behaviour(Score(10, metric, accuracy), cases, ce)

    return EditReport(
        features=["embed/3", "mlp_0/120"],
        operation="zero",
        value=None,
        metric="logit difference",
        n_prompts=10,
        n_texts=7,
        before=run(2.0, 1.0, 1.449),
        after=run(0.1, 0.5, 1.484),
        random=[run(1.95, 1.0, 1.45), run(2.01, 1.0, 1.46)],
        random_features=[["embed/1", "mlp_0/2"], ["embed/9", "mlp_0/4"]],
        continuations=[Continuation("Tommy was happy because", " he loved his toys", " she loved her toys")],
    )


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "pronouns"
    (folder / "circuit").mkdir(parents=True)
    example_graph().save(folder / "circuit" / "circuit.json")
    curves = {"sizes": [10, 100], "faithfulness": [0.5, 0.9], "completeness": [0.4, 0.02], "random": [[0.0, 0.1]] * 2}
    facts = {"ablation": "mean", "start_site": "mlp_0", "n_nodes": 500, "n_prompts": 90, "cpr": 0.8, "cmd": 0.2}
    write_json(folder / "circuit" / "faithfulness.json", curves | facts)
    example_edit().save(folder / "edits" / "top-2.json")
    return folder


@pytest.fixture(scope="module")
def html(run_folder):
    return write_report(run_folder).read_text()


class Page(HTMLParser):
    """Checks that tags are balanced and collects ids, links and the text of the page."""

    VOID = frozenset({"meta", "br", "hr", "img", "link"})

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[key] for key in ("href", "xlink:href", "src") if key in values]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.slow
def test_the_page_is_whole_and_self_contained(run_folder, html):
    assert (run_folder / "report.html").is_file()
    page = Page(html)
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert {"#node-embed/3", "#node-mlp_0/120", "#node-resid_0/error", "#circuit", "#edits"} <= set(page.links)
    assert not re.search(r"url\((?!#)|@import|<script", html.split("<body>")[1] + html.split("</style>")[0])
    assert not list(run_folder.glob("*.tmp*"))


@pytest.mark.slow
def test_error_bars_and_verification_are_shown(tmp_path):
    graph = FeatureGraph(["mlp_0"], metadata=example_graph().metadata)
    graph.add_node(feature_node("mlp_0", 7, effect=0.9, exact_effect=0.3, disagrees="size", interval=[0.5, 1.25]))
    graph.add_node(metric_node(effect=3.74))
    (tmp_path / "circuit").mkdir()
    graph.save(tmp_path / "circuit" / "circuit.json")
    spans = {"faithfulness": [[0.41, 0.62]], "completeness": [[0.37, 0.44]], "cpr": [0.7, 0.9], "cmd": [0.1, 0.3]}
    curves = {"sizes": [10], "faithfulness": [0.5], "completeness": [0.4], "random": [], "intervals": spans}
    write_json(tmp_path / "circuit" / "faithfulness.json", curves | {"n_nodes": 500})
    text = Page(write_report(tmp_path).read_text()).text
    for phrase in ("the estimate differs in size", "interval +0.500 to +1.250", "0.41 to 0.62", "95 % interval"):
        assert phrase in text.replace("\u00a0", " "), phrase


@pytest.mark.slow
def test_curves_of_edges_and_of_a_mask_are_shown(tmp_path):
    facts = {"ablation": "mean", "start_site": "mlp_0", "n_nodes": 300, "n_prompts": 90}
    edges = {"sizes": [100, 500], "faithfulness": [0.31, 0.72], "random": [[0.02, 0.05]], "all_joined": 0.83,
             "n_edges": 4321, "intervals": [[0.2, 0.4], [0.6, 0.8]], **facts}  # fmt: skip
    curves = {"sizes": [100, 500], "faithfulness": [0.61, 0.92], "completeness": [0.2, 0.1], **facts}
    mask = {"held_out": True, "mask": curves, "effects": curves | {"faithfulness": [0.44, 0.55]}}
    write_json(tmp_path / "circuit" / "edge_faithfulness.json", edges)
    write_json(tmp_path / "circuit" / "mask.json", mask)
    write_json(
        tmp_path / "circuit" / "edge_mask.json", {"mask": edges, "effects": edges | {"faithfulness": [0.1, 0.2]}}
    )
    write_json(tmp_path / "edits" / "x.json", example_edit().to_dict())
    page = Page(write_report(tmp_path).read_text())
    text = re.sub(r"\s+", " ", page.text)
    for phrase in (
        "sfc faithfulness", "With all nodes joined, 0.83", "4321 edges have a weight", "0.310", "0.60 to 0.80",
        "random edges", "learned for all nodes together", "learned mask", "held-out prompts",
        "0.920", "0.550", "ranked by effect", "learned for all edges together", "on 90 prompts", "by weight", "0.200",
    ):  # fmt: skip
        assert phrase in text, phrase
    assert len(page.ids) == len(set(page.ids))


def test_what_the_run_found_is_on_the_page(html):
    text = Page(html).text
    for phrase in (
        "Gender <of> pronouns",
        "of 2 features and 1 error nodes in models/tiny from 100 prompts, found by integrated gradients",
        "+1.87",
        "to −1.87 on the patch prompts",
        "with 100 nodes from mlp_0 on",
        "0.19 % on average, 1.40 % at worst (embed)",
        "CPR 0.800, CMD 0.200",
        "2 features set to zero on 10 prompts",
        "cross-entropy, 7 other texts",
        "Tommy was happy because",
        "<script>",
        "<b>sad",
    ):
        assert phrase in re.sub(r"\s+", " ", text), phrase


def test_numbers_of_an_edit(html):
    row = re.search(r'<tr class="strong"><td class="name">logit difference, mean size</td>.*?</tr>', html, re.S).group(
        0
    )
    cells = re.findall(r"<td>(.*?)</td>", row)
    assert cells == ["2.00", "<b>0.50</b>", "25 %", "1.98 <small>1.95 to 2.01</small>"]
    assert "<dd><em>he</em> loved <em>his</em> toys</dd>" in html
    assert "<dd><em>she</em> loved <em>her</em> toys</dd>" in html
    assert "25 %</b><span>left after an edit</span>" in html


def test_features_stand_in_order_of_effect_up_to_the_limit(run_folder):
    html = write_report(run_folder, features=2, out=run_folder / "short.html", title="Another").read_text()
    assert re.findall(r'<article class="card \w+" id="node-([^"]+)"', html) == ["mlp_0/120", "embed/3"]
    assert "<title>Another</title>" in html
    assert html.count('class="kwic"') == 5
    assert "<summary>2 more</summary>" in html


def test_every_node_of_the_drawing_leads_somewhere(run_folder):
    page = Page(write_report(run_folder, features=1).read_text())
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert {"node-embed/3", "node-resid_0/error"} <= set(page.ids)


def test_missing_files_leave_a_line_with_the_command(tmp_path):
    (tmp_path / "circuit").mkdir()
    example_graph().save(tmp_path / "circuit" / "circuit.json")
    text = Page(write_report(tmp_path).read_text()).text
    assert "sfc faithfulness --circuit RUN" in text
    assert "sfc ablate --circuit RUN" in text
    assert "sfc discover" not in text


def test_edits_without_a_circuit(tmp_path):
    example_edit().save(tmp_path / "edits" / "top-2.json")
    text = Page(write_report(tmp_path).read_text()).text
    assert "sfc discover --out RUN" in text
    assert "2 features set to zero on 10 prompts" in text


def test_a_folder_with_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing to report"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="nothing to report"):
        write_report(tmp_path / "nowhere")


def test_edit_reports_read_what_they_wrote():
    report = example_edit()
    assert EditReport.from_dict(report.to_dict()) == report
    with pytest.raises(UserError, match="not an edit"):
        EditReport.from_dict({"kind": "steering", "schema_version": 1})


def test_sites_commands_and_what_the_features_tell_apart_are_on_the_page(tmp_path):
    """Quality of the autoencoders beside the sum check, the features by span and class, flips, and how to repeat it."""
    graph = FeatureGraph(["embed", "attn_0"], metadata=example_graph().metadata)
    both = {"singular": {"subject": 3.0, "last": 0.1}, "plural": {"subject": 0.0, "last": 5.0}}
    graph.add_node(feature_node("embed", 1, effect=2.0, position="subject", by_case=both, top_tokens=[" king"]))
    graph.add_node(feature_node("attn_0", 2, effect=1.0, position="last", by_case=both, top_tokens=[" are"]))
    graph.add_node(metric_node(effect=3.74))
    graph.add_edge("embed/1@subject", "attn_0/2@last", 0.5)
    graph.save(tmp_path / "circuit" / "circuit.json")
    predictions = {"ce": 2.5, "ce_recovered": 0.98}
    quality = {"l0": 7.9, "explained_variance": 0.96, "dead_fraction": 0.34, "predictions": predictions}
    evaluation = {"n_tokens": 7686, "ce_model": 2.4, "sites": {"embed": quality}, "spliced": {"all": predictions}}
    write_json(tmp_path / "saes" / "evaluation.json", evaluation)
    words = ["sfc", "ablate", "--circuit", str(tmp_path), "--prompts", "/home/anna/p.jsonl"]
    write_json(tmp_path / "config.json", {"schema_version": 1, "edit x": {"words": words}})
    example_edit().save(tmp_path / "edits" / "x.json")
    html = write_report(tmp_path).read_text()
    text = re.sub(r"\s+", " ", Page(html).text)
    for phrase in (
        "On 7,686 tokens", "recover 0.980", "0.040", "+0.100", "34 %", "on for plural", "on for singular",
        "−27 % flips",
        "from “subject” to “last” enters by attn_0 (100 %)", "sfc ablate --circuit RUN --prompts p.jsonl",
    ):  # fmt: skip
        assert phrase in text, phrase
    assert "anna" not in html


SCRIPT = "<img src=x onerror=alert(1)>"


def leaves(value, path=()):
    """Where in a JSON value its strings and numbers are."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    elif value is not None:
        yield path


def with_scripts(value, paths):
    """A copy of the value with a script in place of what is at these paths."""
    value = json.loads(json.dumps(value))
    for *parents, last in paths:
        inner = value
        for key in parents:
            inner = inner[key]
        inner[last] = SCRIPT
    return value


@pytest.mark.slow
def test_no_field_of_any_file_reaches_a_page_as_html(tmp_path):
    """Each string and number alone is replaced by a script: refused, or shown as text on the pages."""
    facts = {"ablation": "mean", "start_site": "mlp_0", "n_nodes": 300, "n_prompts": 90}
    curves = {"sizes": [5], "faithfulness": [0.6], "completeness": [0.2], "random": [[0.1]], "cpr": 0.5, "cmd": 0.5,
              "intervals": {"faithfulness": [[0.1, 0.2]], "completeness": [[0.1, 0.2]]}, **facts}  # fmt: skip
    graph = example_graph().to_json()
    graph["nodes"][0]["attributes"] |= {"exact_effect": 0.3, "disagrees": "size", "interval": [0.1, 0.2], "extra": 1}
    files = {
        "circuit/circuit.json": graph,
        "circuit/faithfulness.json": curves,
        "circuit/edge_faithfulness.json": curves | {"n_edges": 9, "all_joined": 0.8, "intervals": [[0.1, 0.2]]},
        "circuit/mask.json": {"held_out": True, "mask": curves, "effects": curves},
        "edits/x.json": replace(example_edit(), operation="set", value=2.0).to_dict(),
        "saes/evaluation.json": {
            "n_tokens": 5,
            "ce_model": 2.0,
            "spliced": {"all": {"ce": 2.5, "ce_recovered": 0.9}},
            "sites": {
                "mlp_0": {
                    "l0": 2.0,
                    "explained_variance": 0.9,
                    "dead_fraction": 0.1,
                    "predictions": {"ce": 2.5, "ce_recovered": 0.9},
                }
            },
        },
        "config.json": {
            "schema_version": 1,
            "discover": {"words": ["sfc", "discover"]},
            "versions": {"torch": "2"},
            "train": {"model": "m", "config": {"features": 3, "l0_loss": "x"}},
        },
        "saes/mlp_0/config.json": {"site": "mlp_0", "architecture": "topk", "n_features": 8, "k": 2},
    }
    for name, data in files.items():
        write_json(tmp_path / name, data)
    (tmp_path / "saes" / "mlp_0" / "sae.safetensors").touch()
    write_report(tmp_path)
    for name, data in files.items():
        taken = []
        for path in leaves(data):
            (tmp_path / name).write_text(json.dumps(with_scripts(data, [path])))
            try:
                read_run(tmp_path)
                taken.append(path)
            except (UserError, GraphError) as error:
                assert str(tmp_path / name) in str(error)
        write_json(tmp_path / name, with_scripts(data, taken))
    pages = [write_report(tmp_path).read_text()]
    graph = FeatureGraph.load(tmp_path / "circuit" / "circuit.json")
    pages += [explorer_html(graph), draw(graph, tmp_path / "circuit.svg").read_text()]
    assert all("<img" not in page for page in pages)
    assert "&lt;img" in pages[0] and "<img" in str(unpacked(pages[1])) and "&lt;img" in pages[2]
