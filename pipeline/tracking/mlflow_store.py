"""The client that replays outboxes into an MLflow store: the only module that imports MLflow.

    Store(uri, output_dir, warn).deliver(Path("runs/demo/tracking/train-sap-s0-1a2b3c4d.jsonl"))

An outbox (run.py writes it) holds one JSON entry a line. Beside it, `<key>.delivered` says for each store how far it
was delivered, so that every store gets every entry once. Where a process dies between a request and its mark there, the
request is sent again and changes nothing: a metric's step and an event's number, and the time of both, stand in the
entry.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.recipe.redaction import redact
from pipeline.system.locks import locked

METRICS_PER_REQUEST = 900  # MLflow takes 1,000


class Store:
    """An MLflow store; to open one that does not answer raises whatever MLflow raises.

    `warn(name, text)` is told what is left out.
    """

    def __init__(self, uri: str, output_dir: Path, warn: Callable[[tuple[str, ...], str], None]):
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        # after the import, which sets levels of its own
        for name in ("mlflow", "mlflow.store.db.utils", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)

        output, self.warn = output_dir.resolve(), warn
        self.artifacts, self.lock = output / "mlartifacts", output / ".mlflow.lock"
        self.local = uri.startswith("sqlite:")
        self.name = _store_name(uri, output)
        self.checked: set[Path] = set()
        output.mkdir(parents=True, exist_ok=True)
        # two processes that create the tables of one sqlite file leave it broken
        with _locked(self.lock, wait=True):
            database = Path(uri.removeprefix("sqlite:///")) if self.local else None
            if database is not None and not database.exists():
                _create(database)
            self.client = mlflow.MlflowClient(tracking_uri=uri)
            self.probe()

    def probe(self) -> None:
        """Raises where the store does not answer."""
        self.client.search_experiments(max_results=1)

    def deliver(self, outbox: Path) -> None:
        """Send what the outbox holds beyond what this store was given, unless another process is at it."""
        with _locked(outbox.with_suffix(".lock"), wait=False) as mine:
            if mine:
                self._replay(outbox)

    def _replay(self, outbox: Path) -> None:
        """Send entry after entry; remember the position after every request."""
        remembered, size = outbox.with_suffix(".delivered"), outbox.stat().st_size
        states = _remembered(remembered)
        state = states.setdefault(self.name, {"offset": 0, "run_id": None})
        waits = state["offset"] != size
        if not waits and outbox in self.checked:
            return
        if state["offset"] > size or (state["run_id"] and self._lost(state["run_id"], waits)):
            state |= {"offset": 0, "run_id": None}
        self.checked.add(outbox)
        with outbox.open("rb") as stream:
            stream.seek(state["offset"])
            # a last line without its end is still being written
            lines = stream.read().split(b"\n")[:-1]
        for entries, length in _batches(lines):
            self._send(outbox, entries, state)
            state["offset"] += length
            artifacts.write_json(remembered, states)

    def _lost(self, run_id: str, waits: bool) -> bool:
        """Whether the run is gone with its database, or was deleted while there is more for it
        (one that is done stays deleted).
        """
        from mlflow.exceptions import MlflowException

        try:
            stage = self.client.get_run(run_id).info.lifecycle_stage
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return True
        return waits and stage == "deleted"

    def _send(self, outbox: Path, entries: list[dict[str, Any]], state: dict[str, Any]) -> None:
        """One request's worth of entries: metrics, or one of another kind."""
        from mlflow.entities import Metric

        kind = entries[0]["kind"] if entries else None
        if kind == "start":
            state["run_id"] = self._start(entries[0])
        elif kind is None or not state["run_id"]:
            return  # nothing that could be read, or its start could not
        elif kind == "metrics":
            metrics = [
                Metric(name, float(value), e["time"], e["step"])
                for e in entries
                for name, value in e["values"].items()
            ]
            self.client.log_batch(state["run_id"], metrics=metrics)
        elif kind == "artifact":
            path = outbox.parent.parent / entries[0]["path"]
            if path.is_file():
                self.client.log_artifact(state["run_id"], str(path))
            else:
                self.warn(
                    ("artifact", str(path)),
                    f"{path} was to be uploaded to MLflow, but it is no longer there: it is left out",
                )
        elif kind == "event":
            self._event(state["run_id"], entries[0])
        elif kind == "end":
            self._end(state["run_id"], entries[0]["status"])

    def _start(self, entry: dict[str, Any]) -> str:
        from mlflow.entities import Param, RunTag

        with _locked(self.lock, wait=True):  # two processes must not both find no parent
            experiment = self._experiment(entry["experiment"])
            parent = self._find_or_create(
                experiment, f"experiment:{entry['experiment']}", entry["experiment"], {}
            )
            run_id = self._find_or_create(
                experiment, entry["key"], entry["name"], {"mlflow.parentRunId": parent}
            )
            for each in (parent, run_id):
                self.client.update_run(each, status="RUNNING")
        known = self.client.get_run(run_id).data.params
        params = [
            Param(key, str(value)[:5000])
            for key, value in entry["params"].items()
            if key not in known
        ]
        for start in range(0, len(params), 90):
            self.client.log_batch(run_id, params=params[start : start + 90])
        # again: the parent it was created under may have been deleted
        tags = entry["tags"] | {"mlflow.parentRunId": parent}
        self.client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])
        return run_id

    def _event(self, run_id: str, entry: dict[str, Any]) -> None:
        happened = datetime.fromtimestamp(entry["time"] / 1000, UTC).isoformat(timespec="seconds")
        self.client.set_tag(
            run_id, f"event.{entry['number']:03d}", f"{happened} {entry['text']}"[:5000]
        )

    def _end(self, run_id: str, status: str) -> None:
        """End the run, and the experiment's parent run with its last running child."""
        with _locked(self.lock, wait=True):
            self.client.set_terminated(run_id, status)
            run = self.client.get_run(run_id)
            parent = run.data.tags["mlflow.parentRunId"]
            running = f"tags.\"mlflow.parentRunId\" = '{parent}' and attributes.status = 'RUNNING'"
            if not self.client.search_runs([run.info.experiment_id], running, max_results=1):
                self.client.set_terminated(parent, "FINISHED")

    def _experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found:
            return found.experiment_id
        return self.client.create_experiment(
            name, artifact_location=self.artifacts.as_uri() if self.local else None
        )

    def _find_or_create(self, experiment: str, key: str, name: str, tags: dict[str, str]) -> str:
        found = self.client.search_runs(
            [experiment], f"tags.\"sap.run_key\" = '{key}'", max_results=1
        )
        if found:
            return found[0].info.run_id
        return self.client.create_run(
            experiment, tags={"sap.run_key": key, **tags}, run_name=name
        ).info.run_id


def _create(database: Path) -> None:
    """Make the tables in a file beside the database, which is then there with all of them or not at all.

    MLflow makes them one after another: a kill or a full disk on the way would leave a database
    that is refused ever after.
    """
    import mlflow

    database.parent.mkdir(parents=True, exist_ok=True)
    # of a process that was killed here
    for left in database.parent.glob(f".{database.name}.*.new*"):
        left.unlink(missing_ok=True)
    beside = database.with_name(f".{database.name}.{os.getpid()}.new")
    try:
        mlflow.MlflowClient(tracking_uri=f"sqlite:///{beside}").search_experiments(max_results=1)
        if not database.exists():  # where the file system has no locks
            beside.replace(database)
    finally:
        beside.unlink(missing_ok=True)


def undelivered(folder: Path, uri: str, output_dir: Path) -> list[Path]:
    """Outboxes of a folder that hold entries which the store at `uri` was not given. Needs no MLflow."""
    name = _store_name(uri, output_dir.resolve())

    def given(outbox: Path) -> int:
        return _remembered(outbox.with_suffix(".delivered")).get(name, {}).get("offset", 0)

    return [outbox for outbox in sorted(folder.glob("*.jsonl")) if given(outbox) != _whole(outbox)]


def _whole(outbox: Path) -> int:
    """Bytes up to the end of the last line that has one: what a kill cut short is no entry until more is written."""
    content = outbox.read_bytes()
    return content.rfind(b"\n") + 1


def _store_name(uri: str, output: Path) -> str:
    """The store's name in .delivered: without its login and its place on this machine,
    which may both change while it stays the same.
    """
    return artifacts.digest(redact(uri.replace(str(output), "<output_dir>")))[:16]


def _remembered(path: Path) -> dict[str, dict[str, Any]]:
    """How far an outbox was delivered, by store; nothing of what is damaged:
    all is sent again then, which changes nothing.
    """
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}

    def sound(state: object) -> bool:
        return (
            isinstance(state, dict)
            and type(state.get("offset")) is int
            and state["offset"] >= 0
            and isinstance(state.get("run_id"), str | None)
        )

    return (
        {name: state for name, state in found.items() if sound(state)}
        if isinstance(found, dict)
        else {}
    )


# What an entry of each kind holds: a flipped bit may leave JSON that is none of them.
_HELD: dict[str, dict[str, type | tuple[type, ...]]] = {
    "start": {"name": str, "key": str, "experiment": str, "params": dict, "tags": dict},
    "metrics": {"values": dict, "step": int, "time": int},
    "artifact": {"path": str},
    "event": {"number": int, "time": int, "text": str},
    "end": {"status": str},
}
_STATUSES = ("FINISHED", "FAILED", "KILLED")


def decode(line: bytes) -> dict[str, Any] | None:
    """The entry of a line, or None where a kill, a full disk or damage left none."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    held = (
        _HELD.get(entry["kind"])
        if isinstance(entry, dict) and isinstance(entry.get("kind"), str)
        else None
    )
    if held is None or not all(
        isinstance(entry.get(name), kind) and not isinstance(entry[name], bool)
        for name, kind in held.items()
    ):
        return None
    if entry["kind"] == "metrics" and not all(
        isinstance(value, int | float) for value in entry["values"].values()
    ):
        return None
    return None if entry["kind"] == "end" and entry["status"] not in _STATUSES else entry


def _batches(lines: list[bytes]) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Entries of one request (metrics, or one of another kind) and the bytes they take;
    lines that cannot be read only take bytes.
    """
    entries: list[dict[str, Any]] = []
    count = size = 0
    for line in lines:
        entry = decode(line)
        if entry:
            more = len(entry["values"]) if entry["kind"] == "metrics" else METRICS_PER_REQUEST
            if entries and count + more > METRICS_PER_REQUEST:
                yield entries, size
                entries, count, size = [], 0, 0
            entries, count = [*entries, entry], count + more
        size += len(line) + 1
    if size:
        yield entries, size


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Whether this process holds the lock; where it does not wait, False means that another one does."""
    with path.open("w") as lock:
        yield locked(lock, wait)
