"""MLflow: the only module that imports it, and the only one that may be slow or fail without anybody waiting.

    with open_run(layout, "sap-s0", key="train-sap-s0-1a2b3c4d", cell=cell) as run:
        run.log_metrics({"train/loss": 1.0}, step=1)

One parent run per experiment; one child per (method, seed), to which training and evaluation both log, so that parameters and scores
stand in one row; one child per shared stage. Every entry is first appended to an outbox, `<experiment>/tracking/<key>.jsonl`; a thread
delivers it. A dead or slow server costs one warning and no time: what it missed stays in the outbox and is delivered by the next stage
that reaches it. Beside an outbox, `<key>.delivered` says for each store how far it was delivered, so that every store gets every entry
once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import artifacts, recipe
from pipeline.layout import Layout
from pipeline.recipe import Cell, Recipe
from pipeline.redaction import redact

_RETRY_SECONDS = 30.0
_CLOSE_SECONDS = 20.0
_CLOSE_SECONDS_WARNED = 2.0
_BATCH = 900  # metrics; MLflow takes 1,000 a request

_warned: set[tuple[str, ...]] = set()  # of this process: `sap run` opens several runs, one after the other


class Run:
    """A run that is not tracked: ranks other than 0, or tracking switched off."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Metrics of one step; a step that was logged before (a resumed run repeats it bit for bit) is ignored."""

    def log_facts(self, facts: dict[str, Any]) -> None:
        """Nested numbers of a stage, flattened, as metrics."""

    def log_evaluation(self, metrics: dict[str, Any]) -> None:
        """Measures of a subject: evaluate/NAME, and its interval."""

    def log_artifact(self, path: Path) -> None:
        """Upload a file (kept where it is; it is read when it is delivered)."""

    def stopped(self) -> None:
        """The stage stops on request before its work is done: the run ends as KILLED, not FINISHED."""


class _TrackedRun(Run):
    def __init__(self, outbox: Path, sender: _Sender):
        self.outbox, self.sender, self.success = outbox, sender, "FINISHED"
        entries = filter(None, map(_decode, outbox.read_bytes().split(b"\n") if outbox.is_file() else []))
        self.last_step = max((entry["step"] for entry in entries if entry["kind"] == "metrics"), default=0)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        if step > self.last_step:
            self.last_step = step
            self._log(metrics, step)

    def log_facts(self, facts: dict[str, Any]) -> None:
        numbers = {key: value for key, value in _flatten(facts).items() if isinstance(value, int | float) and not isinstance(value, bool)}
        self._log({_metric_name(key): float(value) for key, value in numbers.items()}, 0)

    def log_evaluation(self, metrics: dict[str, Any]) -> None:
        values = {}
        for name, value in metrics.items():
            parts = value if isinstance(value, dict) else {"value": value}
            named = {name: parts.get("value"), f"{name}_low": parts.get("low"), f"{name}_high": parts.get("high")}
            values |= {f"evaluate/{key}": part for key, part in named.items() if isinstance(part, int | float)}
        self._log(values, 0)

    def log_artifact(self, path: Path) -> None:
        path, root = path.resolve(), self.outbox.parent.parent.resolve()
        # As it is: redacted it would not be found. Relative, so that the folder can be moved before it is delivered.
        self.append({"kind": "artifact", "path": str(path.relative_to(root) if path.is_relative_to(root) else path)})

    def stopped(self) -> None:
        self.success = "KILLED"

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line to the outbox; a disk that is full costs the entry and a warning, not the training."""
        try:
            with self.outbox.open("a+b") as stream:
                # A write that was killed, or met a full disk, left half a line: end it, or it would spoil this one too.
                stream.seek(max(stream.seek(0, os.SEEK_END) - 1, 0))
                unfinished = stream.read(1) not in (b"", b"\n")
                stream.write(b"\n" * unfinished + json.dumps(entry).encode() + b"\n")
        except OSError as error:
            _warn_once(("write", str(self.outbox)), f"{self.outbox} cannot be written ({error.strerror}): MLflow will miss entries")
        self.sender.wake.set()

    def _log(self, metrics: dict[str, float], step: int) -> None:
        values = [(redact(name), value) for name, value in metrics.items()]  # a metric named .../token is no secret
        for start in range(0, len(values), _BATCH):
            self.append({"kind": "metrics", "values": dict(values[start : start + _BATCH]), "step": step, "time": int(time.time() * 1000)})


@contextlib.contextmanager
def open_run(layout: Layout, name: str, key: str, rank: int = 0, cell: Cell | None = None) -> Iterator[Run]:
    """The run of one stage or cell, found again by `key`; a no-op on ranks other than 0."""
    if rank != 0 or not layout.base.tracking.enabled:
        yield Run()
        return
    folder = layout.root / "tracking"
    folder.mkdir(parents=True, exist_ok=True)
    resolved = cell.recipe if cell else layout.base
    sender = _Sender(folder, resolved)
    run = _TrackedRun(folder / f"{key}.jsonl", sender)
    without = ("methods.", "seeds") if resolved.sap.enabled else ("methods.", "seeds", "sap.")  # a comparison shows settings that act
    params = {k: v for k, v in _flatten(recipe.dump(resolved)).items() if not k.startswith(without)}
    params["sap.enabled"] = resolved.sap.enabled
    params |= {"method": cell.method, "seed": cell.seed} if cell else {}
    tags = {f"version.{package}": version for package, version in artifacts.versions().items()}
    tags |= {"git_revision": artifacts.git_revision() or "none", "recipe": str(layout.experiment.path), **_data_tags(layout.prepare())}
    experiment = layout.base.tracking.experiment or layout.base.name
    run.append(redact({"kind": "start", "name": name, "key": key, "experiment": experiment, "params": params, "tags": tags}))
    sender.start()
    status = "FAILED"
    try:
        yield run
        status = run.success
    finally:
        run.append({"kind": "end", "status": status})
        sender.close()


def _data_tags(prepared: Path) -> dict[str, str]:
    """The prepared data's folder and, once it is complete, the digest of its files' digests: the same data, the same digest."""
    tags = {"data": prepared.name}
    if artifacts.complete(prepared):
        with contextlib.suppress(ValueError):  # a damaged manifest is for the stage to refuse
            files = artifacts.read_manifest(prepared)["files"]
            tags["data.sha256"] = artifacts.digest({name: file["sha256"] for name, file in files.items()})
    return tags


def store_uri(base: Recipe) -> str:
    """Where runs go: MLFLOW_TRACKING_URI, else tracking.uri, else a sqlite file below output_dir."""
    return os.environ.get("MLFLOW_TRACKING_URI") or base.tracking.uri or f"sqlite:///{(base.output_dir / 'mlflow.db').resolve()}"


def describe_store(base: Recipe) -> str:
    """The store and the command that opens it (this environment's own mlflow), without secrets."""
    uri = redact(store_uri(base))
    if uri.startswith("http"):
        return uri
    command = shutil.which("mlflow") or Path(sys.executable).with_name("mlflow")
    return f"{uri}  (open with: {command} ui --backend-store-uri {uri})"


class _Sender:
    """A thread that delivers every outbox below a folder, and gives up for a while when the store does not answer."""

    def __init__(self, folder: Path, base: Recipe):
        self.folder, self.base = folder, base
        self.wake, self.closing = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self.client: _Client | None = None

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        """Wait for the last delivery, but never longer than a bound, and hardly at all where the user knows already."""
        self.closing.set()
        self.wake.set()
        self.thread.join(_CLOSE_SECONDS_WARNED if self._name() in _warned else _CLOSE_SECONDS)
        if self.thread.is_alive():
            self._warn("it does not answer")

    def _work(self) -> None:
        while True:
            last = self.closing.is_set()
            reached = self._deliver_all()
            if last or (self.closing.is_set() and not reached):
                return
            self.closing.wait(0 if reached else _RETRY_SECONDS)
            self.wake.wait()
            self.wake.clear()
            self.closing.wait(2.0)  # let a few steps gather

    def _deliver_all(self) -> bool:
        """Deliver what waits; False where the store is not reached. An outbox that the store refuses does not keep the others waiting."""
        # MLflow's stores raise whatever their backends do; training must not care: hence every Exception.
        try:
            self.client = self.client or _Client(self.base)
        except Exception as error:  # noqa: BLE001
            self._warn(_first_line(error))
            return False
        for outbox in sorted(self.folder.glob("*.jsonl")):
            try:
                with _locked(outbox.with_suffix(".lock"), wait=False) as mine:
                    if mine:
                        self.client.deliver(outbox)
            except Exception as refusal:  # noqa: BLE001
                try:
                    self.client.probe()
                except Exception as error:  # noqa: BLE001
                    self.client = None
                    self._warn(_first_line(error))
                    return False
                reason = redact(_first_line(refusal))[:200]
                _warn_once(("refused", str(outbox)), f"MLflow refused entries of {outbox} ({reason}); the run goes on, they wait there")
        return True

    def _name(self) -> tuple[str, ...]:
        return ("reach", store_uri(self.base), str(self.folder))

    def _warn(self, reason: str) -> None:
        reason = redact(reason)[:200]  # in this order: half a secret is not recognised
        where = f"MLflow at {redact(store_uri(self.base))}"
        _warn_once(self._name(), f"{where} is not reached ({reason}); the run goes on, its entries wait in {self.folder}")


class _Client:
    """An MLflow client that replays outboxes."""

    def __init__(self, base: Recipe):
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        for name in ("mlflow", "mlflow.store.db.utils", "alembic"):  # after the import, which sets levels of its own
            logging.getLogger(name).setLevel(logging.ERROR)

        uri, output = store_uri(base), base.output_dir.resolve()
        self.artifacts, self.lock = output / "mlartifacts", output / ".mlflow.lock"
        self.local = uri.startswith("sqlite:")
        # The store's name in .delivered: without its login and its place on this machine, which may both change while it stays the same.
        self.store = artifacts.digest(redact(uri.replace(str(output), "<output_dir>")))[:16]
        self.checked: set[Path] = set()
        output.mkdir(parents=True, exist_ok=True)
        with _locked(self.lock, wait=True):  # two processes that create the tables of one sqlite file leave it broken
            self.client = MlflowClient(tracking_uri=uri)
            self.probe()

    def probe(self) -> None:
        """Raises where the store does not answer."""
        self.client.search_experiments(max_results=1)

    def deliver(self, outbox: Path) -> None:
        """Send what the outbox holds beyond what this store was given; remember the position after every request."""
        remembered, size = outbox.with_suffix(".delivered"), outbox.stat().st_size
        states = json.loads(remembered.read_text()) if remembered.is_file() else {}
        state = states.setdefault(self.store, {"offset": 0, "run_id": None})
        waits = state["offset"] != size
        if not waits and outbox in self.checked:
            return
        if state["offset"] > size or (state["run_id"] and self._lost(state["run_id"], waits)):
            state |= {"offset": 0, "run_id": None}
        self.checked.add(outbox)
        with outbox.open("rb") as stream:
            stream.seek(state["offset"])
            lines = stream.read().split(b"\n")[:-1]  # a last line without its end is still being written
        for entries, length in _batches(lines):
            self._send(outbox, entries, state)
            state["offset"] += length
            artifacts.write_json(remembered, states)

    def _lost(self, run_id: str, waits: bool) -> bool:
        """Whether the run is gone with its database, or was deleted while there is more for it (one that is done stays deleted)."""
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
            metrics = [Metric(name, float(value), e["time"], e["step"]) for e in entries for name, value in e["values"].items()]
            self.client.log_batch(state["run_id"], metrics=metrics)
        elif kind == "artifact":
            path = outbox.parent.parent / entries[0]["path"]
            if path.is_file():
                self.client.log_artifact(state["run_id"], str(path))
            else:
                _warn_once(("artifact", str(path)), f"{path} was to be uploaded to MLflow, but it is no longer there: it is left out")
        elif kind == "end":
            self._end(state["run_id"], entries[0]["status"])

    def _start(self, entry: dict[str, Any]) -> str:
        from mlflow.entities import Param, RunTag

        with _locked(self.lock, wait=True):  # two processes must not both find no parent
            experiment = self._experiment(entry["experiment"])
            parent = self._find_or_create(experiment, f"experiment:{entry['experiment']}", entry["experiment"], {})
            run_id = self._find_or_create(experiment, entry["key"], entry["name"], {"mlflow.parentRunId": parent})
            for each in (parent, run_id):
                self.client.update_run(each, status="RUNNING")
        known = self.client.get_run(run_id).data.params
        params = [Param(key, str(value)[:5000]) for key, value in entry["params"].items() if key not in known]
        for start in range(0, len(params), 90):
            self.client.log_batch(run_id, params=params[start : start + 90])
        tags = entry["tags"] | {"mlflow.parentRunId": parent}  # again: the parent it was created under may have been deleted
        self.client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])
        return run_id

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
        return self.client.create_experiment(name, artifact_location=self.artifacts.as_uri() if self.local else None)

    def _find_or_create(self, experiment: str, key: str, name: str, tags: dict[str, str]) -> str:
        found = self.client.search_runs([experiment], f"tags.\"sap.run_key\" = '{key}'", max_results=1)
        if found:
            return found[0].info.run_id
        return self.client.create_run(experiment, tags={"sap.run_key": key, **tags}, run_name=name).info.run_id


def _warn_once(name: tuple[str, ...], text: str) -> None:
    """Print a warning without secrets, once a process."""
    if name not in _warned:
        _warned.add(name)
        print(f"warning: {redact(text)}", file=sys.stderr, flush=True)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _decode(line: bytes) -> dict[str, Any] | None:
    """The entry of a line, or None where a kill or a full disk left no more than a part of it."""
    with contextlib.suppress(ValueError):
        entry = json.loads(line)
        if isinstance(entry, dict) and "kind" in entry:
            return entry
    return None


def _batches(lines: list[bytes]) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Entries of one request (metrics, or one of another kind) and the bytes they take; lines that cannot be read only take bytes."""
    entries: list[dict[str, Any]] = []
    count = size = 0
    for line in lines:
        entry = _decode(line)
        if entry:
            more = len(entry["values"]) if entry["kind"] == "metrics" else _BATCH
            if entries and count + more > _BATCH:
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
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # a file system without locks
        yield True


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: item for name, part in value.items() for key, item in _flatten(part, f"{prefix}{name}.").items()}
    return {prefix[:-1]: value}


def _metric_name(key: str) -> str:
    return "".join(c if c.isalnum() or c in "_-./ " else "-" for c in key)
