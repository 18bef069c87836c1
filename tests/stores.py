"""Experiments with a store of their own, and what a store holds, for the tests of tracking."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.defences import recipes
from pipeline.stages.layout import Layout
from tests.project import make_project, write_recipe


def tracked_project(folder: Path) -> tuple[Path, dict]:
    """The tiny project with an empty store beside it (`layout_in` copies it)."""
    from mlflow import MlflowClient

    MlflowClient(f"sqlite:///{folder / 'empty.db'}").search_experiments()
    return folder, make_project(folder)


def layout_in(project: tuple[Path, dict], output: Path, fresh: bool = False, **changes) -> Layout:
    """An experiment of its own; unless fresh, with an empty store (to make one takes seconds)."""
    if not fresh:
        output.mkdir(parents=True, exist_ok=True)
        shutil.copy(project[0] / "empty.db", output / "mlflow.db")
    return Layout(
        recipes.load(
            write_recipe(
                project[0],
                project[1] | {"output_dir": str(output)} | changes,
                f"{output.name}.yaml",
            )
        )
    )


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.1)


def outbox(layout: Layout, key: str) -> Path:
    return layout.root / "tracking" / f"{key}.jsonl"


class Store:
    """The sqlite store of a layout (or another one), read back."""

    def __init__(self, layout: Layout, database: Path | None = None):
        from mlflow import MlflowClient

        self.client = MlflowClient(
            f"sqlite:///{(database or layout.base.output_dir / 'mlflow.db').resolve()}"
        )
        (experiment,) = [e for e in self.client.search_experiments() if e.name == "tiny"]
        self.runs = self.client.search_runs([experiment.experiment_id])

    def run(self, key: str):
        (found,) = [run for run in self.runs if run.data.tags["sap.run_key"] == key]
        return found

    @property
    def parent(self):
        (found,) = [run for run in self.runs if "mlflow.parentRunId" not in run.data.tags]
        return found

    def artifacts(self, key: str) -> list[str]:
        return [item.path for item in self.client.list_artifacts(self.run(key).info.run_id)]

    def history(self, key: str, metric: str) -> list[tuple[int, float]]:
        """Every logged (step, value), doubles included, in the order of steps."""
        return sorted(
            (m.step, m.value)
            for m in self.client.get_metric_history(self.run(key).info.run_id, metric)
        )
