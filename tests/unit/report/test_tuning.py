"""The rule by which a method's setting is chosen, over finished runs only."""

from pipeline import artifacts
from pipeline.defences import recipes
from pipeline.report.tuning import Run, chosen, main, runs, table
from pipeline.stages.layout import Layout
from tests.project import make_project, write_recipe


def test_the_highest_exact_match_minus_both_refusal_errors_wins_and_of_equals_the_first():
    found = [
        Run("a", "x", 0.9, 0.8, 0.0, 0.0), Run("a", "y", 0.6, 0.1, 0.25, 0.0), Run("a", "z", 0.7, 0.2, 0.0, 0.25),
        Run("a", "v", 0.9, 0.0, 0.4, 0.8), Run("b", "x", 0.1, 0.9, 0.0, 0.0),
    ]  # fmt: skip
    assert {method: run.setting for method, run in chosen(found).items()} == {"a": "y", "b": "x"}
    lines = table(found).splitlines()
    assert [line.split()[1] for line in lines if line.endswith("chosen")] == ["y", "x"]
    assert lines[3].split()[2:] == ["0.60", "0.10", "0.25", "0.00", "+0.38", "chosen"]


def test_without_harmless_prompts_the_score_is_of_the_other_two_and_that_is_said(
    tmp_path, capsys, monkeypatch
):
    content = make_project(tmp_path)
    content["evaluate"]["split"] = "validation"
    path = write_recipe(tmp_path, content)
    write_metrics(
        Layout(recipes.load(path)),
        lambda subject: {
            "exact_match": 0.5,
            "non_refusal_rate": 0.125,
            "over_refusal_rate": None,
            "ordinary_refusal_rate": None,
        },
    )
    monkeypatch.setattr("sys.argv", ["tuning", str(path)])
    main()
    output = capsys.readouterr().out
    assert (
        "+0.38" in output
        and "look-alikes are not in the score: name a source in evaluate.harmless" in output
    )
    assert (
        "ordinary instructions are not in the score: name a source in evaluate.ordinary" in output
    )


def write_metrics(layout, values) -> None:
    """metrics.json of every trained subject; none where values(subject) is None."""
    for subject in layout.subjects():
        measured = None if subject.trained is None else values(subject)
        if measured is not None:
            with artifacts.building(layout.evaluate(subject), {}) as folder:
                artifacts.write_json(
                    folder / "metrics.json",
                    {key: {"value": value} for key, value in measured.items()},
                )


def test_only_settings_evaluated_with_every_seed_count(tmp_path):
    content = make_project(tmp_path) | {
        "seeds": [0, 1],
        "methods": {"sft": {"grid": {"train.lr": [0.1, 0.2]}}, "plain": {}},
    }
    layout = Layout(recipes.load(write_recipe(tmp_path, content)))

    def values(subject):
        if (subject.name, subject.seed) == ("sft.lr_0.2", 1):
            return None
        return {
            "exact_match": 0.5 + 0.2 * subject.seed,
            "non_refusal_rate": 0.1,
            "over_refusal_rate": 0.3,
            "ordinary_refusal_rate": 0.1,
        }

    write_metrics(layout, values)
    found, missing = runs(layout)
    assert missing == {"sft"} and {(run.method, run.setting) for run in found} == {
        ("sft", "lr_0.1"),
        ("plain", "as it is"),
    }
    assert "best so far" in table(found, missing) and table(found, missing).splitlines()[
        -1
    ].endswith("chosen")
    assert all(abs(run.score - 0.3) < 1e-9 for run in found), "the mean over seeds"
