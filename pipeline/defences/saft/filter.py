"""Which training samples SAFT drops, and everything a user needs to judge that before believing it.

    decision = decide(rows, embeddings, recipe.saft, seed=0)
    write(decision, rows, folder)          # scores.parquet, dropped.jsonl, facts.json, scores.png

Nothing is dropped silently: every sample's scores are written, and where the labelled samples say that the scores do
not tell harmful from harmless, or that too much of what would go is harmless, `refused` says so and nothing is dropped.
Without labels all of it is a guess, which is said, with the highest-scored samples for the user to read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import artifacts
from pipeline.defences.saft import NO_LABELS, keywords
from pipeline.defences.saft.decision import Decision
from pipeline.defences.saft.saft import (
    auroc,
    choose,
    choose_by_share,
    f1,
    saft_scores,
    with_interval,
)
from pipeline.defences.saft.section import SaftSection
from pipeline.judges.metrics import share
from pipeline.judges.refusal import refusal_in

Rows = Sequence[dict[str, Any]]
# labelled samples that check the choice, where there are as many:
# a tenth of them harmful, and all found, is a lower bound of 0.5
_HELD_OUT = 40
_SHOWN, _SHOWN_CHARACTERS = 10, 60
GUESS = (
    "saft has no labelled samples, so it is a guess that the {dropped} samples it drops are the "
    "harmful ones: the sign of its direction, whether high scores mean "
    "harmful, is one; where the highest-scored are harmless, label some samples with a column of "
    "true and false, and map it to harmful with data.task.columns"
)


def known_labels(rows: Rows) -> np.ndarray:
    """1 harmful, 0 harmless, -1 not known: data.task.columns may map `harmful`;
    where harmful samples were mixed in, the others count as harmless.
    """
    mixed = any(row["kind"] == "harmful" for row in rows)

    def label(row: dict[str, Any]) -> int:
        if row["kind"] == "harmful":
            return 1
        given = row.get("harmful")
        return int(given) if given is not None else 0 if mixed else -1

    return np.array([label(row) for row in rows])


def check_labels(rows: Rows, section: SaftSection) -> None:
    """ValueError where nothing says which samples are harmful, or how many."""
    if section.contamination is None and not (known_labels(rows) >= 0).any():
        raise ValueError(NO_LABELS)


def decide(rows: Rows, embeddings: torch.Tensor, section: SaftSection, seed: int) -> Decision:
    """Score every row and choose what to drop. embeddings: (N, D). seed: of the labelled samples drawn.

    ValueError as `check_labels`.
    """
    check_labels(rows, section)
    scores, labels = saft_scores(embeddings), known_labels(rows)
    known = np.flatnonzero(labels >= 0)
    held_back = min(len(known) // 2, _HELD_OUT) if section.min_precision else 0
    drawn = np.random.default_rng(seed).permutation(len(known))[
        : min(section.labelled, len(known) - held_back)
    ]
    subset, held_out = np.sort(known[drawn]), np.setdiff1d(known, known[drawn])
    words = np.array([keywords.hits(f"{row['prompt']}\n{row['response']}") for row in rows])
    refusals = np.array([refusal_in(row["prompt"], row["response"]) is not None for row in rows])
    if len(subset):
        choice = choose(scores, subset, labels[subset] == 1, section.components)
    else:
        assert section.contamination is not None, "check_labels wants it where there are no labels"
        choice = choose_by_share(scores, section.contamination, section.components)
    score = scores[:, choice.components - 1]
    measured = {
        "saft": _measured(score, choice.threshold, labels, subset, held_out),
        "keywords": _measured(words.astype(float), 0.5, labels, subset, held_out),
    }
    flagged = score > choice.threshold
    kept_refusals = flagged & refusals if section.keep_refusals else np.zeros_like(flagged)
    wanted = flagged & ~kept_refusals
    most = int(section.max_dropped * len(rows))
    chosen = _highest(wanted, score, most)
    checked = labels[np.intersect1d(held_out, np.flatnonzero(chosen))]
    measured["saft"]["held_out"]["precision"] = share((checked == 1).tolist())
    refused = _refusal(measured["saft"]["labelled"], labels[subset], section)
    if refused is None and len(known) and chosen.any():
        refused = _imprecise(
            measured["saft"]["held_out"]["precision"], int(chosen.sum()), len(held_out), section
        )
    dropped = chosen if refused is None else np.zeros_like(chosen)
    facts = {
        "samples": len(rows),
        "layer": section.layer,
        "position": section.position,
        "components": choice.components,
        "threshold": choice.threshold,
        "threshold_from": f"F1 on {len(subset)} labelled samples; {len(held_out)} others check it"
        if len(subset)
        else (
            f"saft.contamination {section.contamination}, an estimate: no labelled sample was "
            "used, and saft.min_auroc was not applied"
        ),
        "flagged": int(flagged.sum()),
        "refusals": int(refusals.sum()),
        "refusals_flagged": int((flagged & refusals).sum()),
        "refusals_kept": int(kept_refusals.sum()),
        "dropped": int(dropped.sum()),
        "dropped_harmful": int((dropped & (labels == 1)).sum()),
        "dropped_harmless": int((dropped & (labels == 0)).sum()),
        "harmful_left": int((~dropped & (labels == 1)).sum()),
        "capped_at": most if refused is None and wanted.sum() > most else None,
        "refused": refused,
        "highest_scored": [] if len(known) else _highest_scored(rows, score, dropped),
        **measured,
    }
    warnings = _warnings(facts, len(known), len(subset), int(wanted.sum()), section)
    return Decision(
        scores,
        labels,
        subset,
        words,
        refusals,
        choice,
        dropped,
        refused,
        {**facts, "warnings": warnings},
        warnings,
    )


def _warnings(
    facts: dict[str, Any], known: int, subset: int, wanted: int, section: SaftSection
) -> list[str]:
    warnings = [facts["refused"]] if facts["refused"] else []
    if subset and section.contamination is not None:
        warnings.append(
            f"saft.contamination {section.contamination} is not used, because {known} samples have "
            "labels: set saft.labelled to 0 to use it"
        )
    if not known:
        warnings.append(GUESS.format(dropped=facts["dropped"]))
    if facts["capped_at"] is not None:
        warnings.append(
            f"saft would drop {wanted} samples and drops the {facts['capped_at']} with the highest "
            f"scores: saft.max_dropped is {section.max_dropped}"
        )
    return warnings


def highest_scored(decision: Decision) -> list[str]:
    """What a user without labels must look at: a line for each of the highest-scored samples, below a title;
    nothing where there are labels.
    """
    lines = [
        f"  {entry['score']:.3g}  {entry['id']}  {entry['prompt']}"
        for entry in decision.facts["highest_scored"]
    ]
    return (
        [f"the {len(lines)} highest-scored samples (score, id, how the prompt begins):", *lines]
        if lines
        else []
    )


def write(decision: Decision, rows: Rows, folder: Path) -> None:
    """Leave the decision in `folder`. Prompts of dropped rows stay in its files, on this machine."""
    import pyarrow
    import pyarrow.parquet

    from pipeline.defences.saft.picture import draw_scores  # matplotlib takes its time

    subset = np.isin(np.arange(len(rows)), decision.subset)
    known = {1: True, 0: False, -1: None}
    table = [
        {
            "id": row["id"], "kind": row["kind"], "harmful": known[int(decision.labels[i])],
            "labelled": bool(subset[i]),
            **{f"score_{k}": float(decision.scores[i, k - 1]) for k in range(1, decision.scores.shape[1] + 1)},
            "score": float(decision.scores[i, decision.choice.components - 1]), "keywords": int(decision.words[i]),
            "refusal": bool(decision.refusals[i]), "dropped": bool(decision.dropped[i]),
        }
        for i, row in enumerate(rows)
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / "scores.parquet")
    with (folder / "dropped.jsonl").open("w") as stream:
        for row, entry in zip(rows, table, strict=True):
            if entry["dropped"]:
                stream.write(
                    json.dumps({**entry, "prompt": row["prompt"], "response": row["response"]})
                    + "\n"
                )
    artifacts.write_json(folder / artifacts.FACTS, decision.facts)
    draw_scores(decision, folder / "scores.png")


def check_not_refused(folder: Path) -> None:
    """ValueError where the filter in `folder` refused to filter."""
    facts = json.loads((folder / artifacts.FACTS).read_text())
    if facts["refused"]:
        raise ValueError(f"{facts['refused']} (every score is in {folder}, with a picture)")


def kept(folder: Path) -> list[bool]:
    """Of every training row, whether the filter in `folder` leaves it. ValueError where it refused to filter."""
    import pyarrow.parquet

    check_not_refused(folder)
    dropped = (
        pyarrow.parquet.read_table(folder / "scores.parquet", columns=["dropped"])
        .column("dropped")
        .to_pylist()
    )
    return [not out for out in dropped]


def _measured(
    values: np.ndarray,
    threshold: float,
    labels: np.ndarray,
    subset: np.ndarray,
    held_out: np.ndarray,
) -> dict[str, Any]:
    """AUROC and F1 with their intervals on the labelled samples that chose the threshold (a little flattering),
    and on other known ones.
    """
    result = {}
    for name, numbers in (("labelled", subset), ("held_out", held_out)):
        harmful = labels[numbers] == 1
        result[name] = {
            "auroc": with_interval(auroc, values[numbers], harmful),
            "f1": with_interval(
                lambda v, truth: f1(v > threshold, truth), values[numbers], harmful
            ),
        }
    return result


def _refusal(measured: dict[str, Any], labels: np.ndarray, section: SaftSection) -> str | None:
    if len(labels) == 0:
        return None
    if labels.all() or not labels.any():
        kind = "harmful" if labels.all() else "harmless"
        return (
            f"saft refuses to filter: all {len(labels)} labelled samples are {kind}, so nothing "
            "can be chosen on them; label more samples, or raise saft.labelled"
        )
    found = measured["auroc"]
    if found["value"] < section.min_auroc:
        return (
            f"saft refuses to filter: its AUROC on {len(labels)} labelled samples is "
            f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}], below "
            f"saft.min_auroc {section.min_auroc}; try another saft.layer or saft.position, or set saft.enabled to false"
        )
    return None


def _imprecise(
    precision: dict[str, Any], dropped: int, held_out: int, section: SaftSection
) -> str | None:
    """Why the held-out labelled samples say that what would be dropped is not harmful enough,
    or that nobody knows; None where it is.
    """
    if not section.min_precision or (precision["n"] and precision["low"] >= section.min_precision):
        return None
    remedy = (
        "label more samples, try another saft.layer or saft.position, or set saft.enabled to false"
    )
    if not precision["n"]:
        return (
            f"saft refuses to filter: none of the {dropped} samples that it would drop is among "
            f"the {held_out} held-out labelled ones, so that its precision is not "
            f"known, and saft.min_precision is {section.min_precision}; {remedy}"
        )
    return (
        f"saft refuses to filter: {round(precision['value'] * precision['n'])} of the "
        f"{precision['n']} held-out labelled samples that it would drop are harmful, a "
        f"precision of {precision['value']:.2f} whose 95% lower bound {precision['low']:.2f} is "
        f"below saft.min_precision {section.min_precision}; {remedy}"
    )


def _highest_scored(rows: Rows, score: np.ndarray, dropped: np.ndarray) -> list[dict[str, Any]]:
    """Of the samples with the highest scores: id, score, whether it is dropped, and how its prompt begins,
    with control characters escaped.
    """
    return [
        {
            "id": rows[i]["id"],
            "score": float(score[i]),
            "dropped": bool(dropped[i]),
            "prompt": _one_line(rows[i]["prompt"][:_SHOWN_CHARACTERS]),
        }
        for i in np.argsort(-score, kind="stable")[:_SHOWN]
    ]


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _highest(wanted: np.ndarray, score: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of the wanted, those with the highest scores."""
    order = np.argsort(-score, kind="stable")
    result = np.zeros_like(wanted)
    result[order[wanted[order]][:most]] = True
    return result
