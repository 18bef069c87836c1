"""Errors of the system: a file's name and what to do in every one, whatever library met it.

Real ones where that is possible: /proc/self/mem opens and gives EIO, a process's limits stand for a machine's.
"""

import errno
import json
import os
import resource
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pipeline import artifacts
from pipeline.data import files
from pipeline.defences import recipes
from pipeline.engines.rank_files import RankFiles
from pipeline.engines.rank_files import write as write_rank
from pipeline.model import file_headers
from pipeline.model.weights import WeightFiles
from pipeline.system import system_errors
from pipeline.system.system_errors import (
    BrokenFile,
    behind,
    from_parts,
    naming,
    parts,
    passes,
    reading_input,
    sentence,
)

AGAIN = "run the same command again; finished stages and checkpoints are kept"
FULL = OSError(errno.ENOSPC, "No space left on device", "/runs/x")


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free space there, or name another folder (output_dir in the recipe"),
        (errno.EDQUOT, "free space there"),
        (errno.EROFS, "let this user read and write there"),
        (errno.EACCES, "let this user read and write there"),
        (errno.ENOENT, "bring it back if it was moved or unmounted"),
        (errno.ESTALE, "bring it back"),
        (errno.ENOTCONN, "bring it back"),
        (errno.ETIMEDOUT, "bring it back"),
        (errno.EIO, "see whether the disk or the network file system is sound"),
        (errno.EMFILE, "(ulimit -n)"),
        (errno.ENAMETOOLONG, "give shorter names (name and methods in the recipe)"),
        (errno.EISDIR, "move away what stands there"),
        (errno.ELOOP, "mend the links"),
    ],
)
def test_a_sentence_names_the_file_the_reason_and_what_to_do(number, advice):
    said = sentence(OSError(number, os.strerror(number), "/runs/demo/x"))
    assert (
        said.startswith(f"/runs/demo/x: {os.strerror(number)}: ")
        and advice in said
        and "\n" not in said
    )
    assert said.endswith(AGAIN)


def test_sentences_of_what_names_no_file_or_two_or_no_number():
    assert (
        sentence(OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"))
        == "a -> b: Invalid cross-device link"
    )
    assert sentence(OSError(errno.ENOSPC, "No space left on device")).startswith(
        "a file that is not named here: No space left on device: free space"
    )
    assert (
        sentence(OSError("cannot be loaded\nsecond line")) == "cannot be loaded"
        and sentence(OSError()) == "OSError"
    )
    no_temporary = FileNotFoundError(
        errno.ENOENT, "No usable temporary directory found in ['/nowhere']"
    )
    assert "['/nowhere']: set TMPDIR to a folder that can be written, and run" in sentence(
        no_temporary
    )


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "Connection refused"),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), "Connection timed out"),
        (
            socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
            "Name or service not known",
        ),
        # 1 is EPERM among files
        (ssl.SSLError(1, "CERTIFICATE_VERIFY_FAILED"), "CERTIFICATE_VERIFY_FAILED"),
    ],
)
def test_an_error_of_the_network_is_not_taken_for_a_files(error, reason):
    assert (
        sentence(error)
        == f"the network: {reason}: see whether this machine reaches the other side, and {AGAIN}"
    )


def test_a_working_folder_that_is_gone_is_named(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    with pytest.raises(FileNotFoundError) as gone:
        Path("recipe.yaml").absolute()
    assert (
        sentence(gone.value)
        == f"the working folder is gone: change to one that is there, and {AGAIN}"
    )


def raised(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (FULL, errno.ENOSPC),
        (Exception("No such file or directory (os error 2)"), errno.ENOENT),  # of tokenizers
        (
            SafetensorError('I/O error: File too large (os error 27) at path "/runs/.tmpA"'),
            errno.EFBIG,
        ),
        (OSError("No such device (os error 19)"), errno.ENODEV),
        (raised(RuntimeError("generating the data set"), FULL), errno.ENOSPC),
        (raised(RuntimeError("twice"), raised(KeyError("x"), FULL)), errno.ENOSPC),
        (
            raised(
                RuntimeError("no compiler"), FileNotFoundError(errno.ENOENT, "No such file", "g++")
            ),
            None,
        ),
        (RuntimeError("a fault of ours"), None),
        (ValueError("bad input"), None),
        (KeyboardInterrupt(), None),
        (__import__("io").UnsupportedOperation("fileno"), None),
    ],
)
def test_what_of_the_system_is_behind_an_exception(error, number):
    found = behind(error)
    assert (found and found.errno) == number


def test_an_error_that_was_met_while_another_was_handled_says_nothing():
    with pytest.raises(KeyError) as fault:
        try:
            raise FULL
        except OSError:
            {}["a fault of ours"]
    assert behind(fault.value) is None


def test_an_error_of_the_input_does_not_pass_and_one_of_the_machine_or_of_a_broken_file_does():
    assert passes(FULL) is FULL and passes(broken := BrokenFile("x is no whole file")) is broken
    assert (
        passes(FileNotFoundError(errno.ENOENT, "", "x"))
        is passes(OSError("401 Client Error"))
        is passes(ValueError("x"))
        is None
    )


def test_an_error_of_writing_gets_the_name_and_one_of_opening_keeps_its_own(tmp_path):
    with pytest.raises(OSError) as full, naming(tmp_path), Path("/dev/full").open("w") as stream:
        stream.write("x")
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(tmp_path))
    with pytest.raises(FileNotFoundError) as gone, naming(tmp_path):
        Path("/nowhere/x").touch()
    assert gone.value.filename == "/nowhere/x"


def folder_with_manifest(link: Path) -> object:
    link.rename(link.with_name(artifacts.MANIFEST))
    return artifacts.read_manifest(link.parent)


@pytest.mark.parametrize(
    "read",
    [
        artifacts.file_digest, files.read, recipes.load, folder_with_manifest,
        lambda path: file_headers.json_object("model.path x", path),
        lambda path: file_headers.safetensors_header("model.path x", path),
    ],
    ids=["digest", "data", "recipe", "manifest", "config", "weights"],
)  # fmt: skip
def test_an_error_of_reading_a_file_that_could_be_opened_names_it(
    tmp_path, read: Callable[[Path], object]
):
    link = tmp_path / "data.jsonl"
    link.symlink_to("/proc/self/mem")
    with pytest.raises(OSError) as found:
        read(link)
    assert found.value.errno == errno.EIO and Path(found.value.filename).parent == tmp_path


@pytest.mark.parametrize(
    ("limit", "number"),
    [(resource.RLIMIT_FSIZE, errno.EFBIG), (resource.RLIMIT_NOFILE, errno.EMFILE)],
)
def test_the_systems_errors_of_libraries_in_rust_are_known(tmp_path, limit, number):
    tensors, path = {"x": torch.zeros(1000)}, tmp_path / "x.safetensors"
    save_file(tensors, path)
    free = os.dup(0)
    os.close(free)
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (free if limit == resource.RLIMIT_NOFILE else 100, before[1]))
    try:
        with pytest.raises(OSError) as written, naming(tmp_path):
            save_file(tensors, tmp_path / "y.safetensors")
        read = None
        if limit == resource.RLIMIT_NOFILE:  # safetensors says that there is no such file
            with pytest.raises(OSError) as read:
                WeightFiles(tmp_path, "x")
    finally:
        resource.setrlimit(limit, before)
    assert (written.value.errno, written.value.filename) == (number, str(tmp_path))
    assert read is None or (read.value.errno, read.value.filename) == (number, str(path))


def test_a_file_in_a_folders_place_and_other_exceptions(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as found, naming(tmp_path):
        save_file({"x": torch.zeros(2)}, tmp_path / "file" / "x.safetensors")
    assert found.value.filename == str(tmp_path)
    with pytest.raises(RuntimeError, match="a fault of ours"), naming(tmp_path):
        raise RuntimeError("a fault of ours")


@pytest.mark.parametrize("content", [b"", b"\xff" * 300, None], ids=["emptied", "garbage", "cut"])
def test_a_checkpoints_file_that_is_not_whole_is_named(tmp_path, content):
    for rank in range(2):
        write_rank(tmp_path, rank, {"x": torch.zeros(1000)})
    path = tmp_path / "rank00001.safetensors"
    path.write_bytes(path.read_bytes()[:500] if content is None else content)
    with pytest.raises(BrokenFile) as broken, RankFiles(tmp_path):
        pass
    assert sentence(broken.value).startswith(
        f"{path} is not a complete weight file ("
    ) and sentence(broken.value).endswith(AGAIN)


def test_before_anything_runs_a_name_or_a_right_is_the_inputs_fault_and_a_disk_is_not(
    tmp_path, monkeypatch
):
    with pytest.raises(
        ValueError, match="File name too long: see whether the recipe names the right file"
    ):
        recipes.load(tmp_path / ("x" * 300))
    for number, kind in ((errno.EACCES, ValueError), (errno.EIO, OSError)):
        with pytest.raises(kind, match=os.strerror(number)), reading_input():
            raise OSError(number, os.strerror(number), "/data/task.jsonl")
    assert errno.ENOSPC not in system_errors.BY_THE_INPUT


def test_our_own_sentence_that_quotes_a_library_is_no_error_of_the_system():
    assert (
        behind(
            ValueError(
                "the tokenizer of model.path /m cannot be read (Permission denied (os error 13)): save it again"
            )
        )
        is None
    )
    with pytest.raises(ValueError, match=r"of model.path"), naming(Path("/runs/demo")):
        raise ValueError(
            "the tokenizer of model.path /m cannot be read (Permission denied (os error 13)): save it again"
        )


@pytest.mark.parametrize(
    "error",
    [
        BrokenFile("/m/a.safetensors is no whole file"),
        OSError("hub: 401"),
        socket.gaierror(-2, "Name or service not known"),
        OSError(28, "No space", "/x"),
    ],
)
def test_another_process_says_the_same(error):
    again = from_parts(json.loads(json.dumps(parts(error))))
    assert sentence(again) == sentence(error) and isinstance(again, BrokenFile) is isinstance(
        error, BrokenFile
    )
