"""The recipes of README.md and docs/recipes.md run as they stand, and what errors tell the user to change exists."""

import ast
import csv
import re
from pathlib import Path

import pytest
import yaml

from pipeline.defences import recipes
from tests.project import ROOT, sap

pytestmark = [pytest.mark.processes, pytest.mark.slow]
# Sizes only: two steps, a few prompts and tokens. Model, data, ranks and methods are the block's own.
SMALL = [
    "--train.steps=2", "--evaluate.harmful_prompts=4", "--evaluate.harmless_prompts=2", "--evaluate.task_prompts=2",
    "--evaluate.ordinary_prompts=2", "--evaluate.attack_prompts=2",
    "--evaluate.max_new_tokens=4", "--data.safety_pairs=8", "--tracking.enabled=false",
]  # fmt: skip


def written(document: str, rows: int, folder: Path) -> Path:
    """The one recipe of a document in a file of its own, beside a tickets.csv of so many rows."""
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    with (folder / "tickets.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["question", "reply"])
        writer.writerows(
            [f"Where is order number {i}?", f"It leaves our house on day {i % 5}, by post."]
            for i in range(rows)
        )
    path = folder / "support_bot.yaml"
    path.write_text(block)
    return path


# The rows are those that the text beside the recipe asks for.
@pytest.mark.parametrize(("document", "rows"), [("README.md", 300), ("docs/recipes.md", 60)])
def test_the_recipe_of_a_document_passes_every_check(tmp_path, document, rows):
    assert f"{rows} rows or more" in (ROOT / document).read_text()
    looked = sap("run", written(document, rows, tmp_path), "--dry-run")
    assert looked.returncode == 0 and len(looked.stdout.splitlines()) == 10, looked.stderr
    assert f"\ndata       {rows} rows: " in looked.stdout


def test_the_recipe_of_the_documentation_runs_literally(tmp_path):
    """On sixty rows, from another folder than the recipe's, on as many ranks as there are devices."""
    path = written("docs/recipes.md", 60, tmp_path)
    done = sap("run", path, *SMALL)
    assert done.returncode == 0, done.stderr
    methods = yaml.safe_load(path.read_text())["methods"]
    assert "sft" in methods and len(methods) >= 3, "two defences beside plain fine-tuning"
    assert all(method in done.stdout for method in methods)
    runs = tmp_path / "runs" / "support_bot"
    assert len(list(runs.glob("train-*/adapter/adapter_model.safetensors"))) == len(methods)
    assert len(list(runs.glob("report-*/report.html"))) == 1


FIELDS = {name for name, *_ in recipes.field_rows()}
SECTIONS = {part for name in FIELDS for part in [name.partition(".")[0]] if "." in name}
# Python, a file, a key of tokenizer.json
NO_FIELDS = {
    "model.resize_token_embeddings",
    "model.safetensors",
    "model.safetensors.index.json",
    "model.vocab",
}
KNOWN = FIELDS | {
    name.rsplit(".", depth)[0] for name in FIELDS for depth in range(1, name.count(".") + 1)
}


def named_fields() -> list[tuple[str, str]]:
    """(where, dotted field) for every field that a text of an error in pipeline/ names."""
    found = []
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
                "ValueError",
                "Busy",
            ):
                texts = [
                    part.value
                    for part in ast.walk(node)
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                ]
                for text in texts:
                    names = re.findall(
                        rf"(?<![\w./{{-])(?:{'|'.join(SECTIONS)})(?:\.[a-z_0-9]+)+", text
                    )
                    found += [(f"{path.relative_to(ROOT)}:{node.lineno}", name) for name in names]
    return found


def test_fields_that_errors_name_exist():
    found = named_fields()
    assert len(found) > 60
    wrong = [(where, name) for where, name in found if name not in KNOWN | NO_FIELDS]
    assert not wrong
