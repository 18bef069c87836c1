"""Cheaper SAP steps beside the exact one: what is measured, and that measuring leaves no trace."""

import pytest

from pipeline.bench import levers
from pipeline.bench.levers import HEADER, Levers, Row, table
from pipeline.defences import recipes
from tests.project import make_project, run, sap, write_recipe

pytestmark = [pytest.mark.processes, pytest.mark.slow]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The recipe of a prepared project without alignment; SAP's exact schedule, two steps a direction."""
    folder = tmp_path_factory.mktemp("levers")
    raw = make_project(folder)
    raw["align"] = {"enabled": False}
    raw["train"] |= {"engine": "single", "ranks": 1}
    raw["methods"]["sap"]["sap"] |= {"schedule": "exact", "direction": "live"}
    raw["safety_pairs"]["refresh_every"] = 2
    path = write_recipe(folder, raw)
    assert sap("prepare", path).returncode == 0
    return path


def rows(path, at, **changes) -> list[Row]:
    experiment = recipes.load(path, changes)
    return list(Levers(experiment, experiment.cell("sap", 0)).measured(at))


def test_every_way_stands_beside_the_exact_one_and_measuring_leaves_no_trace(prepared):
    both = rows(prepared, [2, 4])
    found = {row.way: row for row in both if row.step == 4}
    assert list(found) == [
        "exact", "of 4 of 8 samples", "of 2 of 8 samples", "of 1 of 8 samples", "with the direction of 1 steps before",
        "of 1 step before", "of 2 steps before",
    ]  # fmt: skip
    assert (found["exact"].v, found["exact"].size) == (1.0, 1.0)

    def values(row):
        return (row.step, row.way, row.v, row.correction, row.gradient, row.size)

    assert [values(row) for row in both if row.step == 4] == [
        values(row) for row in rows(prepared, [4])
    ]
    assert all(-1 <= value <= 1 for row in both for value in (row.v, row.correction, row.gradient))
    assert all(row.v < 0.999 for row in both if row.way != "exact"), (
        "every other way must be another V"
    )


def test_a_cheap_v_that_is_exact_has_cosine_one(prepared, monkeypatch):
    """All samples, asked for as a share, are the exact way: the cosines measure what they say."""
    monkeypatch.setattr(levers, "SHARES", (1.0,))
    found = {row.way: row for row in rows(prepared, [2])}
    whole = found["of 8 of 8 samples"]
    assert (whole.v, whole.correction, whole.gradient, whole.size) == pytest.approx(
        (1, 1, 1, 1), abs=1e-6
    )


def test_the_table_ends_with_medians():
    two = [
        Row(step, "exact", 1.0, 1.0, 1.0, 1.0, seconds) for step, seconds in ((1, 2.0), (2, 4.0))
    ]
    lines = table(two).splitlines()
    assert all(name in lines[0] for name in HEADER)
    assert lines[-1].split() == ["median", "exact", "1.00", "1.00", "1.00", "1.00", "3.00"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--at", "0"], "--at is '0': it takes steps"),
        (["--at", "7"], "--at names step 7, and the training has 6"),
        (["--at", "2", "--methods.sap.sap.schedule", "lagged"], "not SAP with schedule exact"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(prepared, arguments, words):
    ended = run(
        ["-m", "pipeline.bench.levers", str(prepared), "--method", "sap", "--seed", "0", *arguments]
    )
    assert ended.returncode == 2 and words in ended.stderr and "Traceback" not in ended.stderr
