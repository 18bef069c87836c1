"""Tracking: nobody waits for it, nothing is lost or doubled, no secret leaves, and one row holds all of a cell."""

import contextlib
import copy
import io
import json
import re
import shutil
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from pipeline import artifacts
from pipeline.cli import main
from pipeline.defences import recipes
from pipeline.recipe import recipe
from pipeline.stages.layout import Layout
from pipeline.tracking import mlflow_store
from pipeline.tracking import run as tracking
from pipeline.tracking.run import describe_store, open_run
from tests.project import ROOT, write_recipe
from tests.stores import Store, closed_port, layout_in, outbox, tracked_project, until

# On a busy machine a delivery may need longer than a stage would wait for.
tracking._CLOSE_SECONDS = 300.0
TOKEN, PASSWORD, KEY = "hf_PLANTEDsecret0123456789", "pl4nted-passw0rd", "planted-api-key"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> tuple[Path, dict]:
    return tracked_project(tmp_path_factory.mktemp("tracking"))


@pytest.fixture(scope="module")
def tracked(project, tmp_path_factory) -> tuple[Layout, Store]:
    """prepare, then a cell whose training is interrupted and resumed and whose evaluation comes last."""
    layout = layout_in(project, tmp_path_factory.mktemp("tracked"), fresh=True)
    cell = layout.experiment.cell("sap", 0)
    with open_run(layout, "prepare", "prepare-1") as run:
        run.log_facts({"task": {"train": 64, "name": "no number", "shuffled": True}, "overlap": 3})
    with pytest.raises(KeyboardInterrupt), open_run(layout, "sap-s0", "train-1", cell=cell) as run:
        for step in range(1, 6):
            run.log_metrics({"train/loss": 1.0 / step}, step)
        raise KeyboardInterrupt
    # resumed from the checkpoint of step 3
    with open_run(layout, "sap-s0", "train-1", cell=cell) as run:
        for step in range(4, 8):
            run.log_metrics({"train/loss": 1.0 / step}, step)
    with open_run(layout, "sap-s0", "train-1", cell=cell) as run:
        run.log_evaluation(
            {
                "non_refusal_rate": {"value": 0.25, "low": 0.1, "high": 0.5, "n": 20},
                "test_loss": 0.7,
            }
        )
    return layout, Store(layout)


def test_there_is_one_parent_and_one_child_per_key(tracked):
    _, store = tracked
    parents = [run for run in store.runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in store.runs if "mlflow.parentRunId" in run.data.tags]
    assert len(parents) == 1 and parents[0].info.run_name == "tiny"
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    assert sorted(run.info.run_name for run in children) == ["prepare", "sap-s0"]


def test_training_and_evaluation_share_a_row(tracked):
    metrics = tracked[1].run("train-1").data.metrics
    assert (
        metrics.items()
        >= {
            "evaluate/non_refusal_rate": 0.25,
            "evaluate/non_refusal_rate_low": 0.1,
            "evaluate/test_loss": 0.7,
        }.items()
    )
    assert (
        metrics["train/loss"] == pytest.approx(1 / 7)
        and tracked[1].run("train-1").info.status == "FINISHED"
    )


def test_a_resumed_run_doubles_no_step(tracked):
    assert tracked[1].history("train-1", "train/loss") == [
        (step, pytest.approx(1.0 / step)) for step in range(1, 8)
    ]


def test_facts_become_flat_numbers(tracked):
    assert tracked[1].run("prepare-1").data.metrics == {"task.train": 64.0, "overlap": 3.0}


def test_params_are_the_resolved_recipe(tracked):
    layout, store = tracked
    params, resolved = store.run("train-1").data.params, layout.experiment.cell("sap", 0).recipe
    assert (params["method"], params["seed"]) == ("sap", "0")
    assert params["sap.enabled"] == "True" and params["sap.schedule"] == "lagged", (
        "the method's override, not the file's"
    )
    for section in ("train", "sap"):
        for name, value in recipe.dump(resolved)[section].items():
            assert isinstance(value, dict) or params[f"{section}.{name}"] == str(value)
    assert params["train.lora.r"] == "8"
    assert (
        "method" not in store.run("prepare-1").data.params
        and store.run("prepare-1").data.params["sap.enabled"] == "False"
    )
    assert "sap.eps" in params and "sap.eps" not in store.run("prepare-1").data.params, (
        "settings that do nothing are not compared"
    )


def test_tags_are_versions_revision_and_data(tracked):
    layout, store = tracked
    for key in ("prepare-1", "train-1"):
        tags = store.run(key).data.tags
        assert {
            name: tags[f"version.{name}"] for name in artifacts.versions()
        } == artifacts.versions()
        assert (
            tags["data"] == layout.prepare().name
            and tags["prompts"] == layout.prompts().name
            and tags["git_revision"]
        )


@pytest.mark.parametrize("silent", ["rank 1", "switched off"])
def test_other_ranks_and_a_switched_off_tracker_write_nothing(project, tmp_path, silent):
    layout = layout_in(
        project, tmp_path / "out", fresh=True, tracking={"enabled": silent == "rank 1"}
    )
    with open_run(
        layout,
        "sft-s0",
        "train-1",
        rank=int(silent == "rank 1"),
        cell=layout.experiment.cell("sft", 0),
    ) as run:
        run.log_metrics({"train/loss": 1.0}, 1)
        run.log_facts({"a": 1})
        run.log_evaluation({"test_loss": 1.0})
        run.log_artifact(tmp_path / "nothing")
        run.event("resumed at step 3")
    assert not (tmp_path / "out").exists()


def test_the_data_are_named_by_their_digest(project, tmp_path):
    """Of the files' contents: the folder's name says what was asked for, not what was read."""
    layout = layout_in(project, tmp_path)
    with open_run(layout, "prepare", "before"):
        pass
    with artifacts.building(layout.prepare(), {}) as folder:
        (folder / "train.parquet").write_bytes(b"rows")
    with open_run(layout, "sft-s0", "after"):
        pass
    store = Store(layout)
    assert "data.sha256" not in store.run("before").data.tags
    expected = artifacts.digest(
        {"train.parquet": artifacts.file_digest(layout.prepare() / "train.parquet")}
    )
    assert store.run("after").data.tags["data.sha256"] == expected


def test_a_stopped_stage_is_killed_not_finished(project, tmp_path):
    layout = layout_in(project, tmp_path)
    with open_run(layout, "sft-s0", "train-1") as run:
        run.stopped()
    with open_run(layout, "sap-s0", "train-2", rank=1) as run:
        run.stopped()
    with pytest.raises(RuntimeError), open_run(layout, "sap-s0", "train-3") as run:
        raise RuntimeError
    store = Store(layout)
    assert (store.run("train-1").info.status, store.run("train-3").info.status) == (
        "KILLED",
        "FAILED",
    )
    with open_run(layout, "sft-s0", "train-1"):
        pass
    assert Store(layout).run("train-1").info.status == "FINISHED", "it went on and came to its end"


def test_events_are_numbered_tags_and_a_resumed_run_counts_on(project, tmp_path):
    layout, started = layout_in(project, tmp_path), int(time.time())
    with open_run(layout, "sap-s0", "train-1") as run:
        run.event("stopped at step 3 by SIGTERM")
        run.event("requeued")
        run.stopped()
    with open_run(layout, "sap-s0", "train-1") as run:
        run.event("resumed at step 3")
    with open_run(layout, "sft-s0", "train-2") as run:
        run.event("stopped at step 1 by SIGTERM")
    store = Store(layout)
    tags = {
        name: value.partition(" ")
        for name, value in store.run("train-1").data.tags.items()
        if name.startswith("event.")
    }
    assert {name: text for name, (_, _, text) in tags.items()} == {
        "event.001": "stopped at step 3 by SIGTERM",
        "event.002": "requeued",
        "event.003": "resumed at step 3",
    }
    assert "event.001" in store.run("train-2").data.tags, "every run has numbers of its own"
    times = [datetime.fromisoformat(tags[name][0]) for name in sorted(tags)]
    assert times == sorted(times) and all(at.utcoffset().total_seconds() == 0 for at in times)
    assert started <= times[0].timestamp() <= times[-1].timestamp() <= time.time()


def test_one_module_imports_mlflow():
    importing = [
        path.name
        for path in (ROOT / "pipeline").rglob("*.py")
        if re.search(r"^\s*(from|import) mlflow\b", path.read_text(), re.M)
    ]
    assert importing == ["mlflow_store.py"]


def test_the_parent_ends_with_its_last_running_child(project, tmp_path):
    layout = layout_in(project, tmp_path)
    with open_run(layout, "sft-s0", "a"):
        until(lambda: outbox(layout, "a").with_suffix(".delivered").is_file())
        with open_run(layout, "sap-s0", "b"):
            pass
        assert (
            Store(layout).run("b").info.status == "FINISHED"
            and Store(layout).parent.info.status == "RUNNING"
        )
    ended = Store(layout).parent
    assert ended.info.status == "FINISHED" and ended.info.end_time


def test_artifacts_are_found_again_whatever_their_path_looks_like(project, tmp_path, capfd):
    layout, elsewhere = layout_in(project, tmp_path / "first"), tmp_path / TOKEN / "notes.txt"
    inside = layout.root / TOKEN / "report.html"
    for path in (inside, elsewhere):
        path.parent.mkdir(parents=True)
        path.write_text("content")
    with open_run(layout, "report", "report-1") as run:
        for path in (inside, elsewhere, layout.root / "gone.html", layout.root / "gone.html"):
            run.log_artifact(path)
    assert sorted(Store(layout).artifacts("report-1")) == ["notes.txt", "report.html"]
    entries = [json.loads(line) for line in outbox(layout, "report-1").read_text().splitlines()]
    assert [entry["path"] for entry in entries if entry["kind"] == "artifact"] == [
        f"{TOKEN}/report.html",
        str(elsewhere),
        *["gone.html"] * 2,
    ]
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert (
        len(warnings) == 1
        and "gone.html was to be uploaded to MLflow, but it is no longer there" in warnings[0]
    )


def test_a_metric_under_a_secret_looking_name_is_a_number(project, tmp_path):
    layout = layout_in(project, tmp_path)
    with open_run(layout, "sft-s0", "train-1") as run:
        run.log_metrics({"seconds_per_token": 0.5}, 1)
        run.log_facts({"per": {"token": 2.0}})
    assert Store(layout).run("train-1").data.metrics == {"seconds_per_token": 0.5, "per.token": 2.0}


@pytest.fixture(scope="module")
def planted(project, tmp_path_factory) -> tuple[Path, Path, str]:
    """`sap prepare` with secrets in a source, a tracking URI, a method and the recipe's path:
    recipe, output folder, everything printed.
    """
    folder, content = tmp_path_factory.mktemp("planted"), copy.deepcopy(project[1])
    (folder / TOKEN).mkdir()
    content["data"]["task"]["source"] = str(
        shutil.copy(content["data"]["task"]["source"], folder / TOKEN)
    )
    content["methods"]["sft"] = {
        "train": {"ds_config": str(shutil.copy(project[0] / "zero3.json", folder / TOKEN))}
    }
    content |= {
        "output_dir": str(folder / "runs"),
        "tracking": {"uri": f"http://ann:{PASSWORD}@127.0.0.1:{closed_port()}"},
    }
    path = write_recipe(folder / TOKEN, content)  # its path becomes a tag
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        contextlib.redirect_stderr(printed),
        pytest.MonkeyPatch.context() as patch,
    ):
        assert main(["prepare", str(path)]) == 0, printed.getvalue()
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
        layout = Layout(recipes.load(path))
        with open_run(layout, "sft-s0", "train-1", cell=layout.experiment.cell("sft", 0)) as run:
            run.event(f"requeued by http://ann:{PASSWORD}@queue:80 with {TOKEN}")
    return path, folder / "runs", printed.getvalue()


def test_no_secret_is_in_outbox_manifest_or_store(planted):
    _, output, printed = planted
    files = [
        *output.rglob("tracking/*"),
        *output.rglob("manifest.json"),
        *output.rglob("facts.json"),
        output / "mlflow.db",
    ]
    assert {"manifest.json", "train-1.jsonl", "mlflow.db"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert TOKEN.encode() not in content and PASSWORD.encode() not in content, path
    assert TOKEN not in printed and PASSWORD not in printed and "[redacted]@127.0.0.1" in printed, (
        "the warning names the server"
    )


def test_no_secret_is_in_params_or_tags_but_what_surrounds_it_is(planted):
    path, _, _ = planted
    store = Store(Layout(recipes.load(path)))
    texts = [
        text
        for run in store.runs
        for part in (run.data.params, run.data.tags)
        for text in (*part.keys(), *part.values())
    ]
    assert len(texts) > 100 and not [text for text in texts if TOKEN in text or PASSWORD in text]
    params = store.run("train-1").data.params
    assert (
        params["data.task.source"].endswith("/[redacted]/task.jsonl")
        and "[redacted]@127.0.0.1" in params["tracking.uri"]
    )
    assert (
        store.run("train-1")
        .data.tags["event.001"]
        .endswith(" requeued by http://[redacted]@queue:80 with [redacted]")
    )


def test_no_secret_is_in_the_dump_the_dry_run_or_the_stores_description(planted, capsys):
    path, _, _ = planted
    experiment = recipes.load(path)
    assert TOKEN in experiment.base.data.task.source, "the run itself needs it"
    dumped = json.dumps(
        [
            recipe.dump(experiment.base),
            *(recipe.dump(cell.recipe) for cell in experiment.cells()),
            describe_store(experiment.base),
        ]
    )
    assert main(["run", str(path), "--show"]) == 0
    shown = "".join(capsys.readouterr())
    assert main(["run", str(path), "--dry-run"]) == 0
    looked = "".join(capsys.readouterr())
    assert "would run" in looked and all(
        TOKEN not in text and PASSWORD not in text for text in (dumped, shown, looked)
    )
    assert "[redacted]" in dumped and "[redacted]" in shown


def test_a_secret_looking_key_in_a_method_is_hidden_and_refused(planted, capsys):
    """No section has such a field, so it is an error; the error names the key and keeps its value to itself."""
    path, _, _ = planted
    base = recipes.load(path).base
    overridden = base.model_copy(update={"methods": {"sft": {"train": {"api_key": KEY}}}})
    assert recipe.dump(overridden)["methods"] == {"sft": {"train": {"api_key": "[redacted]"}}}
    assert main(["run", str(path), "--dry-run", "--methods.sft.train.api_key", KEY]) == 2
    shown = "".join(capsys.readouterr())
    assert "unknown key 'train.api_key'" in shown and KEY not in shown


@pytest.mark.parametrize("there", [False, True])
def test_a_database_that_a_full_disk_left_half_made_is_taken_away_and_an_old_one_is_not(
    tmp_path, monkeypatch, there
):
    """MLflow refuses one with a part of its tables ever after, also when there is room again."""
    import mlflow

    def full(tracking_uri: str) -> None:
        Path(tracking_uri.removeprefix("sqlite:///")).touch()
        raise OSError(28, "database or disk is full")

    if there:
        (tmp_path / "mlflow.db").touch()
    monkeypatch.setattr(mlflow, "MlflowClient", full)
    with pytest.raises(OSError, match="full"):
        mlflow_store.Store(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path, print)
    assert [path.name for path in tmp_path.iterdir() if "mlflow.db" in path.name] == [
        "mlflow.db"
    ] * there


KILLED = """
import os, sys
from pathlib import Path
from alembic.runtime.environment import EnvironmentContext
from pipeline.tracking.mlflow_store import Store

def killed(self, **options):  # some of the tables are there, and the rest would come now
    os._exit(9)

EnvironmentContext.run_migrations = killed
Store(f"sqlite:///{sys.argv[1]}/mlflow.db", Path(sys.argv[1]), print)
"""


def test_a_kill_while_the_database_is_made_leaves_none(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 9, done.stderr
    assert list(tmp_path.glob(".mlflow.db.*.new")) and not (tmp_path / "mlflow.db").exists()
    mlflow_store.Store(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path, print)
    assert (tmp_path / "mlflow.db").exists() and not list(tmp_path.glob(".mlflow.db.*"))
