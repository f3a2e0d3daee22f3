"""Only what the program wrote is removed, runs that have not ended are refused, and locks keep commands apart."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sae._files import temporary_name, write_json
from sae._run.contents import CHECKPOINTS, RUN, SAES, check_complete, check_contents, clean, remove
from sae._run.locks import LOCK_FILE, lock
from sae.errors import UserError
from sae.training.run_folder import RunFolder

SETTINGS = {"model": "m", "model_fingerprint": "1", "text": "t", "text_fingerprint": "2", "config": {"k": 4}}


def run_of(folder: Path, *sites: str, command: str = "train", **config: object) -> RunFolder:
    return RunFolder(folder, command, {**SETTINGS, "sites": list(sites), "config": SETTINGS["config"] | config})


def write_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def finished_run(folder: Path, *sites: str) -> None:
    run = run_of(folder, *sites)
    run.start(resume=False, overwrite=False)
    write_files(folder / "saes", "training.jsonl", "evaluation.json", *(f"{s}/sae.safetensors" for s in sites))
    run.finish()


@pytest.mark.parametrize(
    "name", ["thesis.tex", "checkpoints/llm_step_9000.pt", "saes/resid_0/notes.md", "checkpoints/step_00000001/x.pt"]
)
@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}, {}])
def test_a_folder_with_anything_else_is_refused_and_left_as_it_is(tmp_path, name, options):
    write_files(tmp_path, name)
    with pytest.raises(UserError, match=r"not written by this program|is not empty"):
        run_of(tmp_path, "resid_0").start(**{"resume": False, "overwrite": False} | options)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]


def test_checkpoints_of_no_recorded_run_are_neither_resumed_nor_removed(tmp_path):
    write_files(tmp_path, "checkpoints/step_00000012/state.json")
    with pytest.raises(UserError, match="no run of sfc train was begun"):
        run_of(tmp_path, "resid_0").start(resume=True, overwrite=False)
    with pytest.raises(UserError, match="does not name"):
        run_of(tmp_path, "resid_0").start(resume=False, overwrite=True)
    assert (tmp_path / "checkpoints" / "step_00000012" / "state.json").exists()


def test_overwriting_removes_what_the_run_before_recorded(tmp_path):
    finished_run(tmp_path, "resid_0", "mlp_0")
    run_of(tmp_path, "resid_0", k=8).start(resume=False, overwrite=True)
    assert not (tmp_path / "saes").exists()
    finished_run(tmp_path / "b", "resid_0")
    write_files(tmp_path / "b", "saes/mlp_3/sae.safetensors")
    with pytest.raises(UserError, match="mlp_3, which its config"):
        run_of(tmp_path / "b", "resid_0").start(resume=False, overwrite=True)
    assert (tmp_path / "b" / "saes" / "mlp_3" / "sae.safetensors").exists()


@pytest.mark.parametrize("n_events", range(1, 16))
def test_a_replacement_killed_anywhere_leaves_the_old_run_or_one_that_is_refused(tmp_path, monkeypatch, n_events):
    """And one that resumes to the new run, without anything of the old one."""

    class Killed(BaseException):
        pass

    finished_run(tmp_path, "resid_0", "mlp_0")
    events = 0
    for name in ("replace", "unlink", "rmdir"):
        original = getattr(os, name)

        def counted(*args, original=original, **options):
            nonlocal events
            events += 1
            if events == n_events:
                raise Killed
            return original(*args, **options)

        monkeypatch.setattr(os, name, counted)
    new = run_of(tmp_path, "resid_0", k=8)
    try:
        new.start(resume=False, overwrite=True)
        killed = False
    except Killed:
        killed = True
    monkeypatch.undo()
    assert killed == (n_events <= events)
    if killed and (tmp_path / "saes" / "mlp_0" / "sae.safetensors").exists():
        try:
            check_complete(tmp_path)
        except UserError as error:
            assert "--resume" in str(error)
        else:
            with pytest.raises(UserError, match="was begun with"):
                new.start(resume=True, overwrite=False)
            return
    new.start(resume=True, overwrite=False)
    with pytest.raises(UserError, match="has not ended"):
        check_complete(tmp_path / "saes")
    assert [path.name for path in tmp_path.rglob("*")] == ["config.json"]


def test_only_temporary_files_of_known_folders_are_cleaned(tmp_path):
    for folder in (tmp_path, tmp_path / "circuit", tmp_path / "saes" / "resid_0", tmp_path / "other"):
        write_files(folder, temporary_name(folder / "a.json").name, ".hidden", "b.tmp")
    clean(tmp_path)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob(".*.tmp*"))
    assert len(left) == 1 and left[0].startswith("other/")
    assert len(list(tmp_path.rglob(".hidden"))) == len(list(tmp_path.rglob("b.tmp"))) == 4


def test_links_are_not_followed(tmp_path):
    write_files(tmp_path / "mine", "training.jsonl")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "saes").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="'saes'"):
        check_contents(tmp_path / "run", RUN)
    remove(tmp_path / "run" / "saes", SAES)
    remove(tmp_path / "run", CHECKPOINTS)
    assert (tmp_path / "mine" / "training.jsonl").exists()


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    """A forked process holds the lock; when it dies the lock is gone."""
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with lock(tmp_path):
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            os.kill(os.getpid(), 9)
    os.read(ready[0], 1)
    for shared in (False, True):
        with pytest.raises(UserError, match="another command is writing"), lock(tmp_path, shared=shared):
            pass
    os.write(go[1], b"x")
    os.waitpid(child, 0)
    with lock(tmp_path), lock(tmp_path):
        pass
    for pipe in (*ready, *go):
        os.close(pipe)
    assert not list(tmp_path.iterdir())


def test_without_flock_a_file_says_who_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("sae._run.locks.fcntl", None)
    with lock(tmp_path):
        assert (tmp_path / LOCK_FILE).exists()
    assert not list(tmp_path.iterdir())
    node = os.uname().nodename
    (tmp_path / LOCK_FILE).write_text(f"{node} 4194305")  # no process has this number
    with lock(tmp_path):
        pass
    (tmp_path / LOCK_FILE).write_text(f"{node} {os.getpid()}")
    with pytest.raises(UserError, match="another command is writing"), lock(tmp_path):
        pass
    (tmp_path / LOCK_FILE).write_text("elsewhere 1")
    with pytest.raises(UserError, match="another command is writing"), lock(tmp_path):
        pass


def test_a_folder_made_for_nothing_goes(tmp_path):
    with pytest.raises(KeyboardInterrupt), lock(tmp_path / "new"):
        raise KeyboardInterrupt
    assert not (tmp_path / "new").exists()


def test_another_config_is_not_overwritten(tmp_path):
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    with pytest.raises(UserError, match="not the config of a run"):
        run_of(tmp_path, "resid_0").start(resume=False, overwrite=True)


def test_nothing_is_cleaned_of_a_folder_that_is_no_run(tmp_path):
    """Another program's unfinished files and empty folders stay; where a run is recorded, empty folders of it go."""
    write_files(tmp_path, ".notes.1a2b3c4d.tmp.md", "circuit/.thesis.0011aabb.tmp")
    for folder in ("checkpoints", "circuit/partial", "run/checkpoints", "run/circuit/partial"):
        (tmp_path / folder).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with lock(tmp_path):
        pass
    assert sorted(tmp_path.rglob("*")) == before
    write_json(tmp_path / "run" / "config.json", {"schema_version": 1, "discover": {}})
    with lock(tmp_path / "run"):
        pass
    assert [path.name for path in (tmp_path / "run").rglob("*") if path.is_dir()] == ["circuit"]


@pytest.mark.parametrize(
    "name", ["saes/evaluation.svg", "saes/evaluation_mine.json", "saes/evaluation.txt", "circuit/faithfulness.svg"]
)
def test_a_foreign_file_with_the_name_of_a_result_is_not_of_the_run(tmp_path, name):
    finished_run(tmp_path, "resid_0")
    write_json(tmp_path / "saes" / "evaluation.json", {"schema_version": 1, "files": {".txt": "of another text"}})
    write_files(tmp_path, name)
    if name.endswith(".json"):
        write_json(tmp_path / name, {"title": "mine"})
    with pytest.raises(UserError, match="not written by this program"):
        run_of(tmp_path, "resid_0", k=8).start(resume=False, overwrite=True)
    assert (tmp_path / name).exists() and (tmp_path / "saes" / "resid_0").exists()
