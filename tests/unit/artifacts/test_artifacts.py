"""Folders that exist completely or not at all, and one writer at a time."""

import errno
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import artifacts


def published(folder):
    with artifacts.building(folder, {"recipe": "abc"}, note="x") as temporary:
        (temporary / "data.txt").write_text("content")
        artifacts.write_json(temporary / artifacts.FACTS, {"samples": 3})
    return folder


def test_the_manifest_holds_sizes_digests_inputs_versions_and_facts(tmp_path):
    manifest = artifacts.verify(published(tmp_path / "stage"))
    assert manifest["files"]["data.txt"] == {
        "bytes": 7,
        "sha256": artifacts.file_digest(tmp_path / "stage" / "data.txt"),
    }
    assert (
        manifest["inputs"] == {"recipe": "abc"}
        and manifest["facts"] == {"samples": 3}
        and manifest["note"] == "x"
    )
    assert "torch" in manifest["versions"] and "git_revision" in manifest
    assert [path.name for path in tmp_path.iterdir()] == ["stage"], (
        "no lock and no temporary folder stays"
    )


def test_a_failure_leaves_nothing_and_frees_the_target(tmp_path):
    with pytest.raises(RuntimeError), artifacts.building(tmp_path / "stage", {}) as temporary:
        (temporary / "half.txt").write_text("ha")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    published(tmp_path / "stage")


@pytest.mark.parametrize("harm", ["change", "remove", "no manifest", "no marker"])
def test_damage_is_named(tmp_path, harm):
    folder = published(tmp_path / "stage")
    if harm == "change":
        (folder / "data.txt").write_text("CONTENT")
    else:
        (
            folder
            / {
                "remove": "data.txt",
                "no manifest": artifacts.MANIFEST,
                "no marker": artifacts.MARKER,
            }[harm]
        ).unlink()
    expected = {
        "change": "does not match",
        "remove": "is missing",
        "no manifest": "cannot be read",
        "no marker": "is not complete",
    }[harm]
    with pytest.raises(ValueError, match=f"{expected}.*run"):
        artifacts.verify(folder)


def test_one_writer_at_a_time(tmp_path):
    release = artifacts.claim(tmp_path / "stage")
    with pytest.raises(ValueError, match="another process is writing"):
        artifacts.claim(tmp_path / "stage")
    artifacts.claim(tmp_path / "other")()
    release()
    artifacts.claim(tmp_path / "stage")()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE])
def test_a_lock_that_was_given_up_meanwhile_is_another_one_s(tmp_path, monkeypatch, number):
    """Over NFS its file is not missing but stale."""
    stat = Path.stat

    def gone(path, **given):
        if path.suffix == ".lock":
            raise OSError(number, os.strerror(number), str(path))
        return stat(path, **given)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", gone)
        with pytest.raises(artifacts.Busy, match="another process is writing"):
            artifacts.claim(tmp_path / "stage")
    artifacts.claim(tmp_path / "stage")()


def test_who_needs_a_folder_waits_for_its_writer(tmp_path):
    target = tmp_path / "stage"
    with ThreadPoolExecutor(1) as pool:
        with artifacts.building(target, {}) as folder:
            (folder / "data.txt").write_text("content")
            waiting = pool.submit(artifacts.claim_unless_complete, target)
            with pytest.raises(artifacts.Busy):
                artifacts.claim_unless_complete(target, seconds=0)
            assert not waiting.done()
        assert waiting.result() is None, "complete: there is nothing to claim"


def test_who_needs_a_folder_takes_over_where_its_writer_failed(tmp_path):
    target = tmp_path / "stage"
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(RuntimeError), artifacts.building(target, {}):
            waiting = pool.submit(artifacts.claim_unless_complete, target)
            raise RuntimeError
        claimed = waiting.result()
    with artifacts.building(target, {}, claimed) as folder:
        (folder / "data.txt").write_text("content")
    artifacts.verify(target)
    assert [path.name for path in tmp_path.iterdir()] == ["stage"], "the lock is gone"


def test_an_interrupted_publish_is_done_again(tmp_path):
    folder = published(tmp_path / "stage")
    (folder / artifacts.MARKER).unlink()  # the machine died between the rename and the marker
    (folder / "stray.txt").write_text("old")
    artifacts.verify(published(folder))
    assert not (folder / "stray.txt").exists()


def test_writes_of_small_files_are_atomic(tmp_path):
    artifacts.write_json(tmp_path / "a.json", {"b": 1})
    artifacts.write_json(tmp_path / "a.json", {"b": 2})
    assert (
        json.loads((tmp_path / "a.json").read_text()) == {"b": 2}
        and len(list(tmp_path.iterdir())) == 1
    )


def test_a_manifest_that_this_machine_cannot_read_is_not_called_damaged(tmp_path):
    folder = published(tmp_path / "stage")
    (folder / artifacts.MANIFEST).unlink()
    assert "cannot be read (FileNotFoundError)" in artifacts.damage(folder)
    # stands for an I/O error: open() fails, and not because the file is missing
    (folder / artifacts.MANIFEST).mkdir()
    with pytest.raises(OSError):
        artifacts.damage(folder)


def test_a_full_disk_names_the_folder_that_was_written_and_leaves_nothing(tmp_path):
    with pytest.raises(OSError) as full, artifacts.building(tmp_path / "stage", {}):
        # as write() and pyarrow say it: without a name
        raise OSError(errno.ENOSPC, "No space left on device")
    assert full.value.filename == str(tmp_path / "stage") and not list(tmp_path.iterdir())


def test_a_small_file_that_meets_a_full_disk_keeps_its_old_content(tmp_path, monkeypatch):
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    artifacts.write_text(tmp_path / "state.json", "old")
    monkeypatch.setattr(artifacts.os, "fsync", full)
    with pytest.raises(OSError) as found:
        artifacts.write_text(tmp_path / "state.json", "new")
    assert found.value.filename == str(tmp_path / "state.json")
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"] and (
        tmp_path / "state.json"
    ).read_text() == "old"


def test_a_folder_that_can_be_written_is_tried_and_left_as_it_was(tmp_path):
    before = tmp_path.stat().st_mtime_ns
    artifacts.check_writable(tmp_path / "runs" / "demo", "output_dir")
    assert not list(tmp_path.iterdir()) and tmp_path.stat().st_mtime_ns == before
    assert artifacts.free_bytes(tmp_path / "runs" / "demo", "output_dir") == pytest.approx(
        shutil.disk_usage(tmp_path).free, rel=0.5
    )


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("file/runs", r"because \S+/file is not a folder"),
        ("/proc/runs", r"\(/proc: "),
        ("x" * 300, "File name too long"),
        ("link/runs", r"because \S+/link is not a folder"),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused_by_the_fields_name(tmp_path, folder, reason):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=rf"^output_dir .*{reason}.*: set output_dir to another"):
        artifacts.check_writable(tmp_path / folder, "output_dir")


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EROFS, ValueError),
        (errno.EACCES, ValueError),
        (errno.ENOSPC, OSError),
        (errno.ESTALE, OSError),
    ],
)
def test_a_full_disk_is_no_wrong_folder_and_a_read_only_one_is(tmp_path, monkeypatch, number, kind):
    def refuse(**_: object) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path))

    monkeypatch.setattr(artifacts.tempfile, "TemporaryFile", refuse)
    with pytest.raises(kind, match=os.strerror(number)):
        artifacts.check_writable(tmp_path / "runs", "output_dir")
