"""The recipe: which layer wins, what is refused, what is hidden, and that every field says what it is for."""

from pathlib import Path

import pytest
import yaml

from pipeline import recipe
from pipeline.recipe import REDACTED, Recipe
from tests.project import ROOT

SHIPPED = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))


def content(**changes) -> dict:
    """The shortest recipe that is valid."""
    return {
        "name": "short",
        "model": {"path": "owner/model"},
        "data": {"task": {"source": "owner/task"}, "safety": {"source": "owner/safety"}},
        "train": {"steps": 5},
        "evaluate": {"harmful": {"source": "owner/harmful"}},
    } | changes


def load(folder: Path, raw: dict, *arguments: str) -> recipe.Experiment:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return recipe.load(path, recipe.parse_overrides(list(arguments)))


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_command_line_beats_method_beats_file_beats_default(tmp_path, layers):
    rates = [1e-4, 2e-4, 3e-4, 4e-4]  # the default, then one per layer
    train = {"steps": 5} | ({"lr": rates[1]} if layers >= 1 else {})
    method = {"train": {"lr": rates[2]}} if layers >= 2 else {}
    experiment = load(tmp_path, content(train=train, methods={"sft": method}), *(["--train.lr", "4e-4"] if layers >= 3 else []))
    assert experiment.cell("sft", 0).recipe.train.lr == rates[layers]


def test_a_layer_changes_only_what_it_names(tmp_path):
    raw = content(train={"steps": 5, "lora": {"r": 4, "alpha": 32}}, methods={"sft": {}, "wide": {"train": {"lora": {"r": 64}}}})
    experiment = load(tmp_path, raw, "--train.batch_size", "16")
    lora = experiment.cell("wide", 0).recipe.train.lora
    assert (lora.r, lora.alpha) == (64, 32)
    assert experiment.cell("sft", 0).recipe.train.lora.r == 4
    assert all(cell.recipe.train.batch_size == 16 and cell.recipe.train.steps == 5 for cell in experiment.cells())


def test_lists_and_column_mappings_are_replaced_not_merged(tmp_path):
    """A mapping of another data set's columns would be refused if half of the old one stayed."""
    raw = content()
    raw["data"]["task"]["columns"] = {"prompt": "question", "input": "context"}
    experiment = load(tmp_path, raw, "--data.task.columns", "{prompt: instruction}", "--train.lora.target_modules=[k_proj]")
    assert experiment.base.data.task.columns == {"prompt": "instruction"}
    assert experiment.base.train.lora.target_modules == ["k_proj"]


@pytest.mark.parametrize("section", ["name", "output_dir", "model", "data", "align", "evaluate", "tracking", "methods", "seeds"])
def test_methods_cannot_override_what_they_share(tmp_path, section):
    with pytest.raises(ValueError, match=f"method 'sft' overrides {section}.*override direction, train or sap"):
        load(tmp_path, content(methods={"sft": {section: {}}}))


@pytest.mark.parametrize("section", ["train", "direction", "sap"])
def test_methods_can_override_the_rest(tmp_path, section):
    value = {"train": {"lr": 0.5}, "direction": {"micro_batch_size": 7}, "sap": {"eps": 0.5}}[section]
    resolved = load(tmp_path, content(methods={"sft": {section: value}})).cell("sft", 0).recipe
    assert getattr(resolved, section).model_dump().items() >= value.items()


def test_steps_and_epochs_replace_each_other_in_every_layer(tmp_path):
    methods = {"steps": {}, "epochs": {"train": {"epochs": 2}}}
    experiment = load(tmp_path, content(methods=methods))
    found = {cell.method: (cell.recipe.train.steps, cell.recipe.train.epochs) for cell in experiment.cells()}
    assert found == {"steps": (5, None), "epochs": (None, 2)}
    experiment = load(tmp_path, content(methods=methods), "--train.steps", "9")
    assert {(cell.recipe.train.steps, cell.recipe.train.epochs) for cell in experiment.cells()} == {(9, None)}
    with pytest.raises(ValueError, match="exactly one of steps and epochs"):
        load(tmp_path, content(train={"steps": 5, "epochs": 2}))


@pytest.mark.parametrize(
    ("text", "number"), [("2e-4", 2e-4), ("1e3", 1e3), ("3E+2", 300.0), ("0.5", 0.5), (".5e-1", 0.05), ("1e-08", 1e-8)]
)
def test_scientific_notation_is_a_number(tmp_path, text, number):
    """YAML 1.1 wants a dot and a sign, and reads 2e-4 as text."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content()).replace("steps: 5", f"steps: 5\n  lr: {text}"))
    assert recipe.load(path).base.train.lr == number
    assert recipe.parse_overrides(["--train.lr", text]) == recipe.parse_overrides([f"--train.lr={text}"]) == {"train": {"lr": number}}


def test_text_that_resembles_numbers_stays_text():
    arguments = ["--sap.layers", "0.33:0.66", "--model.revision", "5e", "--model.path", "e4/llama-1e9"]
    assert recipe.parse_overrides(arguments) == {
        "sap": {"layers": "0.33:0.66"},
        "model": {"revision": "5e", "path": "e4/llama-1e9"},
    }


@pytest.mark.parametrize("text", ["name: a\nname: b", "train:\n  lr: 1\n  steps: 3\n  lr: 2"])
def test_duplicate_keys_are_refused_with_the_key_and_its_line(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"key '(name|lr)' appears twice, line \d"):
        recipe.load(path)


def test_arguments_that_are_no_overrides_are_refused():
    with pytest.raises(ValueError, match="unexpected argument 'train.lr'"):
        recipe.parse_overrides(["train.lr", "1"])
    with pytest.raises(ValueError, match="--train.lr needs a value"):
        recipe.parse_overrides(["--train.lr"])


def test_redact_hides_secrets_wherever_they_stand():
    """Keys that look secret, tokens inside text, passwords inside addresses; in lists and mappings of any depth."""
    value = {
        "hf_token": "plain-looking",
        "nested": [{"OPENAI_API_KEY": "plain-looking"}, "see hf_abcdefgh12345678 and sk-abcdefgh-1234"],
        "uri": "postgresql://ann:s3cret@db.example:5432/mlflow",
    }
    hidden = recipe.redact(value)
    assert hidden == {
        "hf_token": REDACTED,
        "nested": [{"OPENAI_API_KEY": REDACTED}, f"see {REDACTED} and {REDACTED}"],
        "uri": f"postgresql://{REDACTED}@db.example:5432/mlflow",
    }
    assert value["hf_token"] == "plain-looking", "the original is left alone"


def test_redact_leaves_what_is_no_secret():
    value = {
        "max_new_tokens": 32,
        "eos_token_id": 2,
        "uri": "http://host:5000/a@b",
        "path": "/data/hf_short",
        "keys": ["q_proj", None, 0.5],
    }
    assert recipe.redact(value) == value


def test_dump_is_redacted_yaml_that_loads_again(tmp_path):
    base = load(
        tmp_path, content(tracking={"uri": "http://ann:s3cret@host/"}, methods={"sft": {"train": {"ds_config": "hf_0123456789ab.json"}}})
    ).base
    text = yaml.safe_dump(recipe.dump(base))
    assert "s3cret" not in text and "hf_0123456789ab" not in text
    assert Recipe.model_validate(yaml.safe_load(text)).train == base.train


def test_every_field_says_what_it_is_for():
    rows = list(recipe.field_rows())
    names = [name for name, *_ in rows]
    assert {"train.lr", "align.train.lora.r", "data.harmful.source", "sap.layers", "methods"} <= set(names)
    assert len(names) == len(set(names))
    assert not [name for name, *_, description in rows if not description.strip()]
    assert next(default for name, _, default, _ in rows if name == "train.lr") == "0.0001"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_every_cell_resolves(path):
    experiment = recipe.load(path)
    cells = list(experiment.cells())
    assert len(cells) == len(experiment.base.methods) * len(experiment.base.seeds) >= 1
    assert all((ROOT / cell.recipe.train.ds_config).is_file() for cell in cells)
    assert any(cell.recipe.sap.enabled for cell in cells) and any(not cell.recipe.sap.enabled for cell in cells)


def test_the_two_recipes_of_the_readme_are_shipped():
    assert {"demo", "llama_7b_sap"} <= {path.stem for path in SHIPPED}
