"""How the tests of data sources read a file, and what they bring as one."""

import json

import pytest

from pipeline.data.rows import ordered_rows
from pipeline.data.sources import check_source, read_source
from pipeline.recipe.sections import SourceSection

ROWS = [{"prompt": f"question {i}", "response": f"réponse {i}"} for i in range(8)]
CSV = "prompt,response\n" + "".join(f"{row['prompt']},{row['response']}\n" for row in ROWS)
TSV = CSV.replace(",", "\t")
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
ARRAY = json.dumps(ROWS, indent=1, ensure_ascii=False)
TEXTS = {"d.csv": CSV, "d.tsv": TSV, "d.jsonl": LINES, "d.json": ARRAY}


def source(path, **fields) -> SourceSection:
    return SourceSection(source=str(path), **fields)


def read(path, required=("prompt", "response"), **fields) -> list[dict]:
    """What data.task would read: every row, in the file's order."""
    given = source(path, **fields)
    check_source(given, "data.task")
    found = read_source(given, "data.task", required)
    assert not found.bad, found.bad
    return [row for _, row in found.rows]


def pairs(rows: list[dict]) -> list[dict]:
    return [{"prompt": row["prompt"], "response": row["response"]} for row in rows]


def refusal(path, field: str = "data.task", **fields) -> str:
    """The one sentence with which a source of the task, or of another field, is refused."""
    given = source(path, **fields)
    with pytest.raises(ValueError) as caught:
        check_source(given, field)
        required = ("prompt", "response") if field == "data.task" else ("prompt",)
        ordered_rows(field, given, 0, required, pairs=field == "data.safety")
    sentence = str(caught.value)
    assert "\n" not in sentence and ". " not in sentence and str(path) in sentence, sentence
    return sentence


def written(tmp_path, name: str, content: str | bytes):
    path = tmp_path / name
    path.write_bytes(
        content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    )
    return path
