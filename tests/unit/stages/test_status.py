"""`sap status`: how far every folder is, for people and for the job scripts."""

import sys
from pathlib import Path

import pytest

from pipeline import artifacts
from pipeline.cli import main
from pipeline.defences import recipes
from pipeline.report.stage import ALL_STAGES
from pipeline.stages.chain import Chain
from pipeline.stages.layout import Layout
from pipeline.stages.status import units
from tests.project import make_project, write_recipe


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("status")
    return write_recipe(folder, make_project(folder))


def lines(capsys, *arguments: str | Path) -> list[list[str]]:
    assert main(["status", *map(str, arguments)]) == 0
    return [
        line.split("\t")
        for line in capsys.readouterr().out.splitlines()
        if not line.startswith("#")
    ]


def test_every_folder_stands_in_the_order_of_the_stages(project, capsys):
    found = lines(capsys, project)
    assert [(row[0], row[1], row[2]) for row in found] == [
        ("prepare", "-", "-"), ("align", "-", "-"), ("direction", "sap", "0"), ("train", "sft", "0"),
        ("train", "sap", "0"), ("evaluate", "shipped", "-"), ("evaluate", "aligned", "-"), ("evaluate", "sft", "0"),
        ("evaluate", "sap", "0"), ("report", "-", "-"),
    ]  # fmt: skip
    layout = Layout(recipes.load(project))
    assert found[0][3:] == ["missing", str(layout.prepare()), str(layout.work(layout.prepare()))]


def test_states(project, capsys, tmp_path):
    experiment = recipes.load(project, {"output_dir": str(tmp_path)})
    layout = Layout(experiment)
    layout.prepare().mkdir(parents=True)
    (layout.prepare() / artifacts.MARKER).touch()
    work = layout.work(layout.train(experiment.cell("sap", 0)))
    for number, marked in ((2, True), (10, True), (12, False)):
        checkpoint = work / "checkpoints" / f"step-{number:06d}"
        checkpoint.mkdir(parents=True)
        if marked:
            (checkpoint / artifacts.MARKER).touch()
    states = {
        (row[0], row[1]): row[3] for row in lines(capsys, project, f"--output_dir={tmp_path}")
    }
    assert (
        states["prepare", "-"] == "complete"
        and states["train", "sap"] == "step 10"
        and states["train", "sft"] == "missing"
    )


def test_prompts_that_are_missing_hold_up_no_stage_but_are_prepares(project, capsys, tmp_path):
    """slurm/submit.sh reads one line of prepare, the training sets': an evaluation makes the prompts itself."""
    experiment = recipes.load(project, {"output_dir": str(tmp_path)})
    layout = Layout(experiment)
    chain = Chain(experiment, ALL_STAGES, None)
    assert chain.pending("prepare") == [layout.prepare(), layout.prompts()]
    with pytest.raises(ValueError, match=r"prepare-.* is not complete: run `sap prepare"):
        chain.need("align")
    layout.prepare().mkdir(parents=True)
    (layout.prepare() / artifacts.MARKER).touch()
    chain.need("align")
    assert chain.pending("prepare") == [layout.prompts()]
    found = lines(capsys, project, "--stage", "prepare", f"--output_dir={tmp_path}")
    assert [(row[0], row[3], row[4]) for row in found] == [
        ("prepare", "complete", str(layout.prepare()))
    ]


def test_a_folder_that_methods_share_is_made_by_the_first(project):
    experiment = recipes.load(
        project, {"methods": {"again": {"sap": {"enabled": True, "eps": 0.3}}, "same": {}}}
    )
    units = Chain(experiment, ALL_STAGES, None).units("direction")
    assert [unit.method for unit in units] == ["sap"], (
        "one direction serves every method that has SAP"
    )
    assert [unit.method for unit in Chain(experiment, ALL_STAGES, "again").units("direction")] == [
        "again"
    ]


def test_one_cell_one_stage_and_some_methods(project, capsys):
    assert [
        row[:3]
        for row in lines(capsys, project, "--stage", "train", "--method", "sap", "--seed", "0")
    ] == [["train", "sap", "0"]]
    assert [
        row[1] for row in lines(capsys, project, "--stage", "evaluate", "--method", "aligned")
    ] == ["aligned"]
    assert [row[1] for row in lines(capsys, project, "--stage", "train", "--methods", "sft")] == [
        "sft"
    ]


def test_a_report_of_some_methods_is_another_one_and_everything_else_the_same(project):
    experiment = recipes.load(project)
    whole, part = (
        {(u.stage, u.method): u.folder for u in units(e, ALL_STAGES)}
        for e in (experiment, experiment.only(["sap"]))
    )
    assert whole["report", "-"] != part["report", "-"] and ("train", "sft") not in part
    assert all(whole[key] == part[key] for key in part if key[0] != "report")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["status", "RECIPE", "--methods", "sft,nothing"], "no method 'nothing'"),
        (
            ["status", "RECIPE", "--portable", "--model.dtype=auto"],
            "model.dtype auto means something else on another machine: set it to bfloat16",
        ),
        (
            ["status", "RECIPE", "--portable", "--model.attention=auto"],
            "model.attention auto means something else on another machine: set it to sdpa",
        ),
        (
            ["status", "RECIPE", "--portable", "--model.dtype=auto", "--model.attention=auto"],
            "model.dtype auto and model.attention auto mean something else on another machine: "
            "set model.dtype to bfloat16 or float32, and model.attention to sdpa or eager",
        ),
        (
            ["trian", "RECIPE"],
            "there is no command 'trian': the nearest is train, and all are prepare, align, filter, direction, train, "
            "evaluate, report, run, status, track, plan, doctor, data, template, bench, stages, recipes",
        ),
        (["RECIPE"], "there is no command"),
        (
            ["train", "RECIPE", "--stage", "train"],
            "--stage would do nothing in `sap train`, and belongs to `sap status`",
        ),
    ],
)
def test_refusals(project, capsys, arguments, sentence):
    assert main([str(project) if part == "RECIPE" else part for part in arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_the_store_is_named_for_people(project, capsys):
    main(["status", str(project)])
    comment = capsys.readouterr().out.splitlines()[-1]
    assert comment.startswith("# mlflow") and "experiment tiny" in comment and "sap-s0" in comment


def test_a_recipe_of_many_methods_is_checked_once_a_cell(project, monkeypatch):
    """Each cell is validated as it is made: hundreds of them, for each folder, took minutes."""
    methods = {f"m{number}": {"sap": {"enabled": True}} for number in range(20)}
    experiment = recipes.load(project, {"methods": methods})
    made, cell = [], type(experiment).cell
    monkeypatch.setattr(
        type(experiment), "cell", lambda self, *given: (made.append(given), cell(self, *given))[1]
    )
    chain = Chain(experiment, ALL_STAGES, None)
    begun = len(made)
    for stage in ALL_STAGES:
        chain.pending(stage)
    layout_makes = len(made) - begun
    assert layout_makes <= len(ALL_STAGES) * begun, "not for each folder"


def test_a_report_that_is_there_is_not_shown_where_what_it_reports_is_gone(
    project, tmp_path, capsys
):
    experiment = recipes.load(project, {"output_dir": str(tmp_path)})
    layout = Layout(experiment)
    chain = Chain(experiment, ALL_STAGES, None)
    for stage in ALL_STAGES:
        for unit in chain.units(stage):
            unit.folder.mkdir(parents=True, exist_ok=True)
            (unit.folder / artifacts.MARKER).touch()
    gone = layout.evaluate(next(iter(layout.subjects())))
    (gone / artifacts.MARKER).unlink()
    assert main(["report", str(project), f"--output_dir={tmp_path}"]) == 2
    assert f"{gone} is not complete: run `sap evaluate" in capsys.readouterr().err


def test_filters_wait_for_embeddings_only_where_they_are_missing(project, tmp_path):
    changes = {
        "output_dir": str(tmp_path),
        "methods": {
            "one": {"saft": {"enabled": True}},
            "two": {"saft": {"enabled": True, "min_auroc": 0.1}},
        },
    }
    chain = Chain(recipes.load(project, changes), ALL_STAGES, None)
    units = [unit for unit in chain.units("filter") if unit.method in ("one", "two")]
    waves = ALL_STAGES["filter"].waves(chain.layout, units)
    assert [[unit.method for unit in wave] for wave in waves] == [["one"], ["two"]]
    shared = chain.layout.embeddings(units[0].cell)
    shared.mkdir(parents=True)
    (shared / artifacts.MARKER).touch()
    waves = ALL_STAGES["filter"].waves(chain.layout, units)
    assert [[unit.method for unit in wave] for wave in waves] == [[], ["one", "two"]]


@pytest.mark.parametrize(
    ("arguments", "header"),
    [
        (["stages"], "# stage\twhere it runs\tfor each method and seed\tsaves\tneeds"),
        (["status"], "# stage\tmethod\tseed\tstate\tfolder\twork folder"),
    ],
)
def test_a_header_is_for_terminals_only(project, capsys, monkeypatch, arguments, header):
    arguments = [*arguments, *([str(project)] if arguments == ["status"] else [])]
    assert main(arguments) == 0
    plain = capsys.readouterr().out
    assert "# stage" not in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{header}\n{plain}"
    columns = plain.splitlines()[0].split("\t")
    assert len(columns) == len(header.split("\t"))
