"""Two of the same command at once: what one has made by the time the other may begin is not made again."""

import pytest

from pipeline import artifacts
from pipeline.defences import recipes
from pipeline.stages import direction, evaluate, on_ranks, prepare, train
from pipeline.stages.layout import Layout
from tests.project import make_project, sap, write_recipe


def test_who_claims_late_finds_it_complete(tmp_path):
    target = tmp_path / "stage"
    release = artifacts.claim_incomplete(target)
    with artifacts.building(target, {}, release) as folder:
        (folder / "data.txt").write_text("x")
    assert artifacts.claim_incomplete(target) is None
    assert [path.name for path in tmp_path.iterdir()] == ["stage"], "the lock is given back"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A project without alignment, on engine single, with a trained and evaluated plain method and its direction."""
    folder = tmp_path_factory.mktemp("races")
    raw = make_project(folder)
    raw["align"] = {"enabled": False}
    raw["train"] |= {"engine": "single", "ranks": 1, "steps": 2}
    raw["evaluate"] |= {"baselines": False}
    path = write_recipe(folder, raw)
    assert sap("run", path, "--methods", "sap").returncode == 0
    return recipes.load(path)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("stage", ["train", "direction", "prepare", "evaluate", "report"])
def test_a_stage_that_looked_before_another_run_completed_it_makes_nothing(
    trained, monkeypatch, stage
):
    """The other run completes the folder between this one's first look and its claim."""
    layout = Layout(trained)
    cell = trained.cell("sap", 0)
    subject = layout.subject(cell)
    from pipeline.report import stage as report_stage

    one = recipes.load(trained.path, {"methods": {"sft": None}}) if stage == "report" else trained
    target, run = {
        "train": (layout.train(cell), lambda: train.train(trained, cell)),
        "direction": (layout.direction(cell), lambda: direction.direction(trained, cell)),
        "prepare": (layout.prepare(), lambda: prepare.prepare(trained)),
        "evaluate": (layout.evaluate(subject), lambda: evaluate.evaluate(trained, subject)),
        "report": (Layout(one).report(), lambda: report_stage.report(one)),
    }[stage]
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    assert before and artifacts.complete(target)
    original, looks = artifacts.complete, []

    def late(folder):
        if folder == target and not looks:
            looks.append(folder)
            return False
        return original(folder)

    monkeypatch.setattr(artifacts, "complete", late)
    monkeypatch.setattr(on_ranks, "start_engine", lambda *args: pytest.fail("a model was loaded"))
    monkeypatch.setattr(evaluate, "load_whole", lambda *args: pytest.fail("a model was loaded"))
    assert run()
    assert looks and {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("stage", ["train", "direction"])
def test_ranks_meet_before_one_finds_the_stage_complete(trained, monkeypatch, stage, seen):
    """A rank that left by itself would let the others wait for it;
    one that sees an old state of the folder goes by what the first sees.
    """
    layout, cell, met = Layout(trained), trained.cell("sap", 0), []
    target = {"train": layout.train(cell), "direction": layout.direction(cell)}[stage]
    original = artifacts.complete
    monkeypatch.setattr(
        artifacts, "complete", lambda folder: seen if folder == target else original(folder)
    )
    monkeypatch.setattr(on_ranks, "environment", lambda: (1, 2))
    monkeypatch.setattr(on_ranks, "init_distributed", lambda section: met.append(section))
    monkeypatch.setattr(on_ranks, "from_first", lambda value: False)
    monkeypatch.setattr(on_ranks, "start_engine", lambda *args: pytest.fail("a model was loaded"))
    assert {"train": train.train, "direction": direction.direction}[stage](trained, cell) is True
    assert met == [cell.recipe.train]
