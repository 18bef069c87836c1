"""Errors of the system: a file's name and what to do in every one, whatever library met it."""

import errno
import os

import pytest
import torch
from safetensors.torch import save_file

from pipeline import recipe, system_errors
from pipeline.system_errors import reading_input, sentence, writing


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free space there, or name another folder (output_dir in the recipe"),
        (errno.EDQUOT, "free space there"),
        (errno.EROFS, "let this user read and write there"),
        (errno.EACCES, "let this user read and write there"),
        (errno.ENOENT, "bring it back if it was moved or unmounted"),
        (errno.ESTALE, "bring it back"),
        (errno.EIO, "see whether the disk or the network file system is sound"),
        (errno.EMFILE, "(ulimit -n)"),
    ],
)
def test_a_sentence_names_the_file_the_reason_and_what_to_do(number, advice):
    said = sentence(OSError(number, os.strerror(number), "/runs/demo/x"))
    assert said.startswith(f"/runs/demo/x: {os.strerror(number)}: ") and advice in said and "\n" not in said
    assert said.endswith("run the same command again; finished stages and checkpoints are kept")


def test_sentences_of_what_names_no_file_or_two_or_no_number():
    assert sentence(OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b")) == "a -> b: Invalid cross-device link"
    assert sentence(OSError(errno.ENOSPC, "No space left on device")).startswith("a file that is not named here: No space left on device: free space")
    assert sentence(OSError("cannot be loaded\nsecond line")) == "cannot be loaded" and sentence(OSError()) == "OSError"
    no_temporary = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/nowhere']")
    assert "['/nowhere']: set TMPDIR to a folder that can be written, and run" in sentence(no_temporary)


def test_an_error_of_writing_gets_the_name_and_one_of_opening_keeps_its_own(tmp_path):
    with pytest.raises(OSError) as full, writing(tmp_path), open("/dev/full", "w") as stream:
        stream.write("x")
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(tmp_path))
    with pytest.raises(FileNotFoundError) as gone, writing(tmp_path):
        open("/nowhere/x", "w")
    assert gone.value.filename == "/nowhere/x"


def test_the_systems_errors_of_libraries_in_rust_are_known_and_others_pass(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as found, writing(tmp_path):
        save_file({"x": torch.zeros(2)}, tmp_path / "file" / "x.safetensors")
    assert found.value.filename == str(tmp_path)
    with pytest.raises(RuntimeError, match="a fault of ours"), writing(tmp_path):
        raise RuntimeError("a fault of ours")


def test_before_anything_runs_a_name_or_a_right_is_the_inputs_fault_and_a_disk_is_not(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="File name too long: see whether the recipe names the right file"):
        recipe.load(tmp_path / ("x" * 300))
    for number, kind in ((errno.EACCES, ValueError), (errno.EIO, OSError)):
        with pytest.raises(kind, match=os.strerror(number)), reading_input():
            raise OSError(number, os.strerror(number), "/data/task.jsonl")
    assert errno.ENOSPC not in system_errors.BY_THE_INPUT
