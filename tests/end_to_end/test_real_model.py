"""The main job on a real trained model: train, discover, test and edit, small, with the claims of a full-size run."""

from __future__ import annotations

import json

import pytest

from circuits.cli.main import main

SITES = "attn_2,mlp_2,resid_2,attn_3,mlp_3,resid_3,attn_4,mlp_4"


@pytest.fixture(scope="module")
def run(shared_dir, tmp_path_factory):
    """Autoencoders at eight of 16 sites and a circuit for pronoun gender; everything but sizes at its default."""
    folder = tmp_path_factory.mktemp("runs") / "pronouns"
    model, data = shared_dir / "models" / "tinystories-260k", shared_dir / "data"
    common = ["--model", model, "--out", folder, "--json"]
    text, prompts = data / "tinystories" / "train.jsonl", data / "pronoun_gender" / "train.jsonl"
    for arguments in (
        ["train", *common, "--text", text, "--features", 256, "--k", 16, "--tokens", 40_000, "--sites", SITES],
        [
            "discover",
            *common,
            "--saes",
            folder,
            "--prompts",
            prompts,
            "--examples",
            20,
            "--edge-nodes",
            40,
            "--nodes",
            40,
        ],
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        assert not stop.value.code
    return folder


@pytest.fixture
def test_prompts(shared_dir):
    return shared_dir / "data" / "pronoun_gender" / "test.jsonl"


@pytest.mark.slow
def test_autoencoders_reconstruct_their_sites(run):
    lines = [json.loads(line) for line in (run / "saes" / "training.jsonl").read_text().splitlines()]
    last = {line["site"]: line for line in lines}
    assert ",".join(last) == SITES
    for site, line in last.items():
        assert line["explained_variance"] > (0.62 if "mlp" in site else 0.7), line
        assert line["dead"] < (0.25 if "attn" in site else 0.05), line


@pytest.mark.slow
def test_effects_of_a_site_add_up(run):
    circuit = json.loads((run / "circuit" / "circuit.json").read_text())
    assert circuit["metadata"]["completeness"]["mean_residual"] < 0.01
    assert circuit["metadata"]["accuracy"] == 1.0
    assert circuit["metadata"]["total_effect"] > 2.5


@pytest.mark.slow
def test_ten_features_carry_the_behaviour_and_random_ones_do_not(sfc, run, shared_dir, test_prompts):
    text = shared_dir / "data" / "tinystories" / "valid.jsonl"
    result = sfc(
        "ablate", "--circuit", run, "--top", 10, "--prompts", test_prompts, "--examples", 30, "--text", text,
        "--texts", 8, "--random", 3, "--json",
    )  # fmt: skip
    data = json.loads(result.out)
    before, after = data["before"]["overall"]["metric"], data["after"]["overall"]["metric"]
    drawn = [score["overall"]["metric"] for score in data["random"]]
    assert after < 0.35 * before
    assert sum(drawn) / len(drawn) > 0.9 * before
    assert data["after"]["ce"] - data["before"]["ce"] < 0.06


@pytest.mark.slow
def test_the_circuit_is_faithful_and_random_ones_are_not(sfc, run, test_prompts):
    result = sfc(
        "faithfulness", "--circuit", run, "--prompts", test_prompts, "--examples", 20, "--start-site", "attn_2",
        "--sizes", "20,200,600", "--json",
    )  # fmt: skip
    data = json.loads(result.out)
    assert data["faithfulness"][2] > 0.7 and data["faithfulness"][2] > data["faithfulness"][0]
    assert max(abs(curve[1]) for curve in data["random"]) < 0.2
    assert abs(data["completeness"][1]) < 0.2
