"""Whatever becomes of a published folder is called damage, in a sentence:
other bytes, other shapes, files more or fewer, links.
"""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import artifacts
from tests.unit.artifacts.test_artifacts import published

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["files", "data.txt", "bytes", "sha256", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'"x"',
        b'{"files": []}',
        b'{"files": {"data.txt": 5}}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_manifest_of_any_shape_is_damage_and_not_an_exception(tmp_path, content):
    folder = published(tmp_path / "stage")
    (folder / artifacts.MANIFEST).write_bytes(content)
    assert str(folder / artifacts.MANIFEST) in artifacts.damage(folder)


@QUICK
@given(value=JSON, marked=st.booleans())
def test_no_json_in_a_manifest_s_place_passes_or_raises(tmp_path_factory, value, marked):
    folder = published(tmp_path_factory.mktemp("any") / "stage")
    (folder / artifacts.MANIFEST).write_text(json.dumps(value))
    if not marked:
        (folder / artifacts.MARKER).write_text("")  # as an older version left it
    assert isinstance(artifacts.damage(folder), str)


@QUICK
@given(data=st.data())
def test_one_bit_anywhere_is_noticed(tmp_path_factory, data):
    folder = published(tmp_path_factory.mktemp("bit") / "stage")
    path = folder / data.draw(
        st.sampled_from(["data.txt", artifacts.FACTS, artifacts.MANIFEST, artifacts.MARKER])
    )
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content.rstrip()) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    assert artifacts.damage(folder) is not None


@pytest.mark.parametrize("name", ["more.txt", "inner/more.txt", ".hidden"])
def test_a_file_that_is_not_listed_is_damage(tmp_path, name):
    folder = published(tmp_path / "stage")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    with pytest.raises(ValueError, match=f"{name} is not in .*{artifacts.MANIFEST}"):
        artifacts.verify(folder)
    assert artifacts.verify(folder, "data.txt")["note"] == "x", "what is read is sound"


def test_what_a_network_file_system_keeps_of_a_deleted_file_is_no_damage(tmp_path):
    folder = published(tmp_path / "stage")
    (folder / ".nfs000001").write_text("x")
    artifacts.verify(folder)


@pytest.mark.parametrize("listed", [True, False])
def test_a_link_is_damage_even_to_the_same_bytes(tmp_path, listed):
    folder = published(tmp_path / "stage")
    outside = tmp_path / "outside.txt"
    outside.write_text("content")
    path = folder / ("data.txt" if listed else "more.txt")
    path.unlink(missing_ok=True)
    path.symlink_to(outside)
    assert artifacts.damage(folder) == f"{path} is a link, or leads out of the folder"


def test_a_name_that_leads_out_of_the_folder_is_damage(tmp_path):
    folder = published(tmp_path / "stage")
    (tmp_path / "outside.txt").write_text("content")
    manifest = json.loads((folder / artifacts.MANIFEST).read_text())
    manifest["files"]["../outside.txt"] = manifest["files"]["data.txt"]
    (folder / artifacts.MANIFEST).write_text(json.dumps(manifest))
    (folder / artifacts.MARKER).write_text("")
    assert "leads out of the folder" in artifacts.damage(folder)


def test_one_file_is_checked_by_its_name(tmp_path):
    folder = published(tmp_path / "stage")
    (folder / artifacts.FACTS).write_text('{"samples": 4}')
    artifacts.verify(folder, "data.txt")
    with pytest.raises(ValueError, match=r"facts.json does not match"):
        artifacts.verify(folder, "data.txt", artifacts.FACTS)
    with pytest.raises(ValueError, match=r"does not list other.txt"):
        artifacts.verify(folder, "other.txt")


def test_a_key_signs_what_is_published(tmp_path, monkeypatch):
    unsigned = published(tmp_path / "unsigned")
    monkeypatch.setenv("SAP_SIGNING_KEY", "a key")
    signed = published(tmp_path / "signed")
    artifacts.verify(signed)
    with pytest.raises(ValueError, match="not signed with the SAP_SIGNING_KEY"):
        artifacts.verify(unsigned)
    forged = json.loads((signed / artifacts.MANIFEST).read_text()) | {"note": "forged"}
    artifacts.write_json(signed / artifacts.MANIFEST, forged)
    monkeypatch.delenv("SAP_SIGNING_KEY")
    marks = artifacts._marks((signed / artifacts.MANIFEST).read_bytes())
    old = (signed / artifacts.MARKER).read_text().splitlines()
    (signed / artifacts.MARKER).write_text("\n".join([*marks, old[1]]))
    artifacts.verify(signed)  # without the key, who writes file and manifest and marker is believed
    monkeypatch.setenv("SAP_SIGNING_KEY", "a key")
    with pytest.raises(ValueError, match="not signed"):
        artifacts.verify(signed)
    assert "a key" not in (signed / artifacts.MARKER).read_text()


class Recorded:
    """A file system that notes what reaches the disk, and when the names appear."""

    def __init__(self, monkeypatch):
        self.events: list[tuple[str, str]] = []
        opened, synced, moved, replaced = os.open, os.fsync, Path.rename, Path.replace
        names: dict[int, str] = {}

        def open_(path, *args, **kwargs):
            descriptor = opened(path, *args, **kwargs)
            names[descriptor] = str(path)
            return descriptor

        def fsync(descriptor):
            self.events.append(
                ("disk", names.get(descriptor, str(Path(f"/proc/self/fd/{descriptor}").readlink())))
            )
            synced(descriptor)

        def noted(original, kind):
            def move(path, target):
                self.events.append((kind, str(target)))
                return original(path, target)

            return move

        monkeypatch.setattr(artifacts.os, "open", open_)
        monkeypatch.setattr(artifacts.os, "fsync", fsync)
        monkeypatch.setattr(Path, "rename", noted(moved, "name"))
        monkeypatch.setattr(Path, "replace", noted(replaced, "name"))

    def place(self, kind: str, path: Path) -> int:
        return max(place for place, event in enumerate(self.events) if event == (kind, str(path)))


def test_everything_is_on_the_disk_before_the_folder_has_its_name_and_the_name_before_the_mark(
    tmp_path, monkeypatch
):
    target, temporary = tmp_path / "stage", tmp_path / ".stage.tmp"
    recorded = Recorded(monkeypatch)
    with artifacts.building(target, {}) as folder:
        (folder / "inner" / "deep").mkdir(parents=True)
        for name in ("data.txt", "inner/a.txt", "inner/deep/b.txt"):
            (folder / name).write_text(name)
    named = recorded.place("name", target)
    before = ["data.txt", "inner/a.txt", "inner/deep/b.txt", "inner/deep", "inner", ""]
    places = [recorded.place("disk", temporary / name) for name in before]
    assert places == sorted(places) and places[-1] < named, (
        "files, then folders from within, then the name"
    )
    marked = recorded.place("name", target / artifacts.MARKER)
    assert named < recorded.place("disk", tmp_path) < marked < recorded.place("disk", target)


def made(tmp_path, name: str, text: str, **inputs) -> Path:
    if (tmp_path / name).exists():
        shutil.rmtree(tmp_path / name)
    with artifacts.building(tmp_path / name, inputs) as folder:
        (folder / "data.txt").write_text(text)
        (folder / "metrics.jsonl").write_text(str(time.time_ns()))
    return tmp_path / name


def test_what_was_made_from_another_content_of_a_folder_is_not_mixed_with_the_new_one(tmp_path):
    """Data are prepared again, by another version of a library: a model that was trained on the old ones is not
    evaluated as if it knew the new.
    """
    prepared = made(tmp_path, "prepare-1", "old")
    trained = made(tmp_path, "train-1", "weights", prepare=artifacts.source(prepared))
    made(tmp_path, "prepare-1", "old")  # again the same, at another time
    artifacts.verify(trained)
    made(tmp_path, "prepare-1", "new")
    with pytest.raises(
        ValueError,
        match=f"{trained} was made from another content of {prepared}: delete {trained} and run its stage again",
    ):
        artifacts.verify(trained, "data.txt")
    shutil.rmtree(prepared)
    artifacts.verify(trained)  # what it was made from may be gone
