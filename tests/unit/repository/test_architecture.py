"""Imports go down: from a floor of tests/tools/architecture.py to those below it.

And what one wing keeps to itself, no other uses.
"""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.tools.architecture import FLOORS, ROOT, circles, floor, imports, modules, tree, wing


def test_every_wing_has_a_floor_and_there_are_at_most_ten():
    assert sorted({wing(module) for module in modules()}) == sorted(
        name for wings in FLOORS for name in wings
    )
    assert len(FLOORS) <= 10


def test_nothing_imports_upwards_or_beside_itself():
    wrong = [
        f"{module}:{line} imports {target}"
        for module in modules()
        for target, _, line in imports(module)
        if wing(target) != wing(module) and floor(wing(target)) >= floor(wing(module))
    ]
    assert not wrong


def test_no_modules_import_each_other():
    assert not circles()


def test_only_the_command_and_the_artefact_store_stand_in_the_root():
    assert {path.name for path in (ROOT / "pipeline").glob("*.py")} == {
        "__init__.py",
        "artifacts.py",
        "cli.py",
    }


def test_tests_stand_in_folders_of_the_wings_names():
    """tests/unit has a folder a wing, and one for the repository's own files; no test stands beside the folders."""
    files = subprocess.run(
        ["git", "ls-files", "tests"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    folders = {str(Path(file).parent.relative_to("tests")) for file in files if "/test_" in file}
    wings = {name for wings in FLOORS for name in wings}
    units = {f"unit/{name}" for name in wings | {"repository"}}
    assert len(folders) > 20 and folders <= units | {"distributed", "gpu", "slurm", "tools"}


def test_no_wing_uses_what_another_keeps_to_itself():
    assert not [fault for module in modules() for fault in _private_uses(module)]


def _private_uses(module):
    """Names with an underscore, of another wing's modules: imported, or reached for through one."""
    bound = {}
    for target, name, line in imports(module):
        if wing(target) != wing(module):
            bound[name] = target
            if name.startswith("_"):
                yield f"{module}:{line} imports {name} of {target}"
    for node in ast.walk(tree(module)):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in bound
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
        ):
            yield f"{module}:{node.lineno} uses {bound[node.value.id]}.{node.attr}"


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("from pipeline.data.rows import _made", 1),
        ("from pipeline.data import rows\nrows._made()", 1),
        ("from pipeline.data import rows\nrows.made()\nrows.__doc__", 0),
        ("from pipeline.stages import layout\nlayout._short", 0),
    ],
)
def test_the_rule_sees_what_is_private(monkeypatch, text, faults):
    monkeypatch.setattr(
        "tests.unit.repository.test_architecture.tree", lambda module: ast.parse(text)
    )
    monkeypatch.setattr("tests.tools.architecture.tree", lambda module: ast.parse(text))
    assert len(list(_private_uses("pipeline.stages.train"))) == faults


_CITED = re.compile(r"(?<![\w./*<{-])((?:[\w-]+/)*[\w-]+\.(?:py|md|sh|yaml|json|toml))\b(?![\w/])")
# Of libraries and of what users have; and what stages write.
_ELSEWHERE = re.compile(
    r"config|tokenizer|index|recipe\.json|facts\.json|summary\.json|state\.json|metrics|support_bot|mine|manifest|NAME",
    re.I,
)


def _missing(cited):
    """Of (where, path): those whose path no file of the project has, nor ends in."""
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    return {
        (where, path)
        for where, path in cited
        if not any(file == path or file.endswith(f"/{path}") for file in files)
    }


def test_paths_that_docstrings_cite_exist():
    cited = {
        (module, path)
        for module in modules()
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        for path in _CITED.findall(ast.get_docstring(node) or "")
        if path.endswith((".py", ".md", ".sh")) or "/" in path
    }
    assert len(cited) > 30
    assert not {(module, path) for module, path in _missing(cited) if not _ELSEWHERE.search(path)}


# What documents call a user's recipes, modules that CONTRIBUTING.md lets its reader write, places to fill in, and a
# test's parameter.
_NOT_OURS = {
    "d.json",
    "my.yaml",
    "my_recipe.yaml",
    "other.yaml",
    "pipeline/defences/anchor.py",
    "pipeline/stages/count.py",
    "sap_SIZE.sh",
    "SAP_HOME/slurm/submit.sh",
}


def test_paths_that_documents_cite_exist():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    cited = {
        (document.name, path)
        for document in documents
        for path in _CITED.findall(document.read_text())
    }
    assert len(documents) > 10 and len(cited) > 100
    assert ("methods.md", "pipeline/defences/lisa/step.py") in cited
    missing = {
        (document, path)
        for document, path in _missing(cited)
        if path not in _NOT_OURS and not _ELSEWHERE.search(path)
    }
    assert not missing
