"""What every seed measured, from finished evaluations alone."""

import pytest

from pipeline import artifacts
from pipeline.defences import recipes
from pipeline.report.by_seed import HEADER, main
from pipeline.stages.layout import Layout
from tests.project import make_project, write_recipe


def evaluated(folder, values: dict) -> None:
    """values: measure -> rate."""
    with artifacts.building(folder, {}) as target:
        artifacts.write_json(
            target / "metrics.json", {key: {"value": value} for key, value in values.items()}
        )


def test_a_line_per_evaluated_seed(tmp_path, capsys, monkeypatch):
    path = write_recipe(tmp_path, make_project(tmp_path) | {"seeds": [0, 1]})
    monkeypatch.setattr("sys.argv", ["by_seed", str(path)])
    with pytest.raises(ValueError, match="nothing is evaluated yet"):
        main()
    layout = Layout(recipes.load(path))
    subject = {(s.name, s.seed): s for s in layout.subjects()}
    values = {
        "exact_match": 0.25,
        "non_refusal_rate": 0.5,
        "over_refusal_rate": 0.125,
        "ordinary_refusal_rate": 0.0,
    }
    evaluated(layout.evaluate(subject["sft", 1]), values)
    evaluated(layout.evaluate(subject["aligned", None]), values | {"over_refusal_rate": None})
    main()
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells[0] == list(HEADER)
    assert cells[2:] == [
        ["aligned", "-", "0.25", "0.50", "-", "0.00"],
        ["sft", "1", "0.25", "0.50", "0.12", "0.00"],
    ]


def test_no_recipe_is_one_sentence(monkeypatch):
    monkeypatch.setattr("sys.argv", ["by_seed"])
    with pytest.raises(
        ValueError,
        match=r"give a recipe: python -m pipeline.report.by_seed launch/recipes/compare.yaml",
    ):
        main()
