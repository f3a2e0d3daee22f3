"""Files appear whole or not at all, and mistakes in them are told with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae.errors import UserError, nearest, unknown
from sae.files import atomic_write, prepare_folder, read_json, write_json


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


def test_unserialisable_object_leaves_the_old_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", [object()])
    assert read_json(tmp_path / "a.json") == [1]


def test_malformed_json_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"a": 1,\n "b": }\n')
    with pytest.raises(UserError, match=r"bad\.json, line 2: malformed JSON"):
        read_json(tmp_path / "bad.json")


def test_missing_and_unreadable_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*none\.json"):
        read_json(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot read"):
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
