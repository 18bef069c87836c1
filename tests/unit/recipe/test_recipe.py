"""The recipe: which layer wins, what is refused, what is hidden, and that every field says what it is for."""

import json
import math
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import ValidationError

from pipeline.defences import DEFENCES, recipes
from pipeline.defences.recipes import recipe_class
from pipeline.recipe import recipe
from pipeline.recipe.redaction import REDACTED, redact
from pipeline.recipe.sections import Section
from pipeline.recipe.strict_yaml import as_arguments, parse_overrides
from pipeline.running import devices
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
    return recipes.load(path, parse_overrides(list(arguments)))


def holds_numbers(annotation: object) -> bool:
    return annotation in (int, float) or any(map(holds_numbers, get_args(annotation)))


def sections(found: type[Section] = Section) -> list[type[Section]]:
    return [each for section in found.__subclasses__() for each in (section, *sections(section))]


NUMBERS = [
    (section, name)
    for section in sections()
    for name, field in section.model_fields.items()
    if holds_numbers(field.annotation)
]


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    ("section", "name"), NUMBERS, ids=[f"{section.__name__}.{name}" for section, name in NUMBERS]
)
def test_no_field_takes_a_number_that_is_none(section, name, number):
    """An adam_eps of .inf trains nothing and says nothing."""
    for value in (number, [number]) if name in ("layers", "seeds") else (number,):
        with pytest.raises(ValidationError) as refused:
            section.model_validate({name: value})
        assert any(error["loc"][0] == name for error in refused.value.errors()), value


@pytest.mark.parametrize(
    "field", ["train.epochs", "train.weight_decay", "sap.probe_share", "evaluate.harmful_prompts"]
)
def test_a_truth_is_no_number(tmp_path, field):
    with pytest.raises(
        ValueError, match=f"{field.split('.')[0]}: {field.split('.')[1]} is true: it takes a number"
    ):
        load(
            tmp_path,
            content(train={}) if field == "train.epochs" else content(),
            f"--{field}",
            "true",
        )
    assert (
        load(
            tmp_path, content(), "--train.gradient_checkpointing", "true"
        ).base.train.gradient_checkpointing
        is True
    )


def test_numbers_that_are_none_are_refused_in_a_sentence(tmp_path):
    assert len(NUMBERS) > 60, "the walk finds next to nothing"
    for text in (".inf", "-.inf", ".nan", "1e999"):
        with pytest.raises(
            ValueError,
            match=r"'train.adam_eps' is -?(inf|nan), but: input should be a finite number",
        ):
            load(tmp_path, content(), "--train.adam_eps", text)


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_command_line_beats_method_beats_file_beats_default(tmp_path, layers):
    rates = [1e-4, 2e-4, 3e-4, 4e-4]  # the default, then one per layer
    train = {"steps": 5} | ({"lr": rates[1]} if layers >= 1 else {})
    method = {"train": {"lr": rates[2]}} if layers >= 2 else {}
    experiment = load(
        tmp_path,
        content(train=train, methods={"sft": method}),
        *(["--train.lr", "4e-4"] if layers >= 3 else []),
    )
    assert experiment.cell("sft", 0).recipe.train.lr == rates[layers]


def test_a_layer_changes_only_what_it_names(tmp_path):
    raw = content(
        train={"steps": 5, "lora": {"r": 4, "alpha": 32}},
        methods={"sft": {}, "wide": {"train": {"lora": {"r": 64}}}},
    )
    experiment = load(tmp_path, raw, "--train.batch_size", "16")
    lora = experiment.cell("wide", 0).recipe.train.lora
    assert (lora.r, lora.alpha) == (64, 32)
    assert experiment.cell("sft", 0).recipe.train.lora.r == 4
    assert all(
        cell.recipe.train.batch_size == 16 and cell.recipe.train.steps == 5
        for cell in experiment.cells()
    )


def test_lists_and_column_mappings_are_replaced_not_merged(tmp_path):
    """A mapping of another data set's columns would be refused if half of the old one stayed."""
    raw = content()
    raw["data"]["task"]["columns"] = {"prompt": "question", "input": "context"}
    experiment = load(
        tmp_path,
        raw,
        "--data.task.columns",
        "{prompt: instruction}",
        "--train.lora.target_modules=[k_proj]",
    )
    assert experiment.base.data.task.columns == {"prompt": "instruction"}
    assert experiment.base.train.lora.target_modules == ["k_proj"]


@pytest.mark.parametrize(
    "section",
    ["name", "output_dir", "model", "data", "align", "evaluate", "tracking", "methods", "seeds"],
)
def test_methods_cannot_override_what_they_share(tmp_path, section):
    with pytest.raises(
        ValueError,
        match=f"method 'sft' overrides {section}.*override direction, train, safety_pairs, saft, sap, ",
    ):
        load(tmp_path, content(methods={"sft": {section: {}}}))


@pytest.mark.parametrize("section", ["train", "direction", "sap"])
def test_methods_can_override_the_rest(tmp_path, section):
    value = {
        "train": {"lr": 0.5},
        "direction": {"micro_batch_size": 7},
        "sap": {"eps": 0.5, "enabled": True},
    }[section]
    resolved = load(tmp_path, content(methods={"sft": {section: value}})).cell("sft", 0).recipe
    assert getattr(resolved, section).model_dump().items() >= value.items()


SWITCHED = ["saft", "sap", "safety_gradient", "lisa", "safe_mix", "ema"]


@pytest.mark.parametrize("name", SWITCHED)
def test_a_section_that_a_method_fills_in_and_does_not_enable_is_refused(tmp_path, name):
    """It trained plainly, and nothing said so."""
    own = {} if name == "safe_mix" else FILLED[name]
    sentence = f"method 'mine' sets .*, but {name} is not enabled: write methods.mine.{name}: {{enabled: true, ..."
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path, content(methods={"sft": {}, "mine": {name: own}}))
    for meant in (
        content(methods={"mine": {name: own | {"enabled": True}}}),
        content(methods={"mine": {name: own | {"enabled": False}}}),
        {**content(methods={"mine": {name: own}}), name: {"enabled": True}},
    ):
        if name == "saft":
            meant["saft"] = {"contamination": 0.1, **meant.get("saft", {"enabled": False})}
        load(tmp_path, meant)


FILLED = {
    "saft": {"layer": 0.4},
    "sap": {"eps": 0.1},
    "safety_gradient": {"correction": 0.5},
    "lisa": {"rho": 0.3},
    "ema": {"decay": 0.8},
}


@pytest.mark.parametrize("name", [*FILLED, "align"])
def test_a_section_that_a_recipe_fills_in_and_nothing_enables_is_refused(tmp_path, name):
    own = FILLED.get(name, {"distill_tokens": 5})
    with pytest.raises(
        ValueError, match=rf"recipe.yaml: {name}\.\w+ would do nothing, because {name}"
    ):
        load(tmp_path, content(**{name: own}))
    load(tmp_path, content(**{name: {**own, "enabled": False}}))


def test_what_is_filled_in_for_methods_that_enable_it_or_another_recipe_left_out_is_meant(tmp_path):
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump(
            content(ema={"decay": 0.8}, methods={"ema": {"ema": {"enabled": True}}, "sft": {}})
        )
    )
    path = tmp_path / "recipe.yaml"
    path.write_text("extends: base.yaml\nmethods: {ema: null}\n")
    assert list(recipes.load(path).base.methods) == ["sft"]
    path.write_text("extends: base.yaml\nmethods: {unsmoothed: {ema: {enabled: false}}}\n")
    recipes.load(path)
    recipes.load(tmp_path / "base.yaml", {"ema": {"enabled": False}})
    path.write_text("extends: base.yaml\nlisa: {rho: 0.3}\n")
    with pytest.raises(
        ValueError, match=r"lisa\.rho would do nothing, because lisa\.enabled is not"
    ):
        recipes.load(path)
    recipes.load(path, {"lisa": {"enabled": True}, "methods": {"ema": None}})
    path.write_text(
        "extends: base.yaml\nmethods: {ema: null, mine: {grid: {lisa.rho: [0.1, 1.0]}}}\n"
    )
    with pytest.raises(ValueError, match=r"method 'mine.rho_0.1' sets lisa\.rho, but lisa is not"):
        recipes.load(path)


def test_steps_and_epochs_replace_each_other_in_every_layer(tmp_path):
    methods = {"steps": {}, "epochs": {"train": {"epochs": 2}}}
    experiment = load(tmp_path, content(methods=methods))
    found = {
        cell.method: (cell.recipe.train.steps, cell.recipe.train.epochs)
        for cell in experiment.cells()
    }
    assert found == {"steps": (5, None), "epochs": (None, 2)}
    experiment = load(tmp_path, content(methods=methods), "--train.steps", "9")
    assert {(cell.recipe.train.steps, cell.recipe.train.epochs) for cell in experiment.cells()} == {
        (9, None)
    }
    with pytest.raises(ValueError, match="exactly one of steps and epochs"):
        load(tmp_path, content(train={"steps": 5, "epochs": 2}))


@pytest.mark.parametrize(
    ("text", "number"),
    [("2e-4", 2e-4), ("1e3", 1e3), ("3E+2", 300.0), ("0.5", 0.5), (".5e-1", 0.05), ("1e-08", 1e-8)],
)
def test_scientific_notation_is_a_number(tmp_path, text, number):
    """YAML 1.1 wants a dot and a sign, and reads 2e-4 as text."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content()).replace("steps: 5", f"steps: 5\n  lr: {text}"))
    assert recipes.load(path).base.train.lr == number
    assert (
        parse_overrides(["--train.lr", text])
        == parse_overrides([f"--train.lr={text}"])
        == {"train": {"lr": number}}
    )


def test_text_that_resembles_numbers_stays_text():
    arguments = [
        "--sap.layers",
        "0.33:0.66",
        "--model.revision",
        "5e",
        "--model.path",
        "e4/llama-1e9",
    ]
    assert parse_overrides(arguments) == {
        "sap": {"layers": "0.33:0.66"},
        "model": {"revision": "5e", "path": "e4/llama-1e9"},
    }


def test_overrides_reach_the_launch_scripts_as_they_were_given():
    """A grid's fields are names with dots, and texts that look like numbers stay texts."""
    grid = (
        "{sap: {enabled: true}, grid: {train.lr: [2e-3, 3e-3], sap.target_correction: [1.0, 1.4]}}"
    )
    given = parse_overrides(
        [
            "--methods.more",
            grid,
            "--sap.layers='10:19'",
            "--name='1e5'",
            "--train.lora.target_modules=[q, v]",
            "--data.harmful=null",
        ]
    )
    assert given["methods"]["more"]["grid"] == {
        "train.lr": [0.002, 0.003],
        "sap.target_correction": [1.0, 1.4],
    }
    assert parse_overrides(as_arguments(given)) == given


@pytest.mark.parametrize("text", ["name: a\nname: b", "train:\n  lr: 1\n  steps: 3\n  lr: 2"])
def test_duplicate_keys_are_refused_with_the_key_and_its_line(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"key '(name|lr)' appears twice, line \d"):
        recipes.load(path)


def test_arguments_that_are_no_overrides_are_refused():
    with pytest.raises(ValueError, match=r"unexpected argument 'train.lr'"):
        parse_overrides(["train.lr", "1"])
    with pytest.raises(ValueError, match=r"--train.lr needs a value"):
        parse_overrides(["--train.lr"])


def extending(folder: Path, **files: dict) -> Path:
    """Write each mapping to NAME.yaml; returns the last one's path."""
    for name, raw in files.items():
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(raw))
    return path


def test_a_recipe_extends_another_beside_it(tmp_path):
    """Mappings are merged, other values replaced; the path is relative to the file, not to where the command runs."""
    (tmp_path / "shared").mkdir()
    extending(
        tmp_path / "shared",
        base=content(seeds=[0, 1], methods={"sft": {}}),
        middle={"extends": "base.yaml", "train": {"lr": 0.25}},
    )
    child = {
        "extends": "shared/middle.yaml",
        "name": "child",
        "train": {"epochs": 2},
        "methods": {"wide": {"train": {"lr": 0.5}}},
        "seeds": [7],
    }
    experiment = recipes.load(
        extending(tmp_path, child=child), parse_overrides(["--train.batch_size", "16"])
    )
    base = experiment.base
    assert (base.name, base.seeds, base.model.path, list(base.methods)) == (
        "child",
        [7],
        "owner/model",
        ["sft", "wide"],
    )
    assert (base.train.lr, base.train.steps, base.train.epochs, base.train.batch_size) == (
        0.25,
        None,
        2,
        16,
    )
    assert experiment.cell("wide", 7).recipe.train.lr == 0.5


def test_recipes_that_extend_each_other_are_refused(tmp_path):
    path = extending(
        tmp_path, a={"extends": "b.yaml"}, b={"extends": "c.yaml"}, c={"extends": "a.yaml"}
    )
    with pytest.raises(
        ValueError, match=r"extends of .*yaml leads back to itself: take one of them out"
    ):
        recipes.load(path)


def test_a_missing_base_is_one_sentence_that_names_both_files(tmp_path):
    path = extending(tmp_path, child={"extends": "gone.yaml"})
    with pytest.raises(ValueError) as caught:
        recipes.load(path)
    assert (
        str(caught.value)
        == f"extends of {path} names {tmp_path / 'gone.yaml'}, which does not exist: give a path relative to that file"
    )


def test_extends_has_its_place_in_the_file(tmp_path):
    """Anywhere else it would be read too late to have an effect."""
    with pytest.raises(ValueError, match="extends is read from a recipe's file only"):
        load(tmp_path, content(), "--extends", "other.yaml")
    with pytest.raises(ValueError, match="method 'sft' overrides extends"):
        load(tmp_path, content(methods={"sft": {"extends": "other.yaml"}}))
    with pytest.raises(ValueError, match="'extends' is 5, but"):
        load(tmp_path, content(extends=5))


@pytest.mark.parametrize("text", ["10:19", "1:30", "0:4", "10:19.5", "-1:20"])
def test_a_range_is_no_number_to_base_60(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content()) + f"sap:\n  enabled: true\n  layers: {text}\n")
    assert (
        parse_overrides(["--sap.layers", text])
        == parse_overrides([f"--sap.layers={text}"])
        == {"sap": {"layers": text}}
    )
    if not text.startswith("-"):
        assert recipes.load(path).base.sap.layers == text


def test_other_values_are_read_as_ever():
    values = {
        "7": 7,
        "-3": -3,
        "0": 0,
        "0x1f": 31,
        "1_000": 1000,
        "1.5": 1.5,
        "-1e3": -1e3,
        ".inf": float("inf"),
        "on": True,
        "no": False,
    }
    assert {text: parse_overrides([f"--a={text}"])["a"] for text in values} == values
    assert [type(parse_overrides([f"--a={text}"])["a"]) for text in values] == [
        type(value) for value in values.values()
    ]
    assert parse_overrides(["--a=0.33:0.66", "--b=null", "--c=2024-13-01"]) == {
        "a": "0.33:0.66",
        "b": None,
        "c": "2024-13-01",
    }


def test_merge_keys_and_what_is_written_beside_them(tmp_path):
    """An anchored section may be reused; a key beside `<<` wins and is no duplicate, a repeated one still is."""
    path = tmp_path / "recipe.yaml"
    text = yaml.safe_dump({key: value for key, value in content().items() if key != "train"})
    path.write_text(
        text
        + (
            "train: &t {steps: 5, lr: 0.5, lora: &l {r: 4}}\nalign:\n  enabled: false\n"
            "  train: {<<: *t, lr: 0.25, lora: {<<: *l, alpha: 3}}\n"
        )
    )
    base = recipes.load(path).base
    assert (base.align.train.steps, base.align.train.lr, base.train.lr) == (5, 0.25, 0.5)
    assert (base.align.train.lora.r, base.align.train.lora.alpha, base.train.lora.alpha) == (
        4,
        3,
        16,
    )
    path.write_text("train: &t {steps: 5}\nalign:\n  train: {<<: *t, lr: 1, lr: 2}\n")
    with pytest.raises(ValueError, match="key 'lr' appears twice, line 3"):
        recipes.load(path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--train", "3", "--train.lr", "1"],
        ["--train.lr", "1", "--train", "3"],
        ["--train={lora: 3}", "--train.lora.r=4"],
    ],
)
def test_a_part_and_its_whole_contradict_each_other(arguments):
    with pytest.raises(ValueError, match=r"sets a part of .*: leave one of them out"):
        parse_overrides(arguments)


def test_a_part_and_a_mapping_are_merged():
    assert parse_overrides(["--train={lr: 1, steps: 2}", "--train.lr=3"]) == {
        "train": {"lr": 3, "steps": 2}
    }
    assert parse_overrides(["--train.lr=3", "--train={steps: 2}"]) == {
        "train": {"lr": 3, "steps": 2}
    }


@pytest.mark.parametrize("targets", ["all-linear", ".*q_proj", ["q_proj"]])
def test_targets_of_an_adapter(tmp_path, targets):
    experiment = load(tmp_path, content(), f"--train.lora.target_modules={json.dumps(targets)}")
    assert experiment.base.train.lora.target_modules == targets


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--sap.layers", "5"],
            "'sap.layers' is 5, but: it takes str | list of int | list of float",
        ),
        (
            ["--sap.layers", "[a]"],
            "'sap.layers' is ['a'], but: it takes str | list of int | list of float",
        ),
        (
            ["--train.lora.target_modules=[1]"],
            "'train.lora.target_modules.0' is 1, but: input should be a valid string",
        ),
        (
            ["--data.task.columns={str: 1}"],
            "'data.task.columns.str' is 1, but: input should be a valid string",
        ),
        (["--methods.sft.sap.layers=5"], "'sap.layers' is 5, but"),
        (["--methods=[1]"], "'methods' is [1], but: input should be a valid dictionary"),
        (["--methods={5: {}}"], "'methods.5' is 5, but: input should be a valid string"),
        (
            ["--train.lora.target_modules=5"],
            "'train.lora.target_modules' is 5, but: it takes list of str | str",
        ),
        (
            ["--train.lora.target_modules=[]"],
            "train.lora.target_modules: must name at least one module",
        ),
        (
            ["--train.lora.target_modules='('"],
            "train.lora.target_modules: '(' is not a regular expression (missing )",
        ),
        (
            ["--train.lora.modules_to_save=[lm_head]"],
            "train.lora: modules_to_save is not supported: no whole module",
        ),
        (
            ["--align.train.lora.modules_to_save=[lm_head]"],
            "align.train.lora: modules_to_save is not supported",
        ),
        (
            ["--train.lora.rank=3"],
            "unknown key 'train.lora.rank'; the nearest known one is 'train.lora.",
        ),
        (["--train.lr=-1"], "'train.lr' is -1, but: input should be greater than 0"),
        (
            ["--safety_pairs=48"],
            "'safety_pairs' is 48, but it is a section: write its fields, as in safety_pairs: "
            "{batch_size: ...}; data.safety_pairs takes a number",
        ),
        (
            ["--data.safety_pairs.batch_size=4"],
            "'data.safety_pairs' holds fields, but it takes a number: fields go into the section safety_pairs, "
            "which stands beside data",
        ),
        (
            ["--data.task=tickets.csv"],
            "'data.task' is 'tickets.csv', but it is a section: write its fields, as in task: {source: ...}",
        ),
        (
            ["--train.refresh_every=4"],
            "unknown key 'train.refresh_every': write safety_pairs.refresh",
        ),
        (["--refresh_every=4"], "unknown key 'refresh_every': write safety_pairs.refresh_every"),
        (
            ["--lisa.batch_size=4"],
            "unknown key: write safety_pairs.batch_size instead of lisa.batch_size",
        ),
        (
            ["--methods.m.lisa.micro_batch_size=4"],
            "unknown key: write methods.m.safety_pairs.micro_batch_size instead of "
            "methods.m.lisa.micro_batch_size",
        ),
    ],
)
def test_an_error_names_the_field_as_it_is_written(tmp_path, arguments, sentence):
    with pytest.raises(ValueError) as caught:
        load(tmp_path, content(), *arguments)
    assert sentence in str(caught.value)


def test_all_moved_keys_of_an_old_recipe_are_listed_at_once(tmp_path):
    """One a try took a try for each."""
    methods = {"sap": {"sap": {"enabled": True, "safety_micro_batch_size": 2}}}
    methods["tuned"] = {"grid": {"sap.refresh_every": [1, 4]}}
    with pytest.raises(ValueError) as caught:
        load(tmp_path, content(sap={"refresh_every": 4, "safety_batch_size": 8}, methods=methods))
    assert str(caught.value).partition("recipe.yaml: ")[2] == (
        "unknown keys: write safety_pairs.refresh_every instead of sap.refresh_every, "
        "and safety_pairs.batch_size instead of sap.safety_batch_size, "
        "and methods.sap.safety_pairs.micro_batch_size instead of methods.sap.sap.safety_micro_batch_size, "
        "and methods.tuned.grid.safety_pairs.refresh_every instead of methods.tuned.grid.sap.refresh_every"
    )


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        # no token by its looks: its name says so
        (["--methods.api_key", "1234567"], "methods.api_key"),
        (["--data.task.columns.password", "[1234567]"], "data.task.columns.password"),
        (["--model={path: x, revision: [hf_abcd1234567]}"], "model.revision"),
        (["--tracking.uri=[http://ann:1234567@host]"], "tracking.uri"),
        (["--data.task={auth_token: 1234567, source: [{password: 1234567}]}"], "data.task.source"),
        (["--sap.layers=sk-1234567-abc"], "sap.layers"),
    ],
)
def test_an_error_keeps_a_refused_secret_to_itself(tmp_path, arguments, field):
    with pytest.raises(ValueError) as caught:
        load(tmp_path, content(), *arguments)
    assert (
        field in str(caught.value)
        and REDACTED in str(caught.value)
        and "1234567" not in str(caught.value)
    )


def test_broken_yaml_is_located_but_not_quoted(tmp_path):
    """The line may hold a secret."""
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\ntracking: {uri: http://ann:s3cret@host\nmodel: y")
    with pytest.raises(
        ValueError, match=r"is not valid YAML: while parsing a flow mapping, .*, line \d"
    ) as caught:
        recipes.load(path)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (
            "postgresql://ann:s3cret@db.example:5432/mlflow",
            "postgresql://[redacted]@db.example:5432/mlflow",
        ),
        ("http://:s3cret@host/x", "http://[redacted]@host/x"),
        ("https://s3cret@host", "https://[redacted]@host"),
        ("http://ann:s3/c@r:et@host:5000 is down", "http://[redacted]@host:5000 is down"),
        (
            "http://ann:p@one and http://bob:p@two",
            "http://[redacted]@one and http://[redacted]@two",
        ),
        ("http://host/x?access_token=s3cret&n=3", "http://host/x?access_token=[redacted]&n=3"),
        (
            "s3://b/k?X-Amz-Signature=s3&X-Amz-Credential=cret&sig=a",
            "s3://b/k?X-Amz-Signature=[redacted]&X-Amz-Credential=[redacted]&sig=[redacted]",
        ),
        ("mysql://host/db?user=a&Password=s3cret", "mysql://host/db?user=a&Password=[redacted]"),
        ("http://host/?token=s3@cret", "http://[redacted]"),
        ("http://ann:s3cret@host/?api_key=s3cret", "http://[redacted]@host/?api_key=[redacted]"),
        ("Authorization: Bearer s3cret.x-y", "Authorization: Bearer [redacted]"),
        ("Basic czNjcmV0 was refused", "Basic [redacted] was refused"),
        ("see hf_abcdefgh12345678 and sk-abcdefgh-1234.", "see [redacted] and [redacted]."),
        ("/x/hf_abcdefgh12345678/y", "/x/[redacted]/y"),
        *(
            (f"={prefix}_abcdefghij0123456789", "=[redacted]")
            for prefix in ("ghp", "gho", "ghu", "ghs", "ghr", "github_pat")
        ),
        ("AKIAIOSFODNN7EXAMPLE", "[redacted]"),
        ("https:/ann:s3cret@host/x", "https:/[redacted]@host/x"),  # as pathlib leaves an address
        *(
            (f"{token} no", "[redacted] no")
            for token in (
                "glpat-abcd1234efgh",
                "xoxb-1234-abcd5678",
                "npm_abcdefgh1234",
                "rk_live_abcdefgh",
                "AIza" + "Sy0" * 11,
            )
        ),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.c2ln", "[redacted]"),
        (
            "key Zx9Kq2Lm7Tn4Vb8Rw3Yp6Hd1, or dGhpc0lzQVNlY3JldEtleTEyMw== too",
            "key [redacted], or [redacted] too",
        ),
    ],
)
def test_redact_hides_secrets_inside_text(text, hidden):
    assert redact(text) == hidden and redact([{"a": (text,)}]) == [{"a": [hidden]}]


def test_redact_hides_whatever_stands_under_a_secret_name():
    names = [
        "hf_token",
        "OPENAI_API_KEY",
        "password",
        "db.passwd",
        "client-secret",
        "aws_secret_access_key",
        "credentials",
        "Authorization",
    ]
    for value in ("plain-looking", 1234, 0.5, True, ["a", 1], {"b": "c"}, ""):
        original = {"nested": [{name: value for name in names}]}
        assert redact(original) == {"nested": [{name: REDACTED for name in names}]}
        assert original["nested"][0]["hf_token"] == value, "the original is left alone"
    assert redact({"password": None}) == {"password": None}, "that none is given is no secret"


def test_redact_leaves_what_is_no_secret():
    value = {
        "max_new_tokens": 32,
        "eos_token_id": 2,
        "key": "train-sap-s0",
        "uri": "http://host:5000/a?run=b",
        "database": "sqlite:////home/a@b/mlflow.db",
        "path": "/data/hf_short",
        "paths": [
            "/data/task-experiments/x",
            "task-safety-v1",
            "desk-abcdefghijk",
            "xhf_abcdefgh12345678",
            "q_proj",
            None,
            0.5,
        ],
        "columns": {"prompt": "instruction"},
        "names": [
            "Meta-Llama-3.1-8B-Instruct-abliterated-GPTQ",
            "Qwen3-235B-A22B-Instruct-2507-FP8",
            "train-sap-s0-1a2b3c4d5e",
            "AntidisestablishmentarianismIsLong1",
        ],
        "digest": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "folder": "/mnt/Zx9Kq2Lm7Tn4Vb8Rw3Yp6Hd1/runs",
        "layer": "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
    }
    assert redact(value) == value


@pytest.mark.parametrize("field", ["name", "output_dir"])
def test_what_names_folders_holds_no_token(tmp_path, field):
    with pytest.raises(
        ValueError, match=f"{field}: .*holds what looks like a token, and names folders"
    ) as refused:
        load(tmp_path, content(), f"--{field}", "hf_abcdefgh12345678")
    assert "abcdefgh" not in str(refused.value)


def test_dump_is_redacted_yaml_that_loads_again(tmp_path):
    base = load(
        tmp_path,
        content(
            tracking={"uri": "http://ann:s3cret@host/"},
            methods={"sft": {"train": {"ds_config": "hf_0123456789ab.json"}}},
        ),
    ).base
    text = yaml.safe_dump(recipe.dump(base))
    assert "s3cret" not in text and "hf_0123456789ab" not in text
    assert recipe_class().model_validate(yaml.safe_load(text)).train == base.train


def test_every_field_says_what_it_is_for():
    rows = list(recipes.field_rows())
    names = [name for name, *_ in rows]
    assert {
        "train.lr",
        "align.train.lora.r",
        "data.harmful.source",
        "sap.layers",
        "methods",
    } <= set(names)
    assert len(names) == len(set(names))
    assert not [name for name, *_, description in rows if not description.strip()]
    assert next(default for name, _, default, _ in rows if name == "train.lr") == "0.0001"


def test_the_help_names_types_as_a_user_would():
    kinds = {name: kind for name, kind, *_ in recipes.field_rows()}
    assert {
        name: kinds[name]
        for name in (
            "train.steps",
            "train.epochs",
            "sap.layers",
            "seeds",
            "methods",
            "data.task.columns",
        )
    } == {
        "train.steps": "int | None",
        "train.epochs": "float | None",
        "sap.layers": "str | list of int | list of float",
        "seeds": "list of int",
        "methods": "mapping of str to mapping",
        "data.task.columns": "mapping of str to str",
    }
    assert kinds["train.engine"].split("|")[0] == "zero3" and kinds["extends"] == "Path | None"
    assert not [
        kind
        for kind in kinds.values()
        if set("[]()'") & set(kind) or "typing" in kind or "Optional" in kind
    ]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_every_cell_resolves(path):
    experiment = recipes.load(path)
    cells = list(experiment.cells())
    assert len(cells) == len(experiment.base.methods) * len(experiment.base.seeds) >= 1
    assert all(devices.ds_config(cell.recipe.train).is_file() for cell in cells)
    assert any(cell.recipe.sap.enabled for cell in cells) and any(
        not cell.recipe.sap.enabled for cell in cells
    )


def test_the_two_recipes_of_the_readme_are_shipped():
    assert {"demo", "llama_7b_sap"} <= {path.stem for path in SHIPPED}


def test_a_grid_makes_a_method_of_every_combination(tmp_path):
    grid = {"train.lr": [1e-3, 2e-5], "sap.schedule": ["exact", "lagged"]}
    methods = {"sft": {}, "sap": {"sap": {"enabled": True, "eps": 0.1}, "grid": grid}}
    experiment = load(tmp_path, content(methods=methods))
    found = {
        cell.method: (cell.recipe.train.lr, cell.recipe.sap.schedule, cell.recipe.sap.eps)
        for cell in experiment.cells()
    }
    assert found == {
        "sft": (1e-4, "exact", 0.05),
        "sap.schedule_exact.lr_0.001": (1e-3, "exact", 0.1), "sap.schedule_lagged.lr_0.001": (1e-3, "lagged", 0.1),
        "sap.schedule_exact.lr_2em05": (2e-5, "exact", 0.1), "sap.schedule_lagged.lr_2em05": (2e-5, "lagged", 0.1),
    }  # fmt: skip


def test_a_grid_is_chosen_by_the_name_before_its_settings(tmp_path):
    methods = {"sft": {"grid": {"train.lr": [1e-3, 5e-4]}}, "sft_ema": {"ema": {"enabled": True}}}
    experiment = load(tmp_path, content(methods=methods))
    assert list(experiment.only(["sft"]).base.methods) == ["sft.lr_0.001", "sft.lr_0.0005"]
    assert list(experiment.only(["sft_ema", "sft.lr_0.0005"]).base.methods) == [
        "sft.lr_0.0005",
        "sft_ema",
    ]
    grid = {"sap.target_correction": [1.0, 1.4]}
    other = load(tmp_path, content(methods={"sap": {"sap": {"enabled": True}, "grid": grid}}))
    assert list(other.only(["sap.target_correction_1"]).base.methods) == [
        "sap.target_correction_1"
    ], "not 1.4, whose name goes on from there"
    with pytest.raises(ValueError, match=r"no method 'sft.lr'"):
        experiment.only(["sft.lr"])


@pytest.mark.parametrize("grid", [[1, 2], {}, {"train.lr": 1e-3}, {"train.lr": []}])
def test_a_grid_that_is_none_is_refused_with_an_example(tmp_path, grid):
    with pytest.raises(
        ValueError,
        match=r"the grid of method 'sft' must map fields to lists of values, e.g. {train.lr: ",
    ):
        load(tmp_path, content(methods={"sft": {"grid": grid}}))


def test_a_grid_over_what_is_no_field_is_an_unknown_key(tmp_path):
    with pytest.raises(ValueError, match=r"unknown key 'train.rate'"):
        load(tmp_path, content(methods={"sft": {"grid": {"train.rate": [1, 2]}}}))


def test_cells_of_a_grid_that_would_have_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the grid of method 'sap' names two cells layers_3939"):
        load(tmp_path, content(methods={"sap": {"grid": {"sap.layers": [[3, 939], [39, 39]]}}}))


def test_an_override_of_what_a_grid_goes_through_is_refused(tmp_path):
    methods = {"sft": {"grid": {"train.lr": [0.1, 0.2]}}}
    with pytest.raises(
        ValueError, match=r"--train.lr is what the grid of method 'sft' goes through"
    ):
        load(tmp_path, content(methods=methods), "--train.lr", "0.3")
    assert (
        len(list(load(tmp_path, content(methods=methods), "--train.batch_size", "4").cells())) == 2
    )


def test_null_takes_an_inherited_method_away(tmp_path):
    (tmp_path / "parent.yaml").write_text(
        yaml.safe_dump(content(methods={"sft": {}, "other": {}, "sap": {"sap": {"enabled": True}}}))
    )
    experiment = load(
        tmp_path,
        {
            "extends": "parent.yaml",
            "methods": {"other": None, "sft": {"grid": {"train.lr": [0.1, 0.2]}}},
        },
    )
    assert {cell.method for cell in experiment.cells()} == {"sft.lr_0.1", "sft.lr_0.2", "sap"}
    with pytest.raises(ValueError, match="methods"):
        load(tmp_path, content(methods={"sft": None}))


def test_the_parts_of_a_method():
    def parts(**sections) -> list[str]:
        return (
            recipe_class()
            .model_validate(content() | {name: {"enabled": True} for name in sections})
            .parts
        )

    assert (
        parts() == []
        and parts(saft=1, sap=1, ema=1) == ["saft", "sap", "ema"]
        and parts(safe_mix=1, sap=1) == ["sap", "safe_mix"]
    )
    assert not recipe_class().model_validate(content()).draws_pairs
    drawing = {
        name
        for name in ("saft", "sap", "safe_mix", "safety_gradient", "lisa", "ema")
        if recipe_class().model_validate(content() | {name: {"enabled": True}}).draws_pairs
    }
    assert drawing == {"sap", "safe_mix", "safety_gradient", "lisa"}


COMPARED = recipes.load(ROOT / "launch" / "recipes" / "compare.yaml")


def test_the_comparison_gives_every_method_the_same_safety_pairs_and_task_steps():
    """Pairs drawn in a whole training, times four a draw; SAP's and the controls' at every fourth step,
    Lisa's at its alignment steps.
    """
    for cell in COMPARED.cells():
        found = cell.recipe
        steps, task_steps, draws = found.train.steps, found.train.steps, 0
        if found.lisa.enabled:
            cycle = found.lisa.alignment_steps + found.lisa.task_steps
            draws = sum(number % cycle < found.lisa.alignment_steps for number in range(steps))
            task_steps -= draws
        elif found.draws_pairs:
            draws = -(-steps // found.safety_pairs.refresh_every)
        assert found.safety_pairs.batch_size == 4 and found.sap.direction == "live"
        assert draws == (10 if found.draws_pairs else 0), cell.method
        assert (task_steps, found.train.batch_size) == (40, 8), cell.method


def test_every_tuned_method_has_equally_many_tuning_runs():
    tuned = recipes.load(ROOT / "launch" / "recipes" / "tune.yaml")
    runs: dict[str, int] = {}
    for cell in tuned.cells():
        method = cell.method.partition(".")[0]
        runs[method] = runs.get(method, 0) + 1
    assert set(runs.values()) == {12} and set(runs) == set(COMPARED.base.methods)
    assert tuned.base.evaluate.split == "validation"


def test_what_is_called_a_control_is_one_in_reports_and_in_the_documents():
    """Lisa, which the README recommends, was titled a control, and no report took it for one."""
    table = (ROOT / "docs" / "recipes.md").read_text()
    for name, defence in DEFENCES.items():
        (row,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` | ")]
        assert (
            defence.title.startswith("Control: "),
            row.startswith(f"| `{name}` | control: "),
        ) == (defence.control, defence.control), name


@pytest.mark.parametrize("left", ["null", "{lisa: {enabled: false}}"])
def test_a_section_for_a_method_that_the_command_line_leaves_out_may_stay(tmp_path, left):
    raw = content(lisa={"rho": 0.5}, methods={"sft": {}, "mine": {"lisa": {"enabled": True}}})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    given = parse_overrides([f"--methods.mine={left}"])
    assert recipes.load(path, given).base.methods["sft"] == {}


def test_a_section_that_a_method_switches_off_is_meant_so(tmp_path):
    load(tmp_path, content(lisa={"rho": 0.5}, methods={"sft": {"lisa": {"enabled": False}}}))


def test_more_epochs_than_any_training_has_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train\.epochs"):
        load(tmp_path, content(train={"epochs": 1e308}))
