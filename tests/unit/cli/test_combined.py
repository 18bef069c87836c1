"""Methods together, through the real commands: a filter, SAP and an average in one cell;
a mix with momentum in another; the report of both.
"""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
from safetensors.torch import load_file

from pipeline.data.sets import read_rows
from pipeline.defences import recipes
from pipeline.evaluation.evaluate import token_loss
from pipeline.model.loading import load_whole
from pipeline.stages.layout import Layout
from pipeline.training.product import load_adapter
from tests.project import make_project, sap, write_recipe

pytestmark = [pytest.mark.processes, pytest.mark.slow]

SAFT = {
    "enabled": True,
    "labelled": 50,
    "min_auroc": 0.0,
    "min_precision": 0.0,
    "position": "response_end",
}
EMA = {"enabled": True, "decay": 0.6}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("combined")
    content = make_project(folder)
    content["align"]["enabled"] = content["evaluate"]["baselines"] = False
    with_sap = content["methods"]["sap"]["sap"]
    content["methods"] = {
        "sft": {"train": {"engine": "single", "ranks": 1}},
        "combined": {"sap": with_sap, "saft": SAFT, "ema": EMA},
        "mixed": {
            "train": {"engine": "fsdp2"},
            "safety_pairs": {"refresh_every": 2},
            "safe_mix": {"enabled": True},
            "ema": {**EMA, "mode": "momentum"},
        },
    }
    path = write_recipe(folder, content)
    found = sap("run", path)
    assert found.returncode == 0, found.stderr
    return path


@pytest.fixture(scope="module")
def layout(project) -> Layout:
    return Layout(recipes.load(project))


def log(layout: Layout, method: str) -> list[dict]:
    return [
        json.loads(line)
        for line in (layout.train(layout.experiment.cell(method, 0)) / "metrics.jsonl")
        .read_text()
        .splitlines()
    ]


def test_the_filter_left_out_what_it_says(layout):
    cell = layout.experiment.cell("combined", 0)
    table = pyarrow.parquet.read_table(layout.filter(cell) / "scores.parquet").to_pylist()
    facts = json.loads((layout.filter(cell) / "facts.json").read_text())
    assert [entry["id"] for entry in table] == [
        row["id"] for row in read_rows(layout.prepare(), "task_train")
    ]
    assert (
        facts["dropped"] == sum(entry["dropped"] for entry in table) > 0
        and facts["position"] == "response_end"
    )
    assert load_file(layout.embeddings(cell) / "embeddings.safetensors")["embeddings"].shape == (
        len(table),
        32,
    )


def test_another_threshold_takes_the_embeddings_that_are_there(project, layout):
    folder = layout.embeddings(layout.experiment.cell("combined", 0))
    before = folder.stat().st_mtime_ns
    found = sap("filter", project, "--methods.combined.saft.max_dropped=0.01")
    assert found.returncode == 0 and folder.stat().st_mtime_ns == before
    assert (
        len(list(folder.parent.glob("filter-*"))) == 2
        and len(list(folder.parent.glob("embeddings-*"))) == 1
    )


def test_a_filter_that_cannot_tell_keeps_its_scores_and_its_cells_do_not_train(project, layout):
    arguments = (
        "--methods.combined.saft.min_auroc=1.0",
        "--methods.combined.saft.position=response_start",
        "--methods.combined.saft.layer=0",
    )
    found = sap("filter", project, *arguments)
    assert (
        found.returncode == 0
        and "warning: saft refuses to filter: its AUROC on 50 labelled samples is" in found.stderr
    )
    training = sap("train", project, "--method", "combined", *arguments)
    assert training.returncode == 2 and training.stderr.count("error: saft refuses to filter") == 1
    before = {prefix: set(layout.root.glob(f"{prefix}-*")) for prefix in ("evaluate-sft", "report")}
    whole = sap("run", project, *arguments, "--methods.sft.train.steps=2")
    assert (
        whole.returncode == 2
        and "not trained: train-combined-s0-" in whole.stderr
        and "Traceback" not in whole.stderr
    )
    assert len(set(layout.root.glob("evaluate-sft-*")) - before["evaluate-sft"]) == 1, (
        "the cell that trained is evaluated"
    )
    assert set(layout.root.glob("report-*")) == before["report"]
    scores = sorted(
        layout.root.glob("filter-*/scores.parquet"), key=lambda path: path.stat().st_mtime_ns
    )[-1]
    assert not any(pyarrow.parquet.read_table(scores).column("dropped").to_pylist())


def test_the_product_is_the_average(layout):
    """Its validation loss is the one that was logged under the average."""
    base, rows = layout.base, read_rows(layout.prepare(), "task_validation")
    for method in ("sft", "combined"):
        subject = layout.subject(layout.experiment.cell(method, 0))
        model = load_adapter(load_whole(base.model, subject.model), subject.adapter)
        loss, _ = token_loss(model, rows, 0, 8)
        assert loss == pytest.approx(log(layout, method)[-1]["validation/task_loss"], rel=1e-5)


def test_budgets_are_logged_and_stand_in_the_report(layout):
    assert [line["safety/pairs"] for line in log(layout, "mixed")[1:]] == [4, 0, 4, 0, 4, 0]
    page = (layout.report() / "report.html").read_text()
    assert "<li>sft: 0</li>" in page and "<li>mixed: 12</li>" in page
    assert "What the filter of combined sees" in page and "Method minus reference" in page
    compared = json.loads((layout.report() / "differences.json").read_text())
    assert [(row["method"], row["minus"]) for row in compared] == [
        ("combined", "sft"),
        ("mixed", "sft"),
    ]


def test_a_comparison_in_mlflow_shows_the_settings_that_act(layout):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{layout.base.output_dir.absolute()}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    params = {
        run.data.params["method"]: run.data.params for run in runs if "method" in run.data.params
    }
    assert (
        params["combined"]["ema.decay"] == "0.6"
        and params["combined"]["saft.layer"] == "0.5"
        and params["combined"]["sap.schedule"] == "lagged"
    )
    assert (
        params["sft"]["ema.enabled"] == "False"
        and "ema.decay" not in params["sft"]
        and "safety_pairs.refresh_every" not in params["sft"]
    )
    assert params["mixed"]["safety_pairs.refresh_every"] == "2" and "sap.eps" not in params["mixed"]
