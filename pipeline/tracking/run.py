"""What stages log to MLflow, which may be slow or fail without anybody waiting.

    with open_run(layout, "sap-s0", key="train-sap-s0-1a2b3c4d", cell=cell) as run:
        run.log_metrics({"train/loss": 1.0}, step=1)

One parent run per experiment; one child per (method, seed), to which training and evaluation both log, so that
parameters and scores stand in one row; one child per shared stage. Every entry is first appended to an outbox,
`<experiment>/tracking/<key>.jsonl`; a thread delivers it (mlflow_store.py). A dead or slow server costs one warning and
no time: what it missed stays in the outbox and is delivered by the next stage that reaches it, by any other command of
stages, or by `sap track`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from pipeline import artifacts
from pipeline.recipe import recipe
from pipeline.recipe.recipe import Cell, Experiment, Recipe
from pipeline.recipe.redaction import redact
from pipeline.tracking.mlflow_store import METRICS_PER_REQUEST, Store, decode, undelivered

_RETRY_SECONDS = 30.0
_CLOSE_SECONDS = 20.0
_CLOSE_SECONDS_WARNED = 2.0
# of a local store that is not there yet: its tables take many writes, each waiting for the disk
_CLOSE_SECONDS_FIRST = 180.0

# of this process: `sap run` opens several runs, one after the other
_warned: set[tuple[str, ...]] = set()


class Folders(Protocol):
    """What is asked of an experiment's folders (stages/layout.py)."""

    experiment: Experiment
    base: Recipe
    root: Path

    def prepare(self) -> Path:
        """The folder of the prepared data."""

    def prompts(self) -> Path:
        """The folder of the prompts to evaluate on."""


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

    def event(self, text: str) -> None:
        """Something that happened to the run (stopped, resumed, requeued), one short sentence:
        a tag, event.001 and so on, with its time.
        """

    def stopped(self) -> None:
        """The stage stops on request before its work is done: the run ends as KILLED, not FINISHED."""


class _TrackedRun(Run):
    def __init__(self, outbox: Path, sender: _Sender):
        self.outbox, self.sender, self.success = outbox, sender, "FINISHED"
        self.last_step = last_event = 0
        for entry in filter(
            None, map(decode, outbox.read_bytes().split(b"\n") if outbox.is_file() else [])
        ):
            if entry["kind"] == "metrics":
                self.last_step = max(self.last_step, entry["step"])
            elif entry["kind"] == "event":
                last_event = max(last_event, entry["number"])
        # Kept here, not counted again: a number whose entry met a full disk is left out, never given twice.
        self.event_numbers = itertools.count(last_event + 1)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        if step > self.last_step:
            self.last_step = step
            self._log(metrics, step)

    def log_facts(self, facts: dict[str, Any]) -> None:
        numbers = {
            key: value
            for key, value in _flatten(facts).items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        self._log({_metric_name(key): float(value) for key, value in numbers.items()}, 0)

    def log_evaluation(self, metrics: dict[str, Any]) -> None:
        values: dict[str, float] = {}
        for name, value in metrics.items():
            parts = value if isinstance(value, dict) else {"value": value}
            named = {
                name: parts.get("value"),
                f"{name}_low": parts.get("low"),
                f"{name}_high": parts.get("high"),
            }
            values |= {
                f"evaluate/{key}": part
                for key, part in named.items()
                if isinstance(part, int | float)
            }
        self._log(values, 0)

    def log_artifact(self, path: Path) -> None:
        path, root = path.resolve(), self.outbox.parent.parent.resolve()
        # As it is: redacted it would not be found. Relative, so that the folder can be moved before it is delivered.
        self.append(
            {
                "kind": "artifact",
                "path": str(path.relative_to(root) if path.is_relative_to(root) else path),
            }
        )

    def event(self, text: str) -> None:
        self.append(
            {
                "kind": "event",
                "number": next(self.event_numbers),
                "time": _now(),
                "text": redact(text),
            }
        )

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
            _warn_once(
                ("write", str(self.outbox)),
                f"{self.outbox} cannot be written ({error.strerror}): MLflow will miss entries",
            )
        self.sender.wake.set()

    def _log(self, metrics: dict[str, float], step: int) -> None:
        # a metric named .../token is no secret
        values = [(redact(name), value) for name, value in metrics.items()]
        for start in range(0, len(values), METRICS_PER_REQUEST):
            self.append(
                {
                    "kind": "metrics",
                    "values": dict(values[start : start + METRICS_PER_REQUEST]),
                    "step": step,
                    "time": _now(),
                }
            )


@contextlib.contextmanager
def open_run(
    folders: Folders, name: str, key: str, rank: int = 0, cell: Cell | None = None
) -> Iterator[Run]:
    """The run of one stage or cell, found again by `key`; a no-op on ranks other than 0."""
    if rank != 0 or not folders.base.tracking.enabled:
        yield Run()
        return
    folder = folders.root / "tracking"
    folder.mkdir(parents=True, exist_ok=True)
    resolved = cell.recipe if cell else folders.base
    sender = _Sender(folder, resolved)
    run = _TrackedRun(folder / f"{key}.jsonl", sender)
    params = {k: v for k, v in _flatten(recipe.dump(resolved)).items() if _acts(k, resolved)}
    params |= {"method": cell.method, "seed": cell.seed} if cell else {}
    tags = {f"version.{package}": version for package, version in artifacts.versions().items()}
    tags |= {
        "git_revision": artifacts.git_revision() or "none",
        "recipe": str(folders.experiment.path),
        **_data_tags(folders.prepare()),
    }
    # an evaluation on other prompts stands in the same run
    tags |= {"prompts": folders.prompts().name}
    experiment = folders.base.tracking.experiment or folders.base.name
    run.append(
        redact(
            {
                "kind": "start",
                "name": name,
                "key": key,
                "experiment": experiment,
                "params": params,
                "tags": tags,
            }
        )
    )
    sender.start()
    status = "FAILED"
    try:
        yield run
        status = run.success
    finally:
        run.append({"kind": "end", "status": status})
        sender.close()


def waiting(folders: Folders) -> list[Path]:
    """Outboxes of an experiment that hold what its store was not given; none where tracking is off."""
    if not folders.base.tracking.enabled:
        return []
    return undelivered(folders.root / "tracking", store_uri(folders.base), folders.base.output_dir)


def deliver(folders: Folders) -> list[Path]:
    """Give the store what waits; returns the outboxes that still wait. Takes no longer than the end of a stage does."""
    if waiting(folders):
        sender = _Sender(folders.root / "tracking", folders.base)
        sender.start()
        sender.close()
    return waiting(folders)


def _acts(name: str, resolved: Recipe) -> bool:
    """Whether a setting acts, so that a comparison of runs should show it; sections that are off show that they are."""
    section, _, field = name.partition(".")
    if section in ("methods", "seeds"):
        return False
    if section == "safety_pairs":
        return resolved.draws_pairs
    return field == "enabled" or getattr(getattr(resolved, section), "enabled", True)


def _data_tags(prepared: Path) -> dict[str, str]:
    """The prepared data's folder and, once it is complete, the digest of its files' digests:
    the same data, the same digest.
    """
    tags = {"data": prepared.name}
    if artifacts.complete(prepared):
        with contextlib.suppress(ValueError):  # a damaged manifest is for the stage to refuse
            files = artifacts.read_manifest(prepared)["files"]
            tags["data.sha256"] = artifacts.digest(
                {name: file["sha256"] for name, file in files.items()}
            )
    return tags


def store_uri(base: Recipe) -> str:
    """Where runs go: MLFLOW_TRACKING_URI, else tracking.uri, else a sqlite file below output_dir."""
    return (
        os.environ.get("MLFLOW_TRACKING_URI")
        or base.tracking.uri
        or f"sqlite:///{(base.output_dir / 'mlflow.db').resolve()}"
    )


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
        self.store: Store | None = None
        local = store_uri(base).removeprefix("sqlite:///")
        self.first = local != store_uri(base) and not Path(local).exists()

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        """Wait for the last delivery, but never longer than a bound, and hardly at all where the user knows already."""
        self.closing.set()
        self.wake.set()
        usual = _CLOSE_SECONDS_FIRST if self.first and self.store is None else _CLOSE_SECONDS
        self.thread.join(_CLOSE_SECONDS_WARNED if self._name() in _warned else usual)
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
        """Deliver what waits; False where the store is not reached.

        An outbox that the store refuses does not keep the others waiting.
        """
        # MLflow's stores raise whatever their backends do; training must not care: hence every Exception.
        try:
            self.store = self.store or Store(store_uri(self.base), self.base.output_dir, _warn_once)
        except Exception as error:
            self._warn(_first_line(error))
            return False
        for outbox in sorted(self.folder.glob("*.jsonl")):
            try:
                self.store.deliver(outbox)
            except Exception as refusal:
                try:
                    self.store.probe()
                except Exception as error:
                    self.store = None
                    self._warn(_first_line(error))
                    return False
                reason = redact(_first_line(refusal))[:200]
                _warn_once(
                    ("refused", str(outbox)),
                    f"MLflow refused entries of {outbox} ({reason}); the run goes on, they wait there",
                )
        return True

    def _name(self) -> tuple[str, ...]:
        return ("reach", store_uri(self.base), str(self.folder))

    def _warn(self, reason: str) -> None:
        reason = redact(reason)[:200]  # in this order: half a secret is not recognised
        where = f"MLflow at {redact(store_uri(self.base))}"
        _warn_once(
            self._name(),
            f"{where} is not reached ({reason}); the run goes on, its entries wait in {self.folder}",
        )


def _warn_once(name: tuple[str, ...], text: str) -> None:
    """Print a warning without secrets, once a process."""
    if name not in _warned:
        _warned.add(name)
        print(f"warning: {redact(text)}", file=sys.stderr, flush=True)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _now() -> int:
    """Milliseconds since 1970, as MLflow counts time."""
    return int(time.time() * 1000)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            key: item
            for name, part in value.items()
            for key, item in _flatten(part, f"{prefix}{name}.").items()
        }
    return {prefix[:-1]: value}


def _metric_name(key: str) -> str:
    return "".join(c if c.isalnum() or c in "_-./ " else "-" for c in key)
