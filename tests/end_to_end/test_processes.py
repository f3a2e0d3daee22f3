"""Several processes share a training or a discovery, to the results of one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from sae._files import read_tensors
from sae._run.processes import Processes
from sae.errors import UserError
from sae.saes import load_saes
from sae.training.config import TrainConfig
from sae.training.parallel import choose_parallel
from tests.conftest import FORKED
from tests.ranks import sfc_in_ranks

SMALL = ["--features", 48, "--k", 4, "--tokens", 2000, "--batch-size", 128, "--context-length", 16, "--log-steps", 1]
SMALL += ["--dead-tokens", 400]


@pytest.fixture
def in_ranks(forked):
    return partial(sfc_in_ranks, forked)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def autoencoders(run: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(run / "saes").items() if name != "training.jsonl"}


def training_log(run: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "saes" / "training.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


@pytest.fixture(scope="module")
def words(model_folder, text_file) -> list[object]:
    return ["train", "--model", model_folder, "--text", text_file, "--sites", "attn_0,resid_1", *SMALL]


@pytest.fixture(scope="module")
def alone(request, words, tmp_path_factory) -> Path:
    """What one process makes."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert request.config.stash[FORKED].run(*words, "--out", run).status == 0
    return run


@pytest.mark.slow
def test_sites_of_several_processes(in_ranks, forked_sfc, words, alone, tmp_path):
    """One of two processes is killed, and one goes on: the bits of one process."""
    run = tmp_path / "run"
    killed = in_ranks(2, *words, "--out", run, kill_after=8)
    assert killed.status and killed.err.count("another process of this command has ended") == 1
    newest = max((run / "checkpoints").iterdir())
    names = {"state.json", "state-1-of-2.safetensors", "state-2-of-2.safetensors"}
    assert {path.name for path in newest.iterdir()} == names
    assert forked_sfc(*words, "--out", run, "--resume").status == 0
    assert autoencoders(run) == autoencoders(alone)
    assert training_log(run) == training_log(alone)
    assert {path.name for path in run.iterdir()} == {"config.json", "saes"}


@pytest.mark.slow
def test_data_of_several_processes(in_ranks, forked_sfc, words, alone, tmp_path):
    """The same batches as in one process, and the same step from them; a killed run is ended by one process."""
    run = tmp_path / "run"
    assert in_ranks(2, *words, "--parallel", "data", "--out", run, kill_after=9).status
    pairs = list(zip(training_log(run), training_log(alone), strict=False))
    for line, expected in pairs[:4]:  # two sites, two steps
        assert line.pop("site") == expected.pop("site")
        assert line == pytest.approx(expected, rel=1e-5 if line["step"] == 1 else 1e-3)
    for line, expected in pairs[4:16]:  # features die after four steps
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-2)
    assert pairs[15][0]["dead"] > 0
    assert forked_sfc(*words, "--out", run, "--resume").status == 0
    assert {line["step"] for line in training_log(run)} == {line["step"] for line in training_log(alone)}


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "kind"), [("jumprelu", "sae"), ("topk", "transcoder")])
def test_features_of_several_processes(in_ranks, forked_sfc, words, tmp_path, architecture, kind):
    """The weights of one process after a few steps with dead features, up to the order of sums."""
    words = [*words, "--sites", "mlp_1", "--architecture", architecture, "--kind", kind]
    words += ["--tokens", 512, "--dead-tokens", 100, "--warmup", 0]
    assert forked_sfc(*words, "--out", tmp_path / "alone").status == 0
    assert in_ranks(2, *words, "--parallel", "features", "--out", tmp_path / "run").status == 0
    assert autoencoders(tmp_path / "run").keys() == autoencoders(tmp_path / "alone").keys()
    trained, expected = (load_saes(tmp_path / name, device="cpu") for name in ("run", "alone"))
    for site, sae in expected.items():
        assert trained[site].config == sae.config
        for name, weights in sae.named_buffers():
            assert (trained[site].get_buffer(name) - weights).norm() <= 2e-3 * weights.norm(), (site, name)
    dead = [[line["dead"] for line in training_log(tmp_path / name)] for name in ("run", "alone")]
    assert dead[0] == pytest.approx(dead[1], abs=0.03) and (max(dead[0]) > 0 or architecture != "topk")


@pytest.mark.slow
def test_features_of_a_run_that_was_killed(in_ranks, forked_sfc, words, alone, tmp_path):
    """Its checkpoint is one of all features: two processes go on from it, and one when these are killed as well."""
    run, words = tmp_path / "run", [*words, "--out", tmp_path / "run"]
    assert in_ranks(2, *words, "--parallel", "features", kill_after=5).status
    assert in_ranks(2, *words, "--parallel", "features", "--resume", kill_after=5).status
    assert max(line["step"] for line in training_log(run)) > 5
    saved = read_tensors(max((run / "checkpoints").iterdir()) / "state-2-of-2.safetensors")
    assert saved["resid_1/weights/W_dec"].shape == (24, 32) and "resid_1/weights/b_dec" not in saved
    assert forked_sfc(*words, "--resume").status == 0
    assert autoencoders(run).keys() == autoencoders(alone).keys()
    pairs = list(zip(training_log(run), training_log(alone), strict=True))
    assert all(line["loss"] == pytest.approx(expected["loss"], rel=1e-2) for line, expected in pairs[4:16])


def test_what_cannot_be_shared(sfc, in_ranks, words, tmp_path):
    early = sfc(*words, "--finetune", "kl", "--processes", 2, "--out", tmp_path / "run")
    assert early.status == 2 and "for one process" in early.err
    with pytest.raises(UserError, match="batchtopk"):
        choose_parallel("data", [], TrainConfig(architecture="batchtopk"), Processes(0, 2), cached=False)
    for config, reason in (({"architecture": "gated"}, "gated"), ({"features": 33}, "equal blocks")):
        with pytest.raises(UserError, match=reason):
            choose_parallel("features", [], TrainConfig(**config), Processes(0, 2), cached=False)
    alone = in_ranks(2, "render", "--circuit", tmp_path)
    assert alone.status == 2 and alone.err.count("runs in one process") == 1


@pytest.mark.slow
def test_estimates_of_several_processes(in_ranks, forked_sfc, words, tmp_path):
    """Each process has half of the features, and nothing is written."""
    words = [*words, "--out", tmp_path / "run", "--estimate", "--json", "--sites", "mlp_1"]
    together = json.loads(in_ranks(2, *words, "--parallel", "features").out)["estimate"]
    alone = json.loads(forked_sfc(*words).out)["estimate"]
    assert together["processes"] == 2 and alone["processes"] == 1
    assert together["memory_bytes"]["weights"] == pytest.approx(alone["memory_bytes"]["weights"] / 2, rel=0.05)
    assert max(together["peak_bytes_of_processes"]) == together["peak_bytes"] < alone["peak_bytes"]
    for name, n_bytes in alone["disk_bytes"].items():
        assert together["disk_bytes"][name] == pytest.approx(n_bytes, rel=0.05)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_prompts_of_several_processes(in_ranks, forked_sfc, run_folder, model_folder, prompts_file, tmp_path):
    """One of two processes is killed, and two go on: the files of one process."""
    words = ["discover", "--model", model_folder, "--saes", run_folder, "--prompts", prompts_file, "--method", "attrib"]
    words += ["--memory", 1e-4, "--edge-nodes", 10, "--nodes", 10, "--sites", "resid_1"]  # two prompts a batch
    assert forked_sfc(*words, "--out", tmp_path / "alone").status == 0
    run = tmp_path / "run"
    killed = in_ranks(2, *words, "--out", run, kill_after=1)
    assert killed.status and list((run / "circuit" / "partial").glob("nodes-*.safetensors"))
    resumed = in_ranks(2, *words, "--out", run, "--resume")
    assert resumed.status == 0 and resumed.out.count("wrote") == 1
    assert contents(run / "circuit") == contents(tmp_path / "alone" / "circuit")
