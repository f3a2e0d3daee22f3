"""`sfc sweep` and `sfc cache` on a tiny model, as a user types them."""

from __future__ import annotations

import json

import pytest

from sae.evaluation.evaluate import Evaluator
from sae.evaluation.sweep import UNFINISHED, SweepResults, SweepRow
from sae.evaluation.sweep_plots import METRICS, plot_site, plot_sites
from tests.end_to_end.test_bad_input import sentence

GRID = ["--features", "16,24", "--k", "2,4", "--tokens", 2000, "--context-length", 16, "--eval-tokens", 300]
NAMES = [f"topk-{features}-k{k}-seed0" for features in (16, 24) for k in (2, 4)]


@pytest.fixture(scope="module")
def halves(tmp_path_factory, text_file):
    """Two texts: what is trained on, and what is held out."""
    folder, lines = tmp_path_factory.mktemp("halves"), text_file.read_text().splitlines()
    for name, part in (("train.txt", lines[:1900]), ("valid.txt", lines[1900:])):
        (folder / name).write_text("\n".join(part))
    return folder / "train.txt", folder / "valid.txt"


def times(folder, pattern):
    return {path: path.stat().st_mtime_ns for path in folder.rglob(pattern)}


@pytest.mark.slow
def test_a_sweep_is_trained_measured_drawn_and_usable(sfc, model_folder, halves, tmp_path):
    out = tmp_path / "sweep"
    words = ["sweep", "--model", model_folder, "--text", halves[0], "--out", out, "--sites", "resid", *GRID]
    result = sfc(*words)
    assert result.status == 0 and "16" in result.out and "from document" in result.out
    data = json.loads((out / "sweep.json").read_text())
    assert {row["name"] for row in data["rows"]} == set(NAMES) and not data["seen"] and data["start"] > 0
    assert {path.name for path in (out / "plots").iterdir()} == {
        *(f"{metric}.svg" for metric in METRICS), "resid_0.svg", "resid_1.svg"
    }  # fmt: skip
    for row in data["rows"]:
        assert row["l0"] == pytest.approx(row["k"], abs=0.5) and row["explained_variance"] > 0
    assert data["laws"] == [] and {row["tokens"] for row in data["rows"]} == {2000}  # four are too few for any law
    beside = sfc("sweep", "--model", model_folder, "--text", halves[1], "--out", tmp_path / "other", "--beside", out)
    assert (
        beside.status == 2
        and "scaling laws compare sweeps on one text" in beside.err
        and not (tmp_path / "other").exists()
    )
    damaged = out / NAMES[0] / "saes" / "evaluation.json"
    whole = damaged.read_text()
    damaged.write_text(json.dumps({**json.loads(whole), "n_tokens": [300]}))
    assert "evaluation.json: key 'n_tokens' is [300]" in sentence(sfc(*words, "--resume"))
    damaged.write_text(whole)
    run = out / NAMES[1]
    words_alone = ["--model", model_folder, "--saes", run, "--text", halves[1], "--tokens", 100]
    refused = sfc("evaluate", *words_alone)
    assert refused.status == 2 and "--overwrite" in refused.err
    assert sfc("evaluate", *words_alone, "--overwrite").status == 0

    trained, measured = times(out, "sae.safetensors"), times(out, "evaluation.json")
    other = (run / "saes" / "evaluation.json").read_bytes()
    refused = sfc(*words, "--resume")
    assert refused.status == 2 and "other settings (text-fingerprint" in refused.err and "--overwrite" in refused.err
    assert (run / "saes" / "evaluation.json").read_bytes() == other
    assert sfc(*words, "--resume", "--overwrite").status == 0
    assert times(out, "sae.safetensors") == trained
    again = times(out, "evaluation.json")
    assert [path.parts[-3] for path in again if again[path] != measured[path]] == [NAMES[1]]  # measured on other text


@pytest.mark.slow
def test_interrupted_measuring_goes_on(sfc, model_folder, halves, tmp_path, monkeypatch):
    """No batch is measured twice, and what is measured is the same to the last bit."""
    words = ["sweep", "--model", model_folder, "--text", halves[0], "--eval-text", halves[1], "--out", tmp_path / "s"]
    words += ["--sites", "resid_0", *GRID, "--json"]
    update, measured = Evaluator.update, []

    def interrupted(self, tokens):
        measured.append(len(self.runs))
        if len(measured) == 2:
            raise KeyboardInterrupt
        update(self, tokens)

    monkeypatch.setattr(Evaluator, "update", interrupted)
    assert sfc(*words).status == 130
    before = times(tmp_path, "sae.safetensors")
    result = sfc(*words, "--resume")
    assert result.status == 0 and times(tmp_path, "sae.safetensors") == before
    assert measured == [len(NAMES)] * len(measured) and not (tmp_path / "s" / UNFINISHED).exists()
    in_two = {path: path.read_bytes() for path in (tmp_path / "s").rglob("evaluation.json")}
    for path in in_two:
        path.unlink()
    measured[:] = [0] * 3
    again = sfc(*words, "--resume")
    assert {path: path.read_bytes() for path in in_two} == in_two and again.out == result.out
    assert measured == [0] * 3 + [len(NAMES)] * 3  # in all, of which the first run finished one
    shorter = [str(word).replace("2000", "1500").replace("16,24", "16") for word in words if word != "--json"]
    shorter[shorter.index("--out") + 1] = tmp_path / "shorter"
    fitted = sfc(*shorter, "--beside", tmp_path / "s")
    assert fitted.status == 0 and "β_T" in fitted.out and (tmp_path / "shorter/plots/scaling-topk.svg").is_file()
    law = json.loads((tmp_path / "shorter" / "sweep.json").read_text())["laws"][0]
    assert law["points"] == 6 and set(law["errors"]) == {"alpha", "beta_n", "beta_k", "beta_T"}


@pytest.mark.slow
def test_a_begun_measurement_is_finished_before_a_larger_grid(sfc, model_folder, halves, tmp_path, monkeypatch):
    words = ["sweep", "--model", model_folder, "--text", halves[0], "--eval-text", halves[1], "--out", tmp_path / "s"]
    words += ["--sites", "resid_0", *GRID, "--json"]
    update, measured = Evaluator.update, []

    def interrupted(self, tokens):
        measured.append(len(self.runs))
        if len(measured) == 3:
            raise KeyboardInterrupt
        update(self, tokens)

    monkeypatch.setattr(Evaluator, "update", interrupted)
    monkeypatch.setattr("sae.evaluation.sweep.SAVING", float("inf"))
    assert sfc(*words).status == 130
    more = sfc(*words, "--seeds", "0,1", "--resume")
    assert more.status == 0 and len(json.loads(more.out)["rows"]) == 2 * len(NAMES)
    assert measured == [4] * 7  # two batches and one begun, that one again, three with the new configs


@pytest.mark.slow
def test_a_cache_trains_and_sweeps_without_the_model(sfc, model_folder, halves, tmp_path):
    cache = tmp_path / "cache"
    words = [
        "cache",
        "--model",
        model_folder,
        "--text",
        halves[0],
        "--sites",
        "resid",
        "--tokens",
        4000,
        "--out",
        cache,
    ]
    written = sfc(*words, "--stored-dtype", "float32", "--context-length", 16)
    assert written.status == 0 and "4,000 tokens at 2 sites: 1.0 MB" in written.err and "0.00" not in written.out
    assert sfc("sweep", "--cache", cache, "--out", tmp_path / "sweep", *GRID, "--json").status == 0
    rounded = sfc("sweep", "--cache", cache, "--out", tmp_path / "sweep", *GRID, "--resume", "--dtype", "bfloat16")
    assert "other settings (dtype 'float32', not 'bfloat16')" in sentence(rounded)
    hidden = model_folder.rename(model_folder.with_name("hidden"))
    try:
        small = ["--features", 16, "--k", 2, "--tokens", 3000]
        assert sfc("train", "--cache", cache, "--sites", "resid_1", "--out", tmp_path / "one", *small).status == 0
    finally:
        hidden.rename(model_folder)
    assert (tmp_path / "one" / "saes" / "resid_1").is_dir() and not (tmp_path / "one" / "saes" / "resid_0").exists()
    train = ["train", "--cache", cache, "--out", tmp_path / "two"]
    assert "was made for text" in sentence(sfc(*train, "--text", halves[1]))
    assert "not all of these sites" in sentence(sfc(*train, "--sites", "mlp"))
    assert "context_length 16, not 8" in sentence(sfc(*train, "--context-length", 8))
    assert "'no/model'" in sentence(sfc(*train, "--model", "no/model"))
    assert "--text is missing" in sentence(sfc("train", "--model", model_folder, "--out", tmp_path / "two"))
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("architectures", "topk,gatd", "'gated'"), ("features", "16,x", "512,1024"), ("k", "", "8,16,32")],
)
def test_a_grid_that_is_none(sfc, model_folder, halves, tmp_path, option, value, said):
    words = ["sweep", "--model", model_folder, "--text", halves[0], "--out", tmp_path / "out", f"--{option}", value]
    assert said in sentence(sfc(*words))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("n_layers", [0, 2])
def test_pictures_of_many_sites_and_undefined_numbers(tmp_path, n_layers):
    sites = ["embed", *(f"{kind}_{layer}" for layer in range(n_layers) for kind in ("attn", "mlp", "resid"))]
    lines = (("topk", 16, 2), ("topk", 16, 4), ("jumprelu", 32, 2), ("identity", 32, 32))
    rows = [
        SweepRow("", name, width, k, seed, site, k + 0.5, 0.9, float("nan"), 0.1, 0.0)
        for site in sites
        for name, width, k in lines
        for seed in (0, 1)
    ]
    results = SweepResults(tuple(rows), {"": {"ce": 1.0, "ce_recovered": 0.5, "kl": 0.1}}, 1.0, 10, "text", 0, False)
    assert "identity" in results.text() and "-" in results.summary()
    for metric in METRICS if n_layers == 0 else ["explained_variance"]:
        assert plot_sites(results, metric, tmp_path / f"{metric}.svg").stat().st_size > 10_000
    assert plot_site(results, "embed", tmp_path / "embed.png").stat().st_size > 10_000
