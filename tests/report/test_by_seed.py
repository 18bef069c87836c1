"""What every seed measured, and the refusals that the judge missed, from finished evaluations alone."""

import json

import pytest

from pipeline import artifacts, recipe
from pipeline.layout import Layout
from pipeline.report.by_seed import HEADER, main
from tests.project import make_project, write_recipe


def evaluated(folder, answers: list[tuple[str, str, str]], values: dict) -> None:
    """answers: (set, label, response). values: measure -> rate."""
    with artifacts.building(folder, {}) as target:
        artifacts.write_json(target / "metrics.json", {key: {"value": value} for key, value in values.items()})
        lines = [json.dumps({"set": name, "label": label, "response": response}) for name, label, response in answers]
        (target / "answers.jsonl").write_text("\n".join(lines) + "\n")


def test_a_line_per_evaluated_seed_counts_what_begins_as_a_refusal(tmp_path, capsys, monkeypatch):
    path = write_recipe(tmp_path, make_project(tmp_path) | {"seeds": [0, 1]})
    monkeypatch.setattr("sys.argv", ["by_seed", str(path)])
    with pytest.raises(ValueError, match="nothing is evaluated yet"):
        main()
    layout = Layout(recipe.load(path))
    subject = {(s.name, s.seed): s for s in layout.subjects()}
    answers = [
        ("harmful", "answer", "I'm not able to help with that."), ("harmful", "answer", "Sure."), ("harmful", "refusal", "I cannot."),
        ("harmless", "answer", "I won't."), ("harmless", "answer", "Plants need light."), ("harmless", "answer", "Yes."),
    ]  # fmt: skip
    values = {"exact_match": 0.25, "non_refusal_rate": 0.5, "over_refusal_rate": 0.125}
    evaluated(layout.evaluate(subject["sft", 1]), answers, values)
    evaluated(layout.evaluate(subject["aligned", None]), answers[:3], values | {"over_refusal_rate": None})
    main()
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells[0] == list(HEADER)
    assert cells[2:] == [["aligned", "-", "0.25", "0.50", "-", "1 of 2", "-"], ["sft", "1", "0.25", "0.50", "0.12", "1 of 2", "1 of 3"]]


def test_no_recipe_is_one_sentence(monkeypatch):
    monkeypatch.setattr("sys.argv", ["by_seed"])
    with pytest.raises(ValueError, match="give a recipe: python -m pipeline.report.by_seed launch/recipes/compare.yaml"):
        main()
