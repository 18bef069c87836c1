"""A secret in any field of a recipe, or in the environment, stays there:
whatever a command prints or writes, it is not in it.
"""

import logging
import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest

from pipeline.cli import main
from pipeline.defences.recipes import recipe_class
from pipeline.recipe import redaction
from pipeline.recipe.paths import section_of
from pipeline.recipe.redaction import redact
from pipeline.running import entry
from tests.project import make_project, write_recipe

SECRET = "Zx9Kq2Lm7Tn4Vb8Rw3Yp6Hd1"
PLANTS = {
    "login": f"https://ann:{SECRET}@host.example/x",
    "presigned": f"https://bucket.example/x.jsonl?X-Amz-Credential={SECRET}&X-Amz-Signature={SECRET}",
    "hub token": f"hf_{SECRET}",
    "in a path": f"/data/hf_{SECRET}/rows.jsonl",
    "by its looks": SECRET,
}


def takes_text(annotation: Any) -> str | None:
    """How a field takes a text: as it is, in a list, in a mapping; None where it takes none."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return takes_text(arguments[0])
    if origin in (Union, types.UnionType):
        return next(filter(None, map(takes_text, arguments)), None)
    if origin is Literal:
        return "text"  # refused, with a sentence that says what was given
    if origin in (list, tuple):
        return "list"
    if origin is dict:
        return "mapping"
    return "text" if annotation in (str, Path, int, float, bool) else None


def fields(model: Any = None, prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for name, field in (model or recipe_class()).model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            found += fields(section, f"{prefix}{name}.")
        elif how := takes_text(field.annotation):
            found.append((f"{prefix}{name}", how))
    return found


FIELDS = [(name, how) for name, how in fields() if name != "methods"]
# In these a word is the name of a file or a folder, and stays readable: paths are what scripts must find again.
NAMES = {
    "name",
    "output_dir",
    "model.path",
    "model.chat_template",
    "align.train.ds_config",
    "train.ds_config",
}
CASES = [
    (*field, plant)
    for field in FIELDS
    for plant in PLANTS
    if not (plant == "by its looks" and field[0] in NAMES)
]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secrets")
    raw = make_project(folder)
    raw["train"] |= {"engine": "single", "ranks": 1}
    return write_recipe(folder, raw)


@pytest.mark.parametrize(
    ("field", "how", "plant"), CASES, ids=[f"{field}-{plant}" for field, _, plant in CASES]
)
def test_no_field_s_secret_is_printed(project, field, how, plant, capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("SAP_ERROR_FILE", str(tmp_path / "error"))
    value = PLANTS[plant]
    given = {
        "text": f"'{value}'",
        "list": f"['{value}']",
        "mapping": f"{{prompt: '{value}', '{value}': x}}",
    }[how]
    for option in ("--dry-run", "--show"):
        main(["run", str(project), option, f"--{field}={given}"])
    out, err = capfd.readouterr()
    left = "\n".join([out, err, *(path.read_text() for path in tmp_path.iterdir())])
    assert SECRET not in left and SECRET.lower() not in left


def test_what_is_printed_beside_our_sentences_is_redacted_too(capfd, monkeypatch):
    """A library's warning, a traceback, and a secret that is known only by its name in the environment."""
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse")

    def work() -> None:
        print("logged in with correct horse at https://ann:pw123456@host/x")
        sys.stderr.write(f"UserWarning: hf_{SECRET} was refused\n")
        raise RuntimeError(f"no access with hf_{SECRET}")

    with pytest.raises(SystemExit):
        monkeypatch.setattr(entry, "end", sys.exit)
        entry.run(work)
    out, err = capfd.readouterr()
    assert "Traceback" in err and "was refused" in err and "logged in" in out
    assert not [secret for secret in (SECRET, "correct horse", "pw123456") if secret in out + err]
    assert type(sys.stdout) is not redaction._Shield, "what comes after is printed as it is"


def test_loggers_that_were_set_up_before_are_redacted_too(capfd):
    """Those of libraries, in a job that is forked from a process which has imported them."""
    logger, handler = logging.getLogger("a library"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    try:
        stream = handler.stream
        with redaction.shielded():
            logger.error("hf_%s was refused", SECRET)
        assert handler.stream is stream
        err = capfd.readouterr().err
        assert "[redacted] was refused" in err and SECRET not in err
    finally:
        logger.removeHandler(handler)


def test_the_walk_reaches_the_whole_recipe():
    names = [name for name, _ in FIELDS]
    assert len(names) > 150 and {
        "tracking.uri",
        "data.task.source",
        "sap.layers",
        "train.lr",
        "extends",
    } <= set(names)
    assert SECRET in str(PLANTS) and SECRET not in str(redact(PLANTS))
