"""`sfc discover` killed in the middle and resumed."""

from __future__ import annotations

import json

import pytest

from circuits.circuit import Circuit
from sae._files import is_temporary
from tests.circuits.discovery.test_resume import same_bits
from tests.kill_points import Kill

FOUR_PROMPTS = 2e-4  # GiB: of the tiny model, four prompts a batch


@pytest.fixture(scope="module")
def words(run_folder, model_folder, prompts_file) -> list[str]:
    """A discovery in four batches, two of nodes and two of edges."""
    words = ["discover", "--model", model_folder, "--saes", run_folder, "--prompts", prompts_file, "--steps", 3]
    words += ["--memory", FOUR_PROMPTS, "--edge-nodes", 30, "--nodes", 20, "--sites", "resid,mlp"]
    return [str(word) for word in words]


@pytest.mark.slow
def test_killed_and_resumed(sfc, forked_sfc, words, tmp_path):
    """SIGKILL after the second batch; the resumed run ends at the bits of one that was left alone."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert forked_sfc(*words, "--out", whole).status == 0
    assert not (whole / "circuit" / "partial").exists()
    second = killed / "circuit" / "partial" / "nodes-0001.safetensors"
    at_edges = Kill("os.rename", r"/edges-0000\.safetensors$")
    assert forked_sfc(*words, "--out", killed, before=at_edges).status == -9
    batches = [path for path in second.parent.glob("*.safetensors") if not is_temporary(path)]
    assert second in batches and len(batches) == 2
    assert not (killed / "circuit" / "circuit.json").exists()

    refused = sfc(*words, "--out", killed)
    assert refused.status == 2 and "--resume" in refused.err
    other = sfc(*words, "--out", killed, "--resume", "--steps", 4)
    assert other.status == 2 and "steps 3, not 4" in other.err
    assert forked_sfc(*words, "--out", killed, "--resume").status == 0
    assert not second.parent.exists()
    assert same_bits(Circuit.load(whole), Circuit.load(killed))
    again = sfc(*words, "--out", killed, "--resume")
    assert again.status == 2 and "finished" in again.err


@pytest.mark.slow
def test_autoencoders_streamed_from_disk(sfc, run_folder, words, tmp_path):
    """Room for two of seven: the same circuit, and the commands after it work as well."""
    little, words = ["--sae-memory", 3e-5], [*words, "--steps", 1]
    assert sfc(*words, "--out", tmp_path / "all").status == 0
    streamed = tmp_path / "streamed"
    assert sfc(*words, "--out", streamed, *little).status == 0
    assert same_bits(Circuit.load(tmp_path / "all"), Circuit.load(streamed))
    for command in (["faithfulness", "--sizes", 5, "--random", 0], ["ablate", "--top", 2, "--random", 0]):
        plain = sfc(*command, "--circuit", streamed, "--json")
        assert plain.status == 0
        assert json.loads(sfc(*command, "--circuit", streamed, *little, "--json").out) == json.loads(plain.out)
    refused = sfc("ablate", "--circuit", streamed, "--top", 2, "--sae-memory", 1e-6)
    assert refused.status == 2 and "sae-memory" in refused.err


@pytest.mark.slow
def test_estimate_alone(sfc, words, tmp_path):
    """What a discovery will take is said by --estimate, which leaves nothing behind."""
    words = [*words, "--steps", 1]
    alone = sfc(*words, "--out", tmp_path / "none", "--estimate")
    assert alone.status == 0 and "estimated memory" in alone.out and not (tmp_path / "none").exists()
    data = json.loads(sfc(*words, "--out", tmp_path / "none", "--estimate", "--json").out)["estimate"]
    assert data["peak_bytes"] == sum(data["memory_bytes"].values()) and data["total_seconds"] > 0
