"""The rule by which a method's setting is chosen, over finished runs only."""

from pipeline import artifacts, recipe
from pipeline.layout import Layout
from pipeline.report.tuning import Run, chosen, runs, table
from tests.project import make_project, write_recipe


def test_the_highest_exact_match_minus_non_refusal_wins_and_of_equals_the_first():
    found = [Run("a", "x", 0.9, 0.8), Run("a", "y", 0.6, 0.1), Run("a", "z", 0.7, 0.2), Run("b", "x", 0.1, 0.9)]
    assert {method: run.setting for method, run in chosen(found).items()} == {"a": "y", "b": "x"}
    lines = table(found).splitlines()
    assert [line.split()[1] for line in lines if line.endswith("chosen")] == ["y", "x"]
    assert "0.60" in lines[3] and "+0.50" in lines[3]


def test_only_settings_evaluated_with_every_seed_count(tmp_path):
    content = make_project(tmp_path) | {"seeds": [0, 1], "methods": {"sft": {"grid": {"train.lr": [0.1, 0.2]}}, "plain": {}}}
    layout = Layout(recipe.load(write_recipe(tmp_path, content)))
    for subject in layout.subjects():
        if subject.trained is None or (subject.name, subject.seed) == ("sft.lr_0.2", 1):
            continue
        with artifacts.building(layout.evaluate(subject), {}) as folder:
            values = {"exact_match": 0.5 + 0.2 * subject.seed, "non_refusal_rate": 0.1}
            artifacts.write_json(folder / "metrics.json", {key: {"value": value} for key, value in values.items()})
    found, missing = runs(layout)
    assert missing == {"sft"} and {(run.method, run.setting) for run in found} == {("sft", "lr_0.1"), ("plain", "as it is")}
    assert "best so far" in table(found, missing) and table(found, missing).splitlines()[-1].endswith("chosen")
    assert all(abs(run.score - 0.5) < 1e-9 for run in found), "the mean over seeds"
