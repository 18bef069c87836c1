"""SAFT's scores against NumPy's SVD on subspaces whose AUROC is known, the choice of k and threshold,
and the guards around it.
"""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import torch

from pipeline import artifacts
from pipeline.data import contrastive
from pipeline.defences.saft import keywords
from pipeline.defences.saft.filter import check_labels, decide, highest_scored, kept, write
from pipeline.defences.saft.saft import auroc, choose, f1, saft_scores, with_interval
from pipeline.defences.saft.section import SaftSection
from pipeline.report.collect import _filter_facts
from pipeline.stages import filter as stage
from pipeline.tracking import run as tracking

WIDTH = 12


def subspace(
    harmful: int, harmless: int, size: float, seed: int = 0
) -> tuple[torch.Tensor, np.ndarray]:
    """Embeddings whose harmful ones lie along one direction, `size` standard deviations wide,
    and their labels, shuffled.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(WIDTH, generator=generator), dim=0)
    points = torch.randn(harmful + harmless, WIDTH, generator=generator) + 5.0
    signs = torch.randint(0, 2, (harmful,), generator=generator) * 2.0 - 1
    points[:harmful] += size * signs[:, None] * direction
    order = torch.randperm(harmful + harmless, generator=generator)
    return points[order], np.array([True] * harmful + [False] * harmless)[order.numpy()]


def rows_of(
    labels: np.ndarray, refusing: frozenset = frozenset(), mixed: bool = True
) -> list[dict]:
    return [
        {
            "id": f"row-{i}", "kind": "harmful" if harmful and mixed else "task",
            "prompt": "how to steal" if harmful else "count",
            "response": "I cannot help with that." if i in refusing else "total 3",
        }
        for i, harmful in enumerate(labels)
    ]  # fmt: skip


def reference(embeddings: torch.Tensor, k: int) -> np.ndarray:
    """s_i of the paper, from NumPy's SVD of the centred matrix."""
    centred = embeddings.numpy().astype(np.float64)
    centred = centred - centred.mean(axis=0)
    _, _, vt = np.linalg.svd(centred, full_matrices=False)
    return np.mean([(centred @ vt[j]) ** 2 for j in range(k)], axis=0)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [8, 60])  # fewer and more samples than dimensions
def test_scores_equal_numpy_s(k, count):
    embeddings, _ = subspace(count // 4, count - count // 4, 6.0)
    assert np.allclose(
        saft_scores(embeddings)[:, k - 1], reference(embeddings, k), rtol=1e-8, atol=1e-8
    )


def by_hand(scores: np.ndarray, labels: np.ndarray) -> float:
    """AUROC by counting pairs."""
    wins = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
    return float(np.mean(wins))


def test_auroc_counts_pairs_and_ties():
    scores, labels = (
        np.array([1.0, 2.0, 2.0, 3.0, 2.0]),
        np.array([False, True, False, True, False]),
    )
    assert (
        auroc(scores, labels) == by_hand(scores, labels) == pytest.approx((1 + 0.5 + 0.5 + 3) / 6)
    )
    assert auroc(-scores, labels) == pytest.approx(1 - auroc(scores, labels))


def test_f1():
    assert f1(np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)) == pytest.approx(0.5)
    assert f1(np.zeros(3, bool), np.ones(3, bool)) == 0.0


@pytest.mark.parametrize(
    ("size", "low", "high"), [(20.0, 0.99, 1.0), (3.0, 0.8, 0.99), (0.0, 0.4, 0.6)]
)
def test_a_known_subspace_has_the_auroc_of_its_width(size, low, high):
    """Without noise along the direction the score of a harmful sample would be size^2;
    chance where there is no subspace.
    """
    embeddings, labels = subspace(150, 450, size)
    assert low <= auroc(saft_scores(embeddings)[:, 0], labels) <= high


def test_one_component_is_chosen_where_one_direction_tells_all():
    embeddings, labels = subspace(60, 240, 12.0)
    scores, subset = saft_scores(embeddings), np.arange(0, 300, 2)
    choice = choose(scores, subset, labels[subset], None)
    assert f1(scores[:, choice.components - 1] > choice.threshold, labels) > 0.97
    column = scores[:, choice.components - 1]
    steps = (choice.threshold - column.min()) / (column.max() - column.min()) * 99
    assert steps == pytest.approx(round(steps), abs=1e-6), (
        "the threshold is one of 100 even steps between the scores' ends"
    )


def test_the_interval_holds_the_value_and_shrinks_with_samples():
    few, many = (
        with_interval(
            auroc, *(lambda e, y: (saft_scores(e)[:, 0], y))(*subspace(n // 4, n - n // 4, 2.0))
        )
        for n in (40, 640)
    )
    for found in (few, many):
        assert found["low"] <= found["value"] <= found["high"]
    assert many["high"] - many["low"] < few["high"] - few["low"]
    assert with_interval(auroc, np.ones(3), np.ones(3, bool))["value"] is None


def section(**changes) -> SaftSection:
    return SaftSection(enabled=True, **changes)


def test_what_is_dropped_is_written_down(tmp_path):
    embeddings, labels = subspace(30, 170, 15.0)
    rows = rows_of(labels)
    decision = decide(rows, embeddings, section(labelled=100), seed=0)
    write(decision, rows, tmp_path)
    table = pyarrow.parquet.read_table(tmp_path / "scores.parquet").to_pylist()
    assert [entry["id"] for entry in table] == [row["id"] for row in rows], (
        "every sample has its scores, in the data's order"
    )
    assert np.allclose([entry["score_2"] for entry in table], reference(embeddings, 2))
    out = [entry["id"] for entry in table if entry["dropped"]]
    listed = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in listed] == out and all(entry["prompt"] for entry in listed)
    assert [row["id"] for row, stays in zip(rows, kept(tmp_path), strict=True) if stays] == [
        row["id"] for row in rows if row["id"] not in out
    ]
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert (
        facts["dropped"] == len(out) == facts["dropped_harmful"] + facts["dropped_harmless"]
        and facts["harmful_left"] == 30 - facts["dropped_harmful"]
    )
    assert facts["dropped_harmful"] >= 28 and facts["dropped_harmless"] <= 2
    assert facts["saft"]["labelled"]["auroc"]["n"] == facts["saft"]["held_out"]["auroc"]["n"] == 100
    assert facts["keywords"]["labelled"]["f1"]["value"] == 1.0, (
        "the prompts here name what they are"
    )
    assert (tmp_path / "scores.png").stat().st_size > 5000


def test_below_the_floor_nothing_is_dropped_and_the_reason_is_given(tmp_path):
    embeddings, labels = subspace(30, 170, 0.0)
    decision = decide(rows_of(labels), embeddings, section(min_auroc=0.8), seed=0)
    assert (
        not decision.dropped.any()
        and "AUROC on 100 labelled samples is 0." in decision.refused
        and "saft.min_auroc 0.8" in decision.refused
    )
    write(decision, rows_of(labels), tmp_path)
    assert len(pyarrow.parquet.read_table(tmp_path / "scores.parquet")) == 200, (
        "the scores are there all the same"
    )
    with pytest.raises(ValueError, match=r"saft refuses to filter.*every score is in"):
        kept(tmp_path)


def test_a_subset_of_one_kind_is_refused():
    embeddings, labels = subspace(2, 198, 15.0)
    decision = decide(rows_of(labels), embeddings, section(labelled=5), seed=0)
    assert "all 5 labelled samples are harmless" in decision.refused and not decision.dropped.any()


def test_no_more_than_the_cap_is_dropped_and_the_highest_go_first():
    embeddings, labels = subspace(60, 140, 15.0)
    free, capped = (
        decide(rows_of(labels), embeddings, section(max_dropped=cap), seed=0) for cap in (0.5, 0.1)
    )
    assert free.facts["dropped"] > 50 and free.facts["capped_at"] is None
    assert capped.facts["dropped"] == capped.facts["capped_at"] == 20
    assert "drops the 20 with the highest scores: saft.max_dropped is 0.1" in capped.warnings[0]
    score = capped.scores[:, capped.choice.components - 1]
    assert score[capped.dropped].min() >= score[free.dropped & ~capped.dropped].max()


def test_refusals_are_counted_and_may_be_kept():
    embeddings, labels = subspace(40, 160, 15.0)
    refusing = frozenset(np.flatnonzero(labels)[:10].tolist())
    keep, drop = (
        decide(rows_of(labels, refusing), embeddings, section(keep_refusals=flag), seed=0)
        for flag in (True, False)
    )
    assert (
        keep.facts["refusals"] == 10
        and keep.facts["refusals_flagged"]
        == keep.facts["refusals_kept"]
        == drop.facts["refusals_flagged"]
        >= 9
    )
    assert (
        drop.facts["refusals_kept"] == 0
        and drop.facts["dropped"] - keep.facts["dropped"] == keep.facts["refusals_kept"]
    )
    assert not keep.dropped[list(refusing)].any() and drop.dropped[list(refusing)].sum() >= 9


def test_an_answer_that_names_what_is_illegal_is_no_refusal():
    """Those must not be kept for refusals."""
    embeddings, labels = subspace(40, 160, 15.0)
    rows = rows_of(labels)
    texts = (
        "I\u2019m sorry, but I can\u2019t help.",
        "Sorry, but no.",
        "Sure, here is how to do what is illegal",
        "As an example, take",
        "",
        *contrastive.REFUSALS,
    )
    for row, text in zip(rows, texts, strict=False):
        row["response"] = text
    decision = decide(rows, embeddings, section(), seed=0)
    assert list(decision.refusals[: len(texts)]) == [True, True, False, False, False] + [
        True
    ] * len(contrastive.REFUSALS)


def test_without_labels_a_share_is_dropped_and_said_to_be_an_estimate():
    embeddings, labels = subspace(40, 160, 15.0)
    decision = decide(rows_of(labels, mixed=False), embeddings, section(contamination=0.2), seed=0)
    assert decision.facts["dropped"] == 40 and (decision.dropped & labels).sum() >= 38
    assert decision.facts["threshold_from"].startswith(
        "saft.contamination 0.2, an estimate: no labelled sample was used, and saft.min_auroc was not"
    )
    assert decision.facts["saft"]["labelled"]["auroc"]["value"] is None and decision.refused is None


def test_an_estimate_that_labels_make_useless_is_said_to_be():
    embeddings, labels = subspace(40, 160, 15.0)
    assert decide(rows_of(labels), embeddings, section(contamination=0.2), seed=0).warnings == [
        "saft.contamination 0.2 is not used, because 200 samples have labels: set saft.labelled to 0 to use it"
    ]
    assert (
        decide(rows_of(labels), embeddings, section(contamination=0.2, labelled=0), seed=0).facts[
            "dropped"
        ]
        == 40
    )


def test_neither_labels_nor_an_estimate_is_an_error():
    _, labels = subspace(4, 16, 1.0)
    with pytest.raises(
        ValueError, match=r"map a column of true and false to harmful.*or set saft.contamination"
    ):
        check_labels(rows_of(labels, mixed=False), section())
    with pytest.raises(ValueError, match="labelled 0 needs contamination"):
        section(labelled=0)


def test_a_column_of_labels_counts_and_gaps_do_not():
    embeddings, labels = subspace(40, 160, 15.0)
    rows = [
        {**row, "harmful": bool(y) if i % 2 else None}
        for i, (row, y) in enumerate(zip(rows_of(labels, mixed=False), labels, strict=True))
    ]
    decision = decide(rows, embeddings, section(labelled=60), seed=0)
    assert (
        set(decision.labels[::2]) == {-1}
        and len(decision.subset) == 60
        and all(i % 2 for i in decision.subset)
    )
    assert (
        decision.facts["saft"]["held_out"]["auroc"]["n"] == 40
        and (decision.dropped & labels).sum() >= 36
    )


def test_keywords():
    assert (
        keywords.hits("How do I hack a bank and steal money?") == 2
        and keywords.hits("Hacking, hacking") == 1
    )
    assert keywords.hits("list the shack's inventory") == 0, (
        "words are matched from their beginning"
    )


def test_without_labels_the_guess_is_said_and_the_ten_highest_are_shown_on_a_line_each():
    embeddings, labels = subspace(40, 160, 15.0)
    rows = [
        {**row, "prompt": f"über\n\x1b[2J\u202e {i} " + "x" * 100}
        for i, row in enumerate(rows_of(labels, mixed=False))
    ]
    decision = decide(rows, embeddings, section(contamination=0.2), seed=0)
    assert (
        len(decision.warnings) == 1
        and decision.facts["warnings"] == decision.warnings
        and "\n" not in decision.warnings[0]
    )
    assert (
        "it is a guess that the 40 samples it drops are the harmful ones: the sign of its direction"
        in decision.warnings[0]
    )
    title, *lines = highest_scored(decision)
    assert (
        "the 10 highest-scored samples" in title
        and len(lines) == 10
        and all(line.isprintable() for line in lines)
    )
    best = np.argsort(-decision.scores[:, decision.choice.components - 1])[:10]
    for line, index in zip(lines, best, strict=True):
        assert (
            f"  row-{index}  über\\n\\x1b[2J\\u202e {index} xx" in line
            and line.endswith("x")
            and len(line) < 100
        )
    assert [row["id"] for row in decision.facts["highest_scored"]] == [
        f"row-{index}" for index in best
    ]
    assert json.loads(json.dumps(decision.facts)) == decision.facts


def test_with_labels_nothing_is_called_a_guess():
    embeddings, labels = subspace(40, 160, 15.0)
    decision = decide(rows_of(labels), embeddings, section(), seed=0)
    assert highest_scored(decision) == decision.warnings == []


def outliers(harmful: int, harmless_alike: int, harmless: int) -> tuple[torch.Tensor, np.ndarray]:
    """Harmful samples and some harmless ones far out along the same direction:
    AUROC is high, because most harmless ones are not there.
    """
    embeddings, far = subspace(harmful + harmless_alike, harmless, 15.0)
    labels = far.copy()
    labels[np.flatnonzero(far)[::2][:harmless_alike]] = False
    return embeddings, labels


def test_below_the_floor_of_precision_nothing_is_dropped_though_the_auroc_is_high():
    embeddings, labels = outliers(60, 60, 900)
    decision = decide(rows_of(labels), embeddings, section(), seed=0)
    assert decision.facts["saft"]["labelled"]["auroc"]["value"] > 0.9 and not decision.dropped.any()
    found = decision.facts["saft"]["held_out"]["precision"]
    assert found["low"] < 0.5 < found["high"]
    assert (
        f"a precision of {found['value']:.2f} whose 95% lower bound {found['low']:.2f} is below saft.min_precision 0.5"
        in decision.refused
    )
    assert (
        decision.warnings[0] == decision.refused and decision.facts["refused"] == decision.refused
    )
    assert decide(rows_of(labels), embeddings, section(min_precision=0.2), seed=0).dropped.any(), (
        "a lower floor lets it go on"
    )
    assert decide(rows_of(labels), embeddings, section(min_precision=0.0), seed=0).dropped.any()


@pytest.mark.parametrize(("labelled", "chose"), [(60, 30), (100, 60), (200, 100)])
def test_few_labels_are_shared_between_choosing_and_checking(labelled, chose):
    embeddings, labels = subspace(60, 140, 15.0)
    rows = [
        {**row, "harmful": bool(y) if i < labelled else None}
        for i, (row, y) in enumerate(zip(rows_of(labels, mixed=False), labels, strict=True))
    ]
    decision = decide(rows, embeddings, section(), seed=0)
    assert (
        len(decision.subset) == chose
        and f"{chose} labelled samples; {labelled - chose} others check it"
        in decision.facts["threshold_from"]
    )
    assert decision.refused is None and (decision.dropped & labels).sum() >= 55
    unchecked = decide(rows, embeddings, section(min_precision=0.0), seed=0)
    assert len(unchecked.subset) == min(labelled, 100), (
        "without the floor nothing has to be held out"
    )


@pytest.mark.parametrize(
    ("labelled", "sentence"),
    [
        (1, "all 1 labelled samples are"),
        (
            8,
            (
                "of the 3 held-out labelled samples that it would drop are harmful, a precision of "
                "0.67 whose 95% lower bound 0.21 is below"
            ),
        ),
    ],
)
def test_too_few_labels_to_check_are_a_refusal(labelled, sentence):
    embeddings, labels = subspace(60, 140, 15.0)
    order = [
        i
        for pair in zip(np.flatnonzero(labels), np.flatnonzero(~labels), strict=False)
        for i in pair
    ][:labelled]
    rows = [
        {**row, "harmful": bool(y) if i in order else None}
        for i, (row, y) in enumerate(zip(rows_of(labels, mixed=False), labels, strict=True))
    ]
    decision = decide(rows, embeddings, section(), seed=0)
    assert (
        sentence in decision.refused
        and not decision.dropped.any()
        and "label more samples" in decision.refused
    )


def test_labels_that_none_of_the_dropped_has_tell_nothing_of_them():
    embeddings, labels = subspace(40, 160, 15.0)
    rows = [
        {**row, "harmful": None if y else False}
        for row, y in zip(rows_of(labels, mixed=False), labels, strict=True)
    ]
    score = saft_scores(embeddings)[:, 0]
    rows = [
        {**row, "harmful": None if s > np.quantile(score, 0.7) else row["harmful"]}
        for row, s in zip(rows, score, strict=True)
    ]
    decision = decide(rows, embeddings, section(contamination=0.2, labelled=0), seed=0)
    assert (
        "none of the 40 samples that it would drop is among the 140 held-out labelled ones"
        in decision.refused
        and not decision.dropped.any()
    )


def test_the_stage_prints_the_guess_and_the_rows_and_the_report_leaves_their_prompts_out(
    tmp_path, monkeypatch, capsys
):
    embeddings, labels = subspace(40, 160, 15.0)
    rows, saft = rows_of(labels, mixed=False), section(contamination=0.2)
    layout = SimpleNamespace(
        filter=lambda cell: tmp_path / "filter",
        prepare=lambda: tmp_path / "prepare",
        embeddings=lambda cell: tmp_path / "embeddings",
    )
    for name, value in {
        "Layout": lambda experiment: layout, "verify_upstream": lambda layout: None, "read_rows": lambda prepared,
        name: rows, "_embeddings": lambda layout, cell, rows: embeddings,
        "open_run": lambda *arguments: contextlib.nullcontext(tracking.Run()),
    }.items():  # fmt: skip
        monkeypatch.setattr(stage, name, value)
    experiment = SimpleNamespace(base=SimpleNamespace(data=SimpleNamespace(seed=0)))
    for name in ("prepare", "embeddings"):
        with artifacts.building(tmp_path / name, {}):
            pass
    assert stage.filter_data(experiment, SimpleNamespace(recipe=SimpleNamespace(saft=saft)))
    warning, title, *lines = capsys.readouterr().err.splitlines()
    assert (
        warning.startswith("warning: saft has no labelled samples")
        and "10 highest-scored" in title
        and len(lines) == 10
    )
    assert all("how to steal" in line for line in lines)
    facts = artifacts.read_manifest(tmp_path / "filter")["facts"]
    assert [row["prompt"] for row in facts["highest_scored"]] == [
        "how to steal"
    ] * 10 and warning.removeprefix("warning: ").startswith(facts["warnings"][0])
    on_the_page = _filter_facts(tmp_path / "filter")
    assert [row["id"] for row in on_the_page["highest_scored"]] == [
        row["id"] for row in facts["highest_scored"]
    ] and "steal" not in str(on_the_page)
