"""Delivery: every store gets every entry once, whatever dies, hangs, moves or is deleted meanwhile,
and nobody waits for it.
"""

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import cli
from pipeline.running import runner
from pipeline.tracking import mlflow_store
from pipeline.tracking import run as tracking
from pipeline.tracking.run import open_run
from tests.project import ROOT, quiet
from tests.stores import Store, closed_port, layout_in, outbox, tracked_project, until

TOKEN = "hf_PLANTEDsecret0123456789"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> tuple[Path, dict]:
    return tracked_project(tmp_path_factory.mktemp("tracking"))


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """On a busy machine a delivery may need longer than a stage would wait for."""
    monkeypatch.setattr(tracking, "_CLOSE_SECONDS", 300.0)


def test_a_dead_server_costs_no_time_and_one_warning_and_is_caught_up_later(
    project, tmp_path, monkeypatch, capfd
):
    layout, losses = layout_in(project, tmp_path), [(step, 1.0 / step) for step in range(1, 41)]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port()}")
    asked, real = [], tracking.Store

    def asked_by(*given):
        asked.append(threading.current_thread().name)
        return real(*given)

    monkeypatch.setattr(tracking, "Store", asked_by)
    with open_run(layout, "sft-s0", "train-1", cell=layout.experiment.cell("sft", 0)) as run:
        for step, loss in losses:
            run.log_metrics({"train/loss": loss}, step)
        # the failure happens while the run goes on
        until(lambda: bool(asked) and run.sender._name() in tracking._warned)
        run.log_metrics({"train/loss": 0.5}, 41)
    assert set(asked) == {"mlflow"}, "the training asks for nothing itself"
    error = capfd.readouterr().err
    assert (
        error.lower().count("warning") == 1
        and "is not reached" in error
        and "entries wait in" in error
        and "Traceback" not in error
    )
    waiting = (layout.root / "tracking" / "train-1.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in waiting] == ["start", *["metrics"] * 41, "end"]

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with open_run(layout, "report", "report-1"):
        pass
    store = Store(layout)
    assert store.history("train-1", "train/loss") == [*losses, (41, 0.5)]
    assert store.run("train-1").info.status == "FINISHED"
    store.client.delete_run(store.run("train-1").info.run_id)
    with open_run(layout, "report", "report-2"):
        pass
    assert "train-1" not in {run.data.tags["sap.run_key"] for run in Store(layout).runs}, (
        "what was delivered is not sent again"
    )
    assert "warning" not in capfd.readouterr().err.lower()


TWO_PROCESSES = """
import sys, time
from pathlib import Path
import mlflow, mlflow.store.tracking.sqlalchemy_store
from pipeline.defences import recipes
from pipeline.stages.layout import Layout
from pipeline.tracking import run as tracking
from pipeline.tracking.run import open_run

tracking._CLOSE_SECONDS = 300.0  # two that make a store at once may need longer than a stage would wait for
layout, key, ready = Layout(recipes.load(sys.argv[1])), sys.argv[2], Path(sys.argv[3])
(ready / key).touch()
while len(list(ready.iterdir())) < 2:
    time.sleep(0.01)
with open_run(layout, key, key) as run:
    run.log_metrics({"train/loss": 1.0}, 1)
"""


def test_two_processes_share_a_fresh_store(project, tmp_path):
    layout = layout_in(project, tmp_path / "shared", fresh=True)
    (tmp_path / "ready").mkdir()
    command = [sys.executable, "-c", TWO_PROCESSES, str(layout.experiment.path)]
    processes = [
        subprocess.Popen(
            [*command, key, str(tmp_path / "ready")],
            cwd=ROOT,
            env=quiet(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for key in ("train-1", "train-2")
    ]
    errors = [process.communicate(timeout=900)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0] and not "".join(errors).strip()
    store = Store(layout)
    assert len(store.runs) == 3 and store.parent.info.status == "FINISHED"
    assert [store.history(key, "train/loss") for key in ("train-1", "train-2")] == [[(1, 1.0)]] * 2


def test_another_store_gets_everything_and_the_first_one_nothing_twice(
    project, tmp_path, monkeypatch
):
    layout, other = (
        layout_in(project, tmp_path / "out"),
        shutil.copy(project[0] / "empty.db", tmp_path / "other.db"),
    )
    with open_run(layout, "sft-s0", "train-1") as run:
        for step in (1, 2):
            run.log_metrics({"train/loss": 1.0 / step}, step)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    with open_run(layout, "sft-s0", "train-1") as run:
        run.log_metrics({"train/loss": 0.25}, 4)
    assert Store(layout, other).history("train-1", "train/loss") == [(1, 1.0), (2, 0.5), (4, 0.25)]
    first = Store(layout)
    assert first.history("train-1", "train/loss") == [(1, 1.0), (2, 0.5)]
    # a row that a new run would not have
    first.client.log_metric(first.run("train-1").info.run_id, "train/loss", 9.0, step=9)

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    sent: list[int] = []
    monkeypatch.setattr(mlflow_store.Store, "_send", spy(mlflow_store.Store._send, sent))
    with open_run(layout, "report", "report-1"):
        pass
    assert Store(layout).history("train-1", "train/loss") == [
        (1, 1.0),
        (2, 0.5),
        (4, 0.25),
        (9, 9.0),
    ]
    assert sent == [4], "what the first store has is not even sent again"


def spy(send: Callable, sent: list[int]) -> Callable:
    """_send that notes the steps of the metrics it is given."""

    def noting(self, path, entries, state):
        sent.extend(entry["step"] for entry in entries if entry["kind"] == "metrics")
        send(self, path, entries, state)

    return noting


def test_every_store_gets_every_event_once(project, tmp_path, monkeypatch):
    """To another store, after a kill between a request and its mark, and for a run that was deleted:
    the same number, the same time.
    """
    layout, other = (
        layout_in(project, tmp_path / "out"),
        shutil.copy(project[0] / "empty.db", tmp_path / "other.db"),
    )
    with open_run(layout, "sft-s0", "train-1") as run:
        run.log_metrics({"train/loss": 1.0}, 2)
        run.event("stopped at step 2")
    first = events(Store(layout))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    time.sleep(1.1)  # a time that was taken at delivery would be another one
    with open_run(layout, "sft-s0", "train-1") as run:
        run.event("resumed at step 2")
    second = events(Store(layout, other))
    assert (
        list(first) == ["event.001"]
        and list(second) == ["event.001", "event.002"]
        and second.items() > first.items()
    )

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with open_run(layout, "report", "report-1"):
        pass
    assert events(Store(layout)) == second
    outbox(layout, "train-1").with_suffix(".delivered").unlink()
    with open_run(layout, "report", "report-1"):
        pass
    store = Store(layout)
    assert events(store) == second and store.history("train-1", "train/loss") == [(2, 1.0)], (
        "what is sent again changes nothing"
    )

    store.client.delete_run(store.run("train-1").info.run_id)
    with open_run(layout, "sft-s0", "train-1") as run:
        run.event("stopped at step 3")
    third = events(Store(layout))
    assert list(third) == ["event.001", "event.002", "event.003"] and third.items() > second.items()


def events(store: Store) -> dict[str, str]:
    """The events of train-1, by the names of their tags."""
    return {
        name: value
        for name, value in sorted(store.run("train-1").data.tags.items())
        if name.startswith("event.")
    }


@pytest.mark.parametrize("database", ["deleted", "moved along"])
def test_a_database_that_is_gone_is_filled_again(project, tmp_path, monkeypatch, database):
    """A moved experiment is a store at another address: its own database is known again,
    a missing one is filled from the start.
    """
    layout, moved = (
        layout_in(project, tmp_path / "out"),
        layout_in(project, tmp_path / "moved", fresh=True),
    )
    for key in ("train-1", "train-2"):
        with open_run(layout, "sft-s0", key) as run:
            run.log_metrics({"train/loss": 1.0}, 1)
    shutil.copytree(tmp_path / "out", tmp_path / "moved")
    if database == "deleted":
        (tmp_path / "moved" / "mlflow.db").unlink()
    sent: list[int] = []
    monkeypatch.setattr(mlflow_store.Store, "_send", spy(mlflow_store.Store._send, sent))
    with open_run(moved, "sft-s0", "train-1") as run:
        run.log_metrics({"train/loss": 0.5}, 2)
    store = Store(moved)
    assert store.history("train-1", "train/loss") == [(1, 1.0), (2, 0.5)] and store.history(
        "train-2", "train/loss"
    ) == [(1, 1.0)]
    assert len(store.runs) == 3 and sorted(sent) == ([1, 1, 2] if database == "deleted" else [2])


def test_a_run_deleted_while_it_goes_on_is_written_again(project, tmp_path):
    layout = layout_in(project, tmp_path)
    with open_run(layout, "sft-s0", "train-1") as run:
        run.log_metrics({"train/loss": 1.0}, 1)
        until(lambda: outbox(layout, "train-1").with_suffix(".delivered").is_file())
        store = Store(layout)
        store.client.delete_run(store.run("train-1").info.run_id)
        run.log_metrics({"train/loss": 0.5}, 2)
    assert Store(layout).history("train-1", "train/loss") == [(1, 1.0), (2, 0.5)]


@pytest.mark.parametrize(
    "rest", [b'{"kind": "metrics", "val', b'{"kind": "metr\n', b"\x00\xff\x00\n", b"7\n\n"]
)
def test_half_a_line_costs_itself_only(project, tmp_path, rest, capfd):
    """A process was killed, or the disk was full, inside a write."""
    layout = layout_in(project, tmp_path)
    with open_run(layout, "sft-s0", "a-train") as run:
        run.log_metrics({"train/loss": 1.0}, 1)
    with outbox(layout, "a-train").open("ab") as stream:
        stream.write(rest)
    with open_run(layout, "sft-s0", "a-train") as run:
        run.log_metrics({"train/loss": 0.5}, 2)
        with outbox(layout, "a-train").open("ab") as stream:
            stream.write(rest)
        run.log_metrics({"train/loss": 0.25}, 3)
    with open_run(layout, "sap-s0", "b-train") as run:
        run.log_metrics({"train/loss": 1.0}, 1)
    store = Store(layout)
    assert store.history("a-train", "train/loss") == [
        (1, 1.0),
        (2, 0.5),
        (3, 0.25),
    ] and store.history("b-train", "train/loss") == [(1, 1.0)]
    assert "warning" not in capfd.readouterr().err


def test_what_the_store_refuses_keeps_nothing_else_waiting(project, tmp_path, capfd):
    layout = layout_in(project, tmp_path)
    with open_run(layout, "sft-s0", "a-train") as run:
        run.log_metrics({"no ? name": 1.0}, 1)
        with open_run(layout, "sap-s0", "b-train") as other:
            other.log_metrics({"train/loss": 1.0}, 1)
    assert Store(layout).history("b-train", "train/loss") == [(1, 1.0)]
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert (
        len(warnings) == 1
        and "refused entries of" in warnings[0]
        and "a-train" in warnings[0]
        and "not reached" not in warnings[0]
    )


def test_a_full_disk_costs_a_warning_not_the_training(project, tmp_path, capfd):
    layout = layout_in(project, tmp_path)
    # what stands in the way of a write
    (layout.root / "tracking" / "train-1.jsonl").mkdir(parents=True)
    with open_run(layout, "sft-s0", "train-1") as run:
        run.log_metrics({"train/loss": 1.0}, 1)
        shutil.rmtree(run.outbox)
        run.log_metrics({"train/loss": 1.0}, 2)
    assert (
        "train-1.jsonl cannot be written (Is a directory): MLflow will miss entries"
        in capfd.readouterr().err
    )


def test_a_server_that_never_answers_is_waited_for_once(project, tmp_path, monkeypatch, capfd):
    layout = layout_in(project, tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    monkeypatch.setattr(tracking, "_CLOSE_SECONDS", 3.0)
    waited, join = [], threading.Thread.join

    def wait(thread, timeout=None):
        if thread.name == "mlflow":
            waited.append(timeout)
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", wait)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:  # accepts, and says nothing
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        for key in ("prepare-1", "train-1", "report-1"):
            with open_run(layout, key, key):
                pass
    for thread in [each for each in threading.enumerate() if each.name == "mlflow"]:
        join(thread)  # it has nobody to ask now, and must not warn in another test
    assert waited == [3.0, tracking._CLOSE_SECONDS_WARNED, tracking._CLOSE_SECONDS_WARNED]
    assert tracking._CLOSE_SECONDS_WARNED < 3.0
    assert capfd.readouterr().err.count("warning") == 1


def test_a_secret_at_the_end_of_a_long_reason_is_hidden_before_it_is_cut(
    project, tmp_path, monkeypatch, capfd
):
    def failing(*arguments):
        # cut after 200 characters, that is inside the token
        raise ConnectionError("x" * 175 + " " + TOKEN)

    monkeypatch.setattr(tracking, "Store", failing)
    with open_run(layout_in(project, tmp_path), "prepare", "prepare-1"):
        pass
    error = capfd.readouterr().err
    assert "is not reached (ConnectionError: xxx" in error and TOKEN[:6] not in error


def test_what_waits_is_delivered_by_sap_track_and_by_any_command_with_nothing_left_to_do(
    project, tmp_path, monkeypatch, capfd
):
    layout = layout_in(project, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port()}")
    with open_run(layout, "sft-s0", "train-1") as run:
        run.log_metrics({"train/loss": 1.0}, 1)
    assert cli.main(["track", str(layout.experiment.path)]) == runner.SYSTEM_ERROR
    told = capfd.readouterr()
    assert (
        "0 of 1 runs delivered" in told.out
        and f"still waits: {outbox(layout, 'train-1')}" in told.err
    )
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert cli.main(["track", str(layout.experiment.path)]) == 0
    assert "1 of 1 runs delivered to sqlite:///" in capfd.readouterr().out
    assert Store(layout).history("train-1", "train/loss") == [(1, 1.0)]
    assert (
        cli.main(["track", str(layout.experiment.path)]) == 0
        and "nothing waits" in capfd.readouterr().out
    )

    # what a process that was killed could not deliver
    with outbox(layout, "train-1").open("a") as stream:
        stream.write(
            json.dumps({"kind": "metrics", "values": {"train/loss": 0.5}, "step": 2, "time": 1})
            + "\n"
        )
    monkeypatch.setattr(cli, "_check", lambda *args, **kwargs: (None, None))
    monkeypatch.setattr(cli.Chain, "run", lambda self, stage: 0)
    assert cli.main(["prepare", str(layout.experiment.path)]) == 0
    assert Store(layout).history("train-1", "train/loss") == [(1, 1.0), (2, 0.5)]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        "null",
        "7",
        '{"a": 5}',
        '{"%s": {"offset": -1}}',
        '{"%s": {"offset": "x", "run_id": 3}}',
        "[" * 10**5,
    ],
)
def test_a_damaged_mark_of_what_was_delivered_has_all_sent_again_which_changes_nothing(
    project, tmp_path, content
):
    layout = layout_in(project, tmp_path)
    with open_run(layout, "sft-s0", "train-1") as run:
        run.log_metrics({"train/loss": 1.0}, 1)
    mark = outbox(layout, "train-1").with_suffix(".delivered")
    (name,) = json.loads(mark.read_text())
    mark.write_text(content.replace("%s", name))
    with open_run(layout, "sft-s0", "train-1") as run:
        run.log_metrics({"train/loss": 0.5}, 2)
    assert Store(layout).history("train-1", "train/loss") == [(1, 1.0), (2, 0.5)]
    assert json.loads(mark.read_text())[name]["offset"] == outbox(layout, "train-1").stat().st_size


ENTRY = st.fixed_dictionaries(
    {"kind": st.sampled_from(["start", "metrics", "artifact", "event", "end", "other", 5, None])},
    optional={
        name: st.none()
        | st.booleans()
        | st.integers()
        | st.text(max_size=4)
        | st.lists(st.integers(), max_size=2)
        | st.dictionaries(
            st.text(max_size=2), st.none() | st.floats() | st.text(max_size=2), max_size=2
        )
        for name in (
            *("name", "key", "experiment", "params", "tags", "values"),
            *("step", "time", "path", "number", "text", "status"),
        )
    },
)


@settings(max_examples=200, deadline=None)
@given(entries=st.lists(ENTRY, max_size=6), cut=st.integers(0, 40), flip=st.integers(0, 10_000))
def test_no_line_of_an_outbox_raises_or_is_half_read(entries, cut, flip):
    """What is read of any lines, flipped and cut, is what can be sent; the bytes of all are accounted for."""
    content = bytearray(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
    if content:
        content[flip % len(content)] ^= 1 << flip % 8
    lines = bytes(content[: len(content) - cut]).split(b"\n")[:-1]
    batches = list(mlflow_store._batches(lines))
    assert sum(length for _, length in batches) == sum(len(line) + 1 for line in lines)
    for found, _ in batches:
        for entry in found:
            held = mlflow_store._HELD[entry["kind"]]
            assert all(isinstance(entry[name], kind) for name, kind in held.items())
            assert entry["kind"] != "metrics" or all(
                isinstance(value, int | float) for value in entry["values"].values()
            )
