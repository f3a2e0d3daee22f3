"""`sfc features` and `sfc labels`: pages of features, their names, and the way between the pages of a run."""

from __future__ import annotations

import json
import shutil

import pytest

from circuits.circuit import Circuit
from circuits.labels import LabelsFile
from graphs.explorer import unpacked
from sae.saes import load_saes, saes_fingerprint, stored_fingerprint
from sae.training.run_folder import discard_run

SMALL = ("--tokens", 600, "--correlation-tokens", 600, "--contexts", 3, "--samples", 1, "--json")


@pytest.fixture
def run(run_folder, tmp_path):
    others = shutil.ignore_patterns("report.html", "graph", "features", "edits")  # of tests that came before
    return shutil.copytree(run_folder, tmp_path / "run", ignore=others)


@pytest.mark.slow
def test_pages_of_a_circuit_lead_to_the_others_and_back(sfc, run, monkeypatch):
    names = [node.name for node in Circuit.load(run).graph(nodes=4).nodes() if node.kind == "feature"]
    words = ["features", "--circuit", run, *SMALL, "--features", f"{names[0]},embed/0"]
    result = sfc(*words)
    assert result.status == 0, result.err
    index = json.loads((run / "features" / "index.json").read_text())
    assert set(index["features"]) == {names[0], "embed/0"} and not (run / "features" / "partial").exists()
    data = unpacked((run / "features" / "index.html").read_text())
    shown = {node["name"]: node["attributes"] for node in data["nodes"]}
    assert {"singular", "plural"} == set(shown[names[0]]["prompt_peaks"]) == set(shown[names[0]]["by_case"])
    assert shown[names[0]]["samples"] and data["page"] == "features" and data["links"] == {}
    refused = sfc(*words, "--seed", 3)
    assert refused.status == 2 and "seed 0, not 3" in refused.err
    assert "no prompt file" in sfc(*words, "--overwrite", "--prompts", run / "gone.jsonl").err
    assert (run / "features" / "circuit.json").is_file(), "prompts are read before anything is replaced"

    assert sfc("explore", "--circuit", run).status == 0
    circuit = unpacked((run / "graph" / "circuit.html").read_text())
    assert circuit["links"] == {"features": "../features/index.html"}
    assert "quantiles" in next(node for node in circuit["nodes"] if node["name"] == names[0])["attributes"]
    assert unpacked((run / "features" / "index.html").read_text())["links"] == {"circuit": "../graph/circuit.html"}
    assert sfc("report", "--circuit", run).status == 0
    report = (run / "report.html").read_text()
    pages = [unpacked((run / name).read_text()) for name in ("graph/circuit.html", "features/index.html")]
    assert [page["links"]["report"] for page in pages] == ["../report.html"] * 2
    assert pages[0]["nodes"] == circuit["nodes"]
    assert f'href="graph/circuit.html#node-{names[0]}"' in report and f'href="features/index.html#{names[0]}"' in report


@pytest.mark.slow
def test_an_interrupted_reading_goes_on(sfc, run, monkeypatch):
    words = ["features", "--saes", run, *SMALL, "--features", "embed/0,resid_1/3"]
    with monkeypatch.context() as patch:
        patch.setattr("circuits.feature_pages.write_site", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        stopped = sfc(*words, "--resume")  # where there is nothing yet it begins
    assert stopped.status == 130 and "--resume" in stopped.err
    assert "interrupted reading" in sfc(*words).err
    assert "contexts 3, not 4" in sfc(*words, "--resume", "--contexts", 4).err
    assert sfc(*words, "--resume").status == 0 and "pages are finished" in sfc(*words, "--resume").err
    assert (run / "features" / "resid_1.jsonl").is_file() and not (run / "features" / "circuit.json").exists()
    grouped = sfc(*words, "--groups", "--automata", "--overwrite")
    groups = json.loads((run / "features" / "groups.json").read_text())
    assert grouped.status == 0 and groups["n_tokens"] > 400 and (run / "features" / "groups.svg").is_file(), grouped.err
    automata = json.loads((run / "features" / "automata.json").read_text())
    assert automata["n_tokens"] == groups["n_tokens"] and set(automata["of_model"]) == {"embed", "resid_1"}
    assert (run / "features" / "automata.svg").is_file()
    assert "groups True, not None" in sfc(*words).err
    assert sfc(*words, "--overwrite").status == 0 and not (run / "features" / "groups.json").exists()
    assert not (run / "features" / "automata.svg").exists()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "say whose features to show"),
        (("--saes", "nowhere"), "'nowhere' is no run folder of sfc"),
        (("--features", "embed/0", "--sites", "embed", "--saes", "x"), "by one of"),
    ],
)
def test_bad_words(sfc, words, why):
    result = sfc("features", *words)
    assert result.status == 2 and why in result.err


@pytest.mark.slow
def test_names_belong_to_the_saes_and_outlive_another_circuit(sfc, run, tmp_path):
    saes = load_saes(run)
    for site, sae in saes.items():
        assert stored_fingerprint(run / "saes" / str(site)) == saes_fingerprint({site: sae})
    name = next(node.name for node in Circuit.load(run).graph(nodes=5).nodes() if node.kind == "feature")
    automatic = ["--feature", name, "--label", "guessed", "--automatic", "--by", "a model"]
    assert sfc("labels", "--circuit", run, *automatic).status == 0
    assert Circuit.load(run).graph(nodes=5).subgraph([name]).nodes()[0].attributes["automatic_label"] == "guessed"
    given = tmp_path / "given.jsonl"
    given.write_text(json.dumps({"Name": name, "Annotation": "</script><b>kings"}) + "\n")
    result = sfc("labels", "--circuit", run, "--read", given, "--by", "anna", "--json")
    assert json.loads(result.out)["labels"][name]["by"] == "anna"
    for n in (5, 20):
        assert Circuit.load(run).graph(nodes=n).node(name).label == "</script><b>kings"
    assert sfc("labels", "--circuit", run, *automatic).out.count("0 new of 1") == 1  # it is there already
    anew = ["guessed anew" if word == "guessed" else word for word in automatic]
    assert sfc("labels", "--circuit", run, *anew).status == 0
    assert "kings" in sfc("labels", "--saes", run, "--out", tmp_path / "out.jsonl").out
    assert json.loads((tmp_path / "out.jsonl").read_text())["Name"] == name
    assert "is not a feature" in sfc("labels", "--saes", run, "--feature", "x", "--label", "y").err
    assert sfc("report", "--circuit", run).status == 0
    assert "&lt;/script&gt;&lt;b&gt;kings" in (run / "report.html").read_text()
    file = LabelsFile(run, run)
    assert file.path == run / "saes" / "labels.jsonl" and len(file.lines()) == 3
    assert file.add({name: ""}, by="anna") == 1 and file.read()[name]["label"] == "guessed anew"
    discard_run(run)
    assert file.path.is_file()  # names stay when the features are trained again
    file.path.write_text(file.path.read_text().replace(str(file.fingerprint(name.split("/")[0])), "0" * 16))
    assert file.read() == {}  # of SAEs that were trained again
    foreign = [LabelsFile(None, tmp_path, fingerprint) for fingerprint in ("one", "another")]
    assert foreign[0].add({name: "kings"}, by="anna") == 1 and set(foreign[0].read()) == {name}
    assert foreign[0].path == foreign[1].path and foreign[1].read() == {}
