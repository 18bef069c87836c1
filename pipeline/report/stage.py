"""The stage that makes the report. It needs no torch: where everything is complete, the table is there in a second."""

from __future__ import annotations

from pathlib import Path

from pipeline import artifacts
from pipeline.recipe.recipe import Experiment
from pipeline.stages import STAGES
from pipeline.stages.layout import Layout
from pipeline.stages.stage import Stage, unit
from pipeline.tracking.run import open_run


def report(experiment: Experiment) -> Path:
    """The page, its pictures and the table, from complete folders only. Returns the folder."""
    layout = Layout(experiment)
    target = layout.report()
    if artifacts.complete(target):
        return target
    from pipeline.report.build import build_report  # matplotlib
    from pipeline.report.collect import collect

    collected = collect(layout)
    inputs = {
        layout.evaluate(subject).name: artifacts.source(layout.evaluate(subject))
        for subject in layout.subjects()
    }
    claimed = artifacts.claim_incomplete(target)
    if claimed is None:
        return target
    with open_run(layout, "report", target.name) as run:
        with artifacts.building(target, inputs, claimed) as folder:
            build_report(collected, folder)
        run.log_artifact(target / "report.html")
    return target


REPORT = Stage(
    "report",
    lambda layout: iter([unit(layout, "report", layout.report())]),
    report,
    ("prepare", "align", "train", "evaluate"),
)
ALL_STAGES = {**STAGES, REPORT.name: REPORT}
