"""Damaged and malicious files of every format end in one sentence that names the file, and cost little."""

import json
import resource
import shutil
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError
from sae.formats import load_sae, save_sae
from tests.sae.formats.test_recorded import RECORDED

D, F = 16, 48
FOLDERS = {
    "saelens/topk": "cfg.json",
    "saelens/standard_old": "cfg.json",
    "sparsify/layers.3.mlp": "cfg.json",
    "dictionary_learning/AutoEncoderTopK": "config.json",
}


@pytest.fixture
def copied(tmp_path):
    """copied("saelens/topk") -> a copy of a recorded folder."""
    return lambda folder: shutil.copytree(RECORDED / folder, tmp_path / folder.rpartition("/")[2])


def tries(folder):
    """The sentence with which a folder is refused, "" where it is read; anything else fails the test."""
    try:
        load_sae(folder)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_entry_of_a_config_may_be_anything(folder, copied):
    path = copied(folder) / FOLDERS[folder]
    good = json.loads(path.read_text())
    for whole in ([], "x", 3, None, {}):
        path.write_text(json.dumps(whole))
        tries(path.parent)
    path.write_text("[" * 100_000)
    assert "nested too deeply" in tries(path.parent)
    inner = good.get("trainer", good)
    for key, value in list(inner.items()):
        for other in ([], {}, "x", "3", None, 1.5, -1, 10**30, True):
            inner[key] = other
            path.write_text(json.dumps(good))
            tries(path.parent)
        inner[key] = value


def test_a_wrong_entry_is_named_with_its_key_and_value(copied):
    folder = copied("sparsify/layers.3.mlp")
    (folder / "cfg.json").write_text('{"k": "3", "d_in": 16}')
    assert "cfg.json: key 'k' is \"3\": expected a valid integer" in tries(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("b_dec", lambda x: x[0], "'b_dec' has shape []"),
        ("encoder.bias", lambda x: torch.cat([x, x]), "'encoder.weight' has shape [48, 16], expected [96, 16]"),
        ("W_dec", lambda x: x[:, :5], "'W_dec' has shape [48, 5]"),
        ("W_dec", lambda x: x.flatten(), "'W_dec' has shape [768]"),
        ("encoder.weight", lambda x: x * torch.nan, "not finite"),
        ("encoder.weight", lambda x: x.long(), "is int64, expected float numbers"),
    ],
)
def test_tensors_of_other_shapes_and_types_are_named(name, change, message, copied):
    path = copied("sparsify/layers.3.mlp") / "sae.safetensors"
    state = load_file(path)
    save_file(state | {name: change(state[name]).contiguous()}, path)
    assert message in tries(path.parent) and str(path) in tries(path.parent)


@pytest.mark.parametrize("cut", [0, 3, 100, 2000, -1])
def test_a_torch_file_that_was_cut_is_one_sentence(cut, copied):
    path = copied("dictionary_learning/AutoEncoder") / "ae.pt"
    path.write_bytes(path.read_bytes()[:cut])
    assert f"{path} is not a file of torch.save, or not all of one" in tries(path.parent)


def test_a_torch_file_with_bytes_changed_is_read_or_refused(copied):
    path = copied("dictionary_learning/AutoEncoder") / "ae.pt"
    data = path.read_bytes()
    for i in range(60):
        damaged = bytearray(data)
        damaged[(i * 7919) % len(data)] ^= 0xFF
        path.write_bytes(damaged)
        tries(path.parent)


@pytest.mark.slow
def test_what_claims_to_be_larger_than_its_file_costs_nothing(tmp_path, copied):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    packed = zipfile.ZipFile(tmp_path / "params.npz", "w", zipfile.ZIP_DEFLATED)
    with packed as archive, archive.open("W_enc.npy", "w") as file:
        for _ in range(80):
            file.write(bytes(2**20))
    assert "would unpack to 83,886,080" in tries(tmp_path)
    path = copied("dictionary_learning/AutoEncoder") / "ae.pt"
    repeated = {"encoder.weight": torch.zeros(1).expand(2**20, 2**20)}
    torch.save(torch.load(path, weights_only=True) | repeated, path)
    assert "the file holds less than that" in tries(path.parent)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_an_array_whose_header_claims_terabytes_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive, archive.open("W_enc.npy", "w") as file:
        header = {"shape": (10**6, 10**6), "fortran_order": False, "descr": "<f4"}
        np.lib.format.write_array_header_1_0(file, header)
    assert "claims shape [1000000, 1000000]" in tries(tmp_path)


@pytest.mark.parametrize("folder", ["saelens/standard_layer_norm", "saelens/topk_constant_norm"])
def test_token_wise_normalisation_is_written_or_refused(folder, tmp_path):
    sae, x = load_sae(RECORDED / folder), 3 * torch.randn(20, D) + 1
    again = load_sae(save_sae(sae, tmp_path / "saelens", file_format="saelens"))
    torch.testing.assert_close(again(x), sae(x), atol=1e-5, rtol=1e-5)
    assert again.config.input_norm == sae.config.input_norm
    assert sae(torch.zeros(1, D)).isfinite().all()
    for file_format in ("ours", "dictionary_learning"):
        with pytest.raises(UserError, match=r"normalises each token .*convert it to saelens"):
            save_sae(sae, tmp_path / file_format, file_format=file_format)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["saelens"]


def test_a_writer_that_loses_something_leaves_nothing(tmp_path, monkeypatch):
    sae = load_sae(RECORDED / "saelens/topk_constant_norm")
    monkeypatch.setattr(type(sae), "save", SparseAutoencoder.save)
    del sae.config.extra["input_norm"]
    with pytest.raises(UserError, match=r"read back it gives other reconstructions on 6\d of 64 rows"):
        save_sae(sae, tmp_path / "sae")
    assert not list(tmp_path.iterdir())


def test_a_file_that_lost_its_normalisation_earlier_is_refused(tmp_path):
    SparseAutoencoder.save(load_sae(RECORDED / "saelens/topk_constant_norm"), tmp_path)
    with pytest.raises(UserError, match=r"this format does not hold that: convert .*topk_constant_norm' to saelens"):
        load_sae(tmp_path)
