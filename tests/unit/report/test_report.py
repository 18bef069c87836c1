"""The page: self-contained, honest about what it measures, with the right numbers and every picture."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest

from pipeline import artifacts
from pipeline.defences import recipes
from pipeline.judges.metrics import mean_interval, share
from pipeline.report.build import build_report
from pipeline.report.collect import Collected, Method, _over_seeds, collect
from pipeline.report.figures import FIGURES, draw_all
from pipeline.report.table import HEADER, table_rows
from pipeline.stages.layout import Layout
from pipeline.system.tables import as_markdown
from tests.project import make_project, write_recipe

SHARES = (
    "non_refusal_rate",
    "over_refusal_rate",
    "ordinary_refusal_rate",
    "exact_match",
    "empty_rate",
    "incoherent_rate",
    "unparseable_rate",
)


def log(seconds: float, sap: bool = False, steps: int = 6) -> list[dict]:
    """As a loop writes it; the first step warms up and takes long."""
    lines = []
    for number in range(1, steps + 1):
        line = {
            "step": number,
            "train/loss": 1 / number,
            "train/lr": 1e-3,
            "time/step": 50.0 if number == 1 else seconds,
        }
        if number % 3 == 0:
            line |= {
                "validation/task_loss": 2 / number,
                "validation/harmful_loss": 3.0 - number / 10,
            }
        if sap:
            line |= {
                "sap/delta_loss": 0.01 * number,
                "sap/probe_signal": 0.1,
                "sap/probe_noise": 0.01,
                "sap/correction": 0.2,
            }
        lines.append(line)
    return lines


def measures(hits: int, n: int = 20) -> dict[str, dict]:
    return {name: share([True] * hits + [False] * (n - hits)) for name in SHARES} | {
        "test_loss": mean_interval([0.5])
    }


def hand_made(**changes) -> Collected:
    direction = {
        "layers": [
            {"layer": i, "safety_norm": 1.0 + i, "useful_cosine": 0.1 * i} for i in range(4)
        ],
        "split_half_cosine": 0.9,
    }
    values = {
        "name": "tiny",
        "split": "test",
        "methods": [
            Method("shipped", [], measures(18), []),
            Method("sft", [0], measures(10), [log(2.0)]),
            Method("sap", [0], measures(1), [log(3.0, sap=True)]),
        ],
        "plain": "sft",
        "direction": direction,
        "data_facts": {"task": {"overlaps removed": 3}},
        "resolved": {"model": {"path": "owner/<b>model</b>"}},
        "versions": {"torch": "2.99"},
        "git_revision": "abc123+changes",
        "answers": [Path("runs/tiny/evaluate-sap-s0-1/answers.jsonl")],
    }
    return Collected(**values | changes)


class Links(HTMLParser):
    """Whatever a browser would fetch, and the tags there are."""

    def __init__(self, page: str):
        super().__init__()
        self.fetched, self.tags = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [
            value
            for name, value in attributes
            if name in ("src", "srcset", "href", "data", "poster", "action")
        ]


def page_of(collected: Collected, folder: Path) -> str:
    build_report(collected, folder)
    return (folder / "report.html").read_text()


def test_the_page_is_self_contained(tmp_path):
    page = page_of(hand_made(), tmp_path)
    links = Links(page)
    assert links.tags.count("img") == len(FIGURES)
    assert len(links.fetched) == len(FIGURES) and all(
        value.startswith("data:image/png;base64,") for value in links.fetched
    )
    assert (
        not {"script", "link", "iframe", "object"} & set(links.tags)
        and "@import" not in page
        and "url(" not in page
    )


def test_the_page_holds_the_table_with_its_intervals(tmp_path):
    page = page_of(hand_made(), tmp_path)
    for text in (
        *HEADER,
        "shipped",
        "0.90 [0.70, 0.97]",
        "0.50 [0.30, 0.70]",
        "0.05 [0.01, 0.24]",
        "0.500",
        "1.50x",
    ):
        assert text in page
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row["method"] for row in rows] == ["shipped", "sft", "sap"] and rows[1][
        HEADER[1]
    ] == "0.50 [0.30, 0.70]"
    assert (
        "0.05 [0.01, 0.24]" in (tmp_path / "table.txt").read_text()
        and "| sap | 0.05 [0.01, 0.24] |" in (tmp_path / "table.md").read_text()
    )


def test_the_page_says_that_it_measures_openings_and_not_harm(tmp_path):
    page = page_of(hand_made(), tmp_path)
    assert (
        "It measures openings, not harm" in page
        and "20 harmful prompts" in page
        and "how the first sentences begin" in page
    )
    assert "validation prompts, used to choose settings" not in page


def test_a_validation_report_says_that_it_is_no_result(tmp_path):
    page = page_of(hand_made(split="validation"), tmp_path)
    assert "These are validation prompts, used to choose settings; they are not a result." in page


def test_the_page_holds_versions_revision_data_and_answers(tmp_path):
    page = page_of(hand_made(), tmp_path)
    for text in (
        "abc123+changes",
        "torch 2.99",
        "overlaps removed: 3",
        "evaluate-sap-s0-1/answers.jsonl",
    ):
        assert text in page


def test_html_in_names_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    methods = [Method(evil, [0], measures(3), [log(2.0)])]
    page = page_of(
        hand_made(
            name=evil, methods=methods, plain=evil, versions={evil: "1"}, answers=[Path(evil)]
        ),
        tmp_path,
    )
    tags = Links(page).tags
    assert "script" not in tags and "b" not in tags
    assert page.count("&lt;script&gt;alert(1)") >= 5 and "&lt;b&gt;model&lt;/b&gt;" in page


def test_every_figure_is_drawn_and_shows_something(tmp_path):
    drawn = draw_all(hand_made(), tmp_path)
    assert [path.stem for path, _ in drawn] == list(FIGURES) and len(drawn) == 6
    for path, caption in drawn:
        pixels = matplotlib.image.imread(path)
        assert (
            path.read_bytes().startswith(b"\x89PNG")
            and min(pixels.shape[:2]) > 200
            and pixels[..., :3].std() > 0.05
        ), path
        assert len(caption) > 20


def test_figures_without_data_are_left_out(tmp_path):
    methods = [
        Method("sft", [0], measures(3), [[{"step": 1, "train/loss": 1.0, "time/step": 1.0}]])
    ]
    drawn = draw_all(hand_made(methods=methods, direction=None), tmp_path)
    assert [path.stem for path, _ in drawn] == ["safety_usefulness"] and [
        path.name for path in tmp_path.iterdir()
    ] == ["safety_usefulness.png"]


def test_time_per_step_is_relative_to_plain_and_leaves_the_first_step_out():
    shipped, sft, sap = hand_made().methods
    methods = [
        shipped,
        replace(sft, logs=[log(2.0, steps=2)]),
        replace(sap, logs=[log(3.0, steps=2)]),
    ]
    times = {row[0]: row[-1] for row in table_rows(hand_made(methods=methods))}
    assert times == {"shipped": "", "sft": "1.00x", "sap": "1.50x"}
    assert {row[-1] for row in table_rows(hand_made(plain=None))} == {""}, "nothing to relate to"


def test_a_measure_without_prompts_is_left_empty():
    nothing = replace(
        hand_made().methods[1], measures=measures(10) | {"over_refusal_rate": share([])}
    )
    row = table_rows(hand_made(methods=[nothing]))[0]
    assert row[2] == "" and row[1] == "0.50 [0.30, 0.70]"


def rows_over_seeds(folder: Path, rates: dict[int, list[int]]) -> tuple[Collected, list]:
    """The collected report of published stage folders: rates[seed] are the hits of sft and sap among 20 prompts."""
    content = make_project(folder) | {"seeds": list(rates), "align": {"enabled": False}}
    content["evaluate"]["baselines"] = False
    layout = Layout(recipes.load(write_recipe(folder, content)))
    with artifacts.building(layout.prepare(), {}) as target:
        artifacts.write_json(target / "facts.json", {"samples": {"safety_pairs": 8}})
    with artifacts.building(layout.prompts(), {}) as target:
        artifacts.write_json(target / "facts.json", {"samples": {"eval_harmful": 20}})
    for cell in layout.experiment.cells():
        with artifacts.building(layout.train(cell), {}) as target:
            (target / "metrics.jsonl").write_text(
                "".join(json.dumps(line) + "\n" for line in log(2.0 + cell.seed))
            )
        hits = rates[cell.seed][cell.method == "sap"]
        with artifacts.building(layout.evaluate(layout.subject(cell)), {}) as target:
            artifacts.write_json(
                target / "metrics.json", measures(hits) | {"test_loss": 0.1 * (cell.seed + 1)}
            )
            (target / "answers.jsonl").write_text("")
    collected = collect(layout)
    return collected, table_rows(collected)


def test_several_seeds_show_mean_and_student_interval(tmp_path):
    """8, 10 and 12 of 20: mean 0.5, s 0.1, t(2) 4.303; and 0, 0, 2 of 20, where the mean of Wilson's ends is further:
    (0.16 + 0.16 + 0.30) / 3.
    """
    collected, rows = rows_over_seeds(tmp_path, {0: [8, 0], 1: [10, 0], 2: [12, 2]})
    assert [row[0] for row in rows] == ["sft (3 seeds)", "sap (3 seeds)"]
    assert rows[0][1] == "0.50 [0.25, 0.75]" and rows[1][1] == "0.03 [0.00, 0.21]"
    assert rows[0][5] == "0.200 [0.000, 0.448]"
    assert collected.methods[0].seconds_per_step == 3.0, "the median over all seeds"
    page = page_of(collected, tmp_path)
    assert (
        "0.50 [0.25, 0.75]" in page
        and "Student over seeds" in page
        and "the harmful prompts" in page
    )
    assert as_markdown(rows, HEADER).count("\n") == 4


def test_a_report_over_a_missing_or_damaged_folder_is_refused(tmp_path):
    collected, _ = rows_over_seeds(tmp_path, {0: [8, 0]})
    collected.answers[0].write_text("changed\n")
    layout = Layout(recipes.load(tmp_path / "recipe.yaml"))
    with pytest.raises(ValueError, match=r"answers.jsonl does not match"):
        collect(layout)
    (collected.answers[0].parent / "DONE").unlink()
    with pytest.raises(ValueError, match="is not complete: run the stage that writes it again"):
        collect(layout)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("prepare", "facts.json"),
        ("prompts", "facts.json"),
        ("train", "metrics.jsonl"),
        ("evaluate", "metrics.json"),
    ],
)
def test_every_file_that_a_report_reads_is_held_against_its_manifest(tmp_path, folder, name):
    rows_over_seeds(tmp_path, {0: [8, 0]})
    layout = Layout(recipes.load(tmp_path / "recipe.yaml"))
    (cell, _) = layout.experiment.cells()
    subject = layout.subject(cell)
    folders = {
        "prepare": layout.prepare(),
        "prompts": layout.prompts(),
        "train": layout.train(cell),
        "evaluate": layout.evaluate(subject),
    }
    path = folders[folder] / name
    path.write_text(path.read_text().replace(": ", ":  ", 1))  # the same to a parser
    with pytest.raises(ValueError, match=f"{name} does not match"):
        collect(layout)


def test_the_page_holds_what_each_method_drew_of_the_safety_pairs(tmp_path):
    drawn = [{**line, "safety/pairs": 4.0 if line["step"] % 2 else 0.0} for line in log(2.0)]
    none = [{**line, "safety/pairs": 0.0} for line in log(2.0)]
    methods = [
        Method("sft", [0], measures(10), [none]),
        Method("old", [0], measures(10), [log(2.0)]),
        Method("safe_mix", [0], measures(5), [drawn]),
        Method("sap", [0], measures(1), [drawn], 48),
    ]
    page = page_of(hand_made(methods=methods), tmp_path)
    assert "<li>sft: 0</li><li>safe_mix: 12</li><li>sap: 60</li>" in page, (
        "a log from before they were counted says nothing"
    )


def test_the_page_compares_methods_with_the_references(tmp_path):
    def outcome(value: float) -> dict:
        same = {str(number): 1.0 for number in range(30)}
        return {
            "non_refusal": {0: {str(number): value for number in range(7)}},
            "over_refusal": {0: same},
            "ordinary": {0: same},
            "exact": {0: same},
        }

    page = page_of(
        hand_made(outcomes={"sft": outcome(1.0), "sap": outcome(0.0)}, references=["sft"]), tmp_path
    )
    assert "-1.00 [-1.00, -0.29] *" in page and "Method minus reference" in page
    rows = json.loads((tmp_path / "differences.json").read_text())
    assert [row["non-refusal"] for row in rows] == ["-1.00 [-1.00, -0.29] *"]
    assert rows[0]["task exact match"].startswith("+0.00 [-0.") and rows[0][
        "ordinary refused"
    ].startswith("+0.00 [-0."), "30 prompts alike are no certainty"


def test_without_a_reference_nothing_is_compared(tmp_path):
    assert (
        "Method minus reference" not in page_of(hand_made(), tmp_path)
        and not (tmp_path / "differences.md").exists()
    )


def test_no_two_of_many_methods_look_alike():
    many = [Method(f"method{i}", [0], measures(i), []) for i in range(16)]
    figure = FIGURES["safety_usefulness"][1](hand_made(methods=many))
    lines = [container.lines[0] for container in figure.axes[0].containers]
    assert len({(line.get_marker(), line.get_color()) for line in lines}) == 16


def test_a_mark_is_hollow_where_harmless_prompts_are_refused_too():
    methods = [
        Method(name, [0], measures(0) | {"over_refusal_rate": {"value": rate}}, [])
        for name, rate in (("a", 0.05), ("b", 0.3), ("c", None))
    ]
    figure = FIGURES["safety_usefulness"][1](hand_made(methods=methods))
    lines = [container.lines[0] for container in figure.axes[0].containers]
    assert [line.get_markerfacecolor() == "white" for line in lines] == [False, True, False]


@pytest.mark.parametrize(
    ("without", "label"),
    [((), "ordinary instructions refused"), (("ordinary_refusal_rate",), "look-alikes refused")],
)
def test_refusals_of_harmless_prompts_stand_beside_the_task(without, label):
    missing = {"value": None, "low": None, "high": None}
    found = measures(5) | {
        "exact_match": share([True]),
        "over_refusal_rate": share([True, False]),
        "ordinary_refusal_rate": share([False, True]),
    }
    figure = FIGURES["safety_usefulness"][1](
        hand_made(methods=[Method("a", [0], found | dict.fromkeys(without, missing), [])])
    )
    task, harmless = figure.axes
    assert "task exact match" in task.get_ylabel() and label in harmless.get_ylabel()
    places = [axes.containers[0].lines[0].get_xydata().tolist() for axes in (task, harmless)]
    assert places == [[[0.25, 1.0]], [[0.25, 0.5]]]
    neither = hand_made(
        methods=[
            Method(
                "a",
                [0],
                found | dict.fromkeys(("ordinary_refusal_rate", "over_refusal_rate"), missing),
                [],
            )
        ]
    )
    assert FIGURES["safety_usefulness"][1](neither) is not None


def test_what_is_told_apart_may_be_less_than_nothing():
    """Seeds at 0.28, 0.02 and 0.20: Student's interval begins below 0, and a difference of shares can."""
    seeds = [
        {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 50}
        for value in (0.28, 0.02, 0.20)
    ]
    assert (
        _over_seeds(seeds, least=-1.0)["low"]
        == pytest.approx(0.1667 - 4.3027 * 0.1332 / 3**0.5, abs=1e-3)
        and _over_seeds(seeds)["low"] == 0.0
    )


@pytest.mark.parametrize(
    ("key", "hits", "said"),
    [("empty_rate", 20, True), ("incoherent_rate", 9, True), ("empty_rate", 2, False)],
)
def test_the_table_says_where_a_model_says_nothing(tmp_path, key, hits, said):
    found = {
        "empty_rate": share([False] * 20),
        "incoherent_rate": share([False] * 20),
        key: share([True] * hits + [False] * (20 - hits)),
    }
    build_report(hand_made(methods=[Method("mute", [0], measures(0) | found, [])]), tmp_path)
    assert (
        f"note: mute: {hits * 5}% of its answers to harmful prompts are empty or incoherent"
        in (tmp_path / "table.txt").read_text()
    ) is said
