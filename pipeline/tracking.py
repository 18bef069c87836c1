"""MLflow: the only module that imports it, and the only one that may be slow or fail without anybody waiting.

    with open_run(layout, "sap-s0", key="train-sap-s0-1a2b3c4d", cell=cell) as run:
        run.log_metrics({"train/loss": 1.0}, step=1)

One parent run per experiment; one child per (method, seed), to which training and evaluation both log, so that parameters and scores stand in one
row; one child per shared stage. Every entry is first appended to an outbox, `<experiment>/tracking/<key>.jsonl`; a thread delivers it. A dead
or slow server costs one warning and no time: what it missed stays in the outbox and is delivered by the next stage that reaches it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import artifacts, recipe
from pipeline.layout import Layout
from pipeline.recipe import Cell, Recipe

_RETRY_SECONDS = 30.0
_CLOSE_SECONDS = 20.0
_BATCH = 200


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


class _TrackedRun(Run):
    def __init__(self, outbox: Path, sender: _Sender):
        self.outbox, self.sender = outbox, sender
        self.last_step = max((entry["step"] for entry in _entries(outbox) if entry["kind"] == "metrics" and entry["step"]), default=0)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        if step > self.last_step:
            self.last_step = step
            self.append({"kind": "metrics", "values": metrics, "step": step, "time": int(time.time() * 1000)})

    def log_facts(self, facts: dict[str, Any]) -> None:
        numbers = {key: value for key, value in _flatten(facts).items() if isinstance(value, int | float) and not isinstance(value, bool)}
        self.append(
            {
                "kind": "metrics",
                "values": {_metric_name(key): float(v) for key, v in numbers.items()},
                "step": 0,
                "time": int(time.time() * 1000),
            }
        )

    def log_evaluation(self, metrics: dict[str, Any]) -> None:
        values = {}
        for name, value in metrics.items():
            parts = (
                {"": value.get("value"), "_low": value.get("low"), "_high": value.get("high")} if isinstance(value, dict) else {"": value}
            )
            values |= {f"evaluate/{name}{suffix}": part for suffix, part in parts.items() if isinstance(part, int | float)}
        self.append({"kind": "metrics", "values": values, "step": 0, "time": int(time.time() * 1000)})

    def log_artifact(self, path: Path) -> None:
        self.append({"kind": "artifact", "path": str(path.resolve())})

    def append(self, entry: dict[str, Any]) -> None:
        with self.outbox.open("a") as stream:
            stream.write(json.dumps(recipe.redact(entry)) + "\n")
        self.sender.wake.set()


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
    params = {k: v for k, v in _flatten(recipe.dump(resolved)).items() if not k.startswith(("methods.", "seeds"))}
    params |= {"method": cell.method, "seed": cell.seed} if cell else {}
    tags = {f"version.{package}": version for package, version in artifacts.versions().items()}
    tags |= {"git_revision": artifacts.git_revision() or "none", "data": layout.prepare().name, "recipe": str(layout.experiment.path)}
    run.append(
        {
            "kind": "start",
            "name": name,
            "key": key,
            "experiment": layout.base.tracking.experiment or layout.base.name,
            "params": params,
            "tags": tags,
        }
    )
    sender.start()
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    finally:
        run.append({"kind": "end", "status": status})
        sender.close()


def store_uri(base: Recipe) -> str:
    """Where runs go: MLFLOW_TRACKING_URI, else tracking.uri, else a sqlite file below output_dir."""
    return os.environ.get("MLFLOW_TRACKING_URI") or base.tracking.uri or f"sqlite:///{(base.output_dir / 'mlflow.db').resolve()}"


def describe_store(base: Recipe) -> str:
    """The store and the command that opens it, without secrets."""
    uri = recipe.redact(store_uri(base))
    return f"{uri}  (open with: mlflow ui --backend-store-uri {uri})" if not uri.startswith("http") else uri


class _Sender:
    """A thread that delivers every outbox below a folder, and gives up for a while when the store does not answer."""

    def __init__(self, folder: Path, base: Recipe):
        self.folder, self.base = folder, base
        self.wake, self.closing = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self.warned = False

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        """Wait for the last delivery, but never longer than a bound."""
        self.closing.set()
        self.wake.set()
        self.thread.join(_CLOSE_SECONDS)
        if self.thread.is_alive():
            self._warn("it does not answer")

    def _work(self) -> None:
        while True:
            last = self.closing.is_set()
            delivered = self._deliver_all()
            if last:
                return
            self.closing.wait(0 if delivered else _RETRY_SECONDS)
            self.wake.wait()
            self.wake.clear()
            self.closing.wait(2.0)  # let a few steps gather

    def _deliver_all(self) -> bool:
        try:
            client = None
            for outbox in sorted(self.folder.glob("*.jsonl")):
                if _delivered(outbox) < outbox.stat().st_size:
                    client = client or _Client(self.base)
                    with _locked(outbox) as mine:
                        if mine:
                            client.deliver(outbox)
            return True
        except Exception as error:  # noqa: BLE001 - MLflow's stores raise whatever their backends do; training must not care
            self._warn(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")
            return False

    def _warn(self, reason: str) -> None:
        if not self.warned:
            self.warned = True
            text = recipe.redact(
                f"MLflow at {store_uri(self.base)} is not reached ({reason[:200]}); the run goes on, its entries wait in {self.folder}"
            )
            print(f"warning: {text}", file=sys.stderr, flush=True)


class _Client:
    """An MLflow client that replays outboxes."""

    def __init__(self, base: Recipe):
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        for name in ("mlflow", "mlflow.store.db.utils", "alembic"):  # after the import, which sets levels of its own
            logging.getLogger(name).setLevel(logging.ERROR)

        self.artifacts = (base.output_dir / "mlartifacts").resolve()
        self.local = store_uri(base).startswith("sqlite:")
        base.output_dir.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(tracking_uri=store_uri(base))

    def deliver(self, outbox: Path) -> None:
        """Send what the outbox holds beyond what was delivered; remember the position after every batch."""
        state = _state(outbox)
        with outbox.open("rb") as stream:
            stream.seek(state["offset"])
            lines = stream.read().split(b"\n")[:-1]  # a last line without its end is still being written
        position = state["offset"]
        for start in range(0, len(lines), _BATCH):
            chunk = lines[start : start + _BATCH]
            self._send([json.loads(line) for line in chunk], state)
            position += sum(len(line) + 1 for line in chunk)
            state["offset"] = position
            artifacts.write_json(_state_file(outbox), state)

    def _send(self, entries: list[dict[str, Any]], state: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        metrics = []
        for entry in entries:
            if entry["kind"] == "start":
                state["run_id"] = self._start(entry)
            elif entry["kind"] == "metrics":
                metrics += [Metric(key, float(value), entry["time"], entry["step"]) for key, value in entry["values"].items()]
        for start in range(0, len(metrics), 900):
            self.client.log_batch(state["run_id"], metrics=metrics[start : start + 900])
        for entry in entries:
            if entry["kind"] == "artifact" and Path(entry["path"]).is_file():
                self.client.log_artifact(state["run_id"], entry["path"])
            elif entry["kind"] == "end":
                self.client.set_terminated(state["run_id"], entry["status"])

    def _start(self, entry: dict[str, Any]) -> str:
        from mlflow.entities import Param, RunTag

        experiment = self._experiment(entry["experiment"])
        parent = self._find_or_create(experiment, f"experiment:{entry['experiment']}", entry["experiment"], {})
        run_id = self._find_or_create(experiment, entry["key"], entry["name"], {"mlflow.parentRunId": parent})
        self.client.update_run(run_id, status="RUNNING")
        known = self.client.get_run(run_id).data.params
        params = [Param(key, str(value)[:5000]) for key, value in entry["params"].items() if key not in known]
        for start in range(0, len(params), 90):
            self.client.log_batch(run_id, params=params[start : start + 90])
        self.client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in entry["tags"].items()])
        return run_id

    def _experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        return (
            found.experiment_id
            if found
            else self.client.create_experiment(name, artifact_location=self.artifacts.as_uri() if self.local else None)
        )

    def _find_or_create(self, experiment: str, key: str, name: str, tags: dict[str, str]) -> str:
        found = self.client.search_runs([experiment], f"tags.\"sap.run_key\" = '{key}'", max_results=1)
        if found:
            return found[0].info.run_id
        return self.client.create_run(experiment, tags={"sap.run_key": key, **tags}, run_name=name).info.run_id


def _state_file(outbox: Path) -> Path:
    return outbox.with_suffix(".delivered")


def _state(outbox: Path) -> dict[str, Any]:
    path = _state_file(outbox)
    return json.loads(path.read_text()) if path.is_file() else {"offset": 0, "run_id": None}


def _delivered(outbox: Path) -> int:
    return _state(outbox)["offset"]


def _entries(outbox: Path) -> Iterator[dict[str, Any]]:
    if outbox.is_file():
        for line in outbox.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)


@contextlib.contextmanager
def _locked(outbox: Path) -> Iterator[bool]:
    """Whether this process may deliver the outbox now; another one that does is left alone."""
    with outbox.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: item for name, part in value.items() for key, item in _flatten(part, f"{prefix}{name}.").items()}
    return {prefix[:-1]: value}


def _metric_name(key: str) -> str:
    return "".join(c if c.isalnum() or c in "_-./ " else "-" for c in key)
