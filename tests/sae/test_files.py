"""Files appear whole or not at all, and mistakes in them are told with file and line."""

from __future__ import annotations

import os
import resource
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from graphs._files import atomic_write as graphs_atomic_write
from sae._files import (
    TensorSpec,
    atomic_write,
    parse_json,
    prepare_folder,
    read_json,
    read_tensors,
    read_text,
    write_json,
    write_tensors,
)
from sae.errors import UserError, nearest, unknown


def test_crash_while_writing_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.json"
    write_json(target, {"x": 1})
    with pytest.raises(KeyboardInterrupt), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert read_json(target) == {"x": 1}
    assert [path.name for path in target.parent.iterdir()] == ["a.json"]


def test_new_file_replaces_the_old_one_and_keeps_its_suffix_meanwhile(tmp_path: Path) -> None:
    target = tmp_path / "weights.safetensors"
    target.write_text("old")
    with atomic_write(target) as temporary:
        assert temporary.suffix == ".safetensors" and temporary.parent == tmp_path
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"


@pytest.mark.parametrize("write", [atomic_write, graphs_atomic_write])
def test_a_file_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch, write) -> None:
    target, synced = tmp_path / "a.json", []
    target.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append((os.fstat(handle).st_ino, target.read_text())))
    with write(target) as temporary:
        temporary.write_text("new")
    assert synced[0] == (target.stat().st_ino, "old") and synced[-1] == (tmp_path.stat().st_ino, "new")


def test_unserialisable_object_leaves_the_old_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", [object()])
    assert read_json(tmp_path / "a.json", list[int]) == [1]


def test_malformed_json_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"a": 1,\n "b": }\n')
    with pytest.raises(UserError, match=r"bad\.json, line 2: malformed JSON"):
        read_json(tmp_path / "bad.json")


def test_missing_and_unreadable_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*none\.json"):
        read_json(tmp_path / "none.json")
    with pytest.raises(UserError, match="is a folder, not a file"):
        read_json(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'"\xe9"')
    with pytest.raises(UserError, match="not UTF-8"):
        read_json(tmp_path / "latin.json")


def test_text_beyond_ascii_survives(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"token": " über ☃"})
    assert read_json(tmp_path / "a.json") == {"token": " über ☃"}


def test_folder_with_contents_is_refused_without_overwrite(tmp_path: Path) -> None:
    folder = prepare_folder(tmp_path / "run" / "one", overwrite=False)
    assert folder.is_dir()
    assert prepare_folder(folder, overwrite=False) == folder
    (folder / "a").write_text("kept")
    with pytest.raises(UserError, match="is not empty"):
        prepare_folder(folder, overwrite=False)
    prepare_folder(folder, overwrite=True)
    assert (folder / "a").read_text() == "kept"
    with pytest.raises(UserError, match="is a file"):
        prepare_folder(folder / "a", overwrite=True)


def test_unknown_names_offer_the_nearest() -> None:
    assert nearest("RESID_3", ["resid_3", "mlp_3"]) == ["resid_3"]
    assert str(unknown("site", "resd_3", ["mlp_3", "resid_3"])) == (
        "unknown site 'resd_3': allowed are mlp_3, resid_3; did you mean 'resid_3'?"
    )
    assert "did you mean" not in str(unknown("method", "zzz", ["ig", "exact"]))
    assert "(88 more)" in str(unknown("feature", "x", [str(i) for i in range(100)]))


def test_a_disk_that_is_full_is_one_sentence_and_the_old_file_stays(tmp_path):
    """A limit on file sizes does what a full disk does."""
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"x": torch.zeros(10)})
    before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write '.*x\.safetensors': .*written before is whole"):
            write_tensors(path, {"x": torch.zeros(50_000)})
        with pytest.raises(UserError, match=r"cannot write '.*y\.json'"):
            write_json(tmp_path / "y.json", ["long"] * 50_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    x = torch.eye(2)
    write_tensors(tmp_path / "a.safetensors", {"x": x, "y": x, "row": x[0]})
    assert {name: tensor.tolist() for name, tensor in read_tensors(tmp_path / "a.safetensors").items()} == {
        "x": x.tolist(), "y": x.tolist(), "row": [1, 0],
    }  # fmt: skip


def test_new_files_have_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    write_json(tmp_path / "a.json", [])
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": "3"}, "key 'a' is \"3\": expected a valid integer"),
        ({}, "key 'a' is missing"),
        ([], r"found \[\]: expected an object"),
    ],
)
def test_json_of_another_schema_names_file_key_and_value(tmp_path: Path, value: object, message: str) -> None:
    @dataclass
    class Schema:
        a: int

    write_json(tmp_path / "a.json", value)
    with pytest.raises(UserError, match=rf"a\.json: {message}"):
        read_json(tmp_path / "a.json", Schema)


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5_000])
def test_json_that_python_cannot_hold_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"a\.json"):
        parse_json(text, "a.json")


def test_devices_are_refused_and_pipes_are_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a device"):
        read_text("/dev/zero")
    reading, writing = os.pipe()
    os.write(writing, b'{"a": NaN}')
    os.close(writing)
    assert read_json(f"/dev/fd/{reading}") == {"a": None}
    os.close(reading)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TensorSpec((2, 2)), r"has shape \[2, 3\], expected \[2, 2\]"),
        (TensorSpec(("n", "n")), "has shape"),
        (TensorSpec((6,)), "has shape"),
        (TensorSpec((2, 3), "int"), "is float32, expected int numbers"),
        (TensorSpec((2, 3)), "not finite"),
    ],
)
def test_tensors_are_checked(tmp_path: Path, spec: TensorSpec, message: str) -> None:
    write_tensors(tmp_path / "a.safetensors", {"x": torch.full((2, 3), torch.nan)})
    with pytest.raises(UserError, match=rf"a\.safetensors: tensor 'x' {message}|{message}"):
        read_tensors(tmp_path / "a.safetensors", {"x": spec})
    with pytest.raises(UserError, match="tensor 'y' is missing"):
        read_tensors(tmp_path / "a.safetensors", {"y": spec})


def test_json_that_is_written_has_no_nan_and_takes_any_text(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [float("nan"), (float("inf"), 1.5)], "name": "a\udc80"})
    assert read_json(tmp_path / "a.json", dict[str, Any]) == {"x": [None, [None, 1.5]], "name": "a\ufffd"}
    assert "NaN" not in (tmp_path / "a.json").read_text()


@pytest.mark.parametrize("text", ["[" * 500 + "]" * 500, '{"a": ' * 300 + "1" + "}" * 300])
def test_deep_json_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="nested too deeply"):
        parse_json(text, "a.json", dict[str, Any] if text[0] == "{" else list[Any])


def test_a_number_beyond_floats_is_undefined() -> None:
    assert parse_json('{"a": 1e999, "b": -1e999}', "a.json") == {"a": None, "b": None}
