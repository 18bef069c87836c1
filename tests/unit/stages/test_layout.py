"""Folder names: everything that decides a stage's content changes them, nothing else does."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from pipeline.data import builtin, contrastive
from pipeline.data.fingerprint import fingerprint
from pipeline.defences import DEFENCES, recipes
from pipeline.recipe import strict_yaml
from pipeline.recipe.sections import TrainSection
from pipeline.running import devices
from pipeline.stages.layout import Layout, _training
from tests.project import make_project, write_jsonl, write_recipe


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("layout")
    return write_recipe(folder, make_project(folder))


def names(path: Path, *arguments: str) -> dict[str, str]:
    """Folder names by stage, of seed 0."""
    experiment = recipes.load(path, strict_yaml.parse_overrides(list(arguments)))
    layout = Layout(experiment)
    found = {
        stage: getattr(layout, stage)().name for stage in ("prepare", "prompts", "align", "report")
    }
    for cell in experiment.cells():
        found[f"train {cell.method}"] = layout.train(cell).name
        found[f"direction {cell.method}"] = layout.direction(cell).name
    return found | {
        f"evaluate {subject.name}": layout.evaluate(subject).name for subject in layout.subjects()
    }


def changed(path: Path, *arguments: str) -> set[str]:
    before, after = names(path), names(path, *arguments)
    return {stage for stage in before if before[stage] != after[stage]}


DATA = {"prepare", "prompts"}
ALL = (
    DATA
    | {"align", "report"}
    | {f"{s} {m}" for s in ("train", "direction", "evaluate") for m in ("sft", "sap")}
)
BASELINES = {"evaluate shipped", "evaluate aligned"}


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--data.max_length=150", ALL | BASELINES),
        ("--align.train.lr=0.5", ALL - DATA | {"evaluate aligned"}),
        ("--model.dtype=bfloat16", ALL - DATA | BASELINES),
        ("--model.attention=eager", ALL - DATA | BASELINES),
        ("--model.quantization=nf4", ALL - DATA | BASELINES),
        ("--sap.eps=0.5", {"train sap", "evaluate sap", "report"}),
        (
            "--sap.contrastive=logsigmoid",
            {"direction sft", "direction sap", "train sap", "evaluate sap", "report"},
        ),
        ("--train.adapter=full", ALL - DATA - {"align"}),
        ("--train.lr=0.5", {"train sft", "train sap", "evaluate sft", "evaluate sap", "report"}),
        (
            "--evaluate.harmful_prompts=8",
            {"prompts", "evaluate sft", "evaluate sap", "report"} | BASELINES,
        ),
        ("--evaluate.max_new_tokens=9", {"evaluate sft", "evaluate sap", "report"} | BASELINES),
        ("--evaluate.split=validation", {"evaluate sft", "evaluate sap", "report"} | BASELINES),
        ("--methods.sft.ema.enabled=true", {"train sft", "evaluate sft", "report"}),
        ("--methods.sft.lisa.enabled=true", {"train sft", "evaluate sft", "report"}),
        ("--methods.sft.saft.enabled=true", {"train sft", "evaluate sft", "report"}),
        ("--methods.sap.safe_mix.enabled=true", {"train sap", "evaluate sap", "report"}),
        ("--ema.decay=0.5", set()),  # of a section that is off
        ("--saft.layer=1", set()),
        (
            "--train.tokens_per_micro_batch=160",
            {"train sft", "train sap", "evaluate sft", "evaluate sap", "report"},
        ),
        ("--train.ranks=1", set()),
        ("--train.gradient_checkpointing=true", set()),
        ("--train.keep_gathered=auto", set()),
        ("--train.save_every=7", set()),
        ("--evaluate.batch_size=3", set()),
        ("--tracking.experiment=other", set()),
    ],
)
def test_a_setting_changes_what_depends_on_it(project, argument, expected):
    assert changed(project, argument) == expected


def test_folders_without_a_token_budget_are_named_as_before_there_was_one():
    assert "tokens_per_micro_batch" not in _training(TrainSection(steps=1))
    budgeted = _training(TrainSection(steps=1, tokens_per_micro_batch=4096))
    assert "micro_batch_size" not in budgeted, "the budget takes its place"
    assert "packing" not in budgeted
    assert (
        _training(TrainSection(steps=1, tokens_per_micro_batch=4096, packing=True))["packing"]
        is True
    )


def test_another_threshold_reads_the_embeddings_again_and_another_layer_does_not(project):
    def folders(*arguments: str) -> tuple[str, str]:
        layout = Layout(
            recipes.load(project, strict_yaml.parse_overrides(["--saft.enabled=true", *arguments]))
        )
        cell = next(layout.experiment.cells())
        return layout.embeddings(cell).name, layout.filter(cell).name

    embeddings, filtered = folders()
    other = folders("--saft.min_auroc=0.1")
    assert other[0] == embeddings and other[1] != filtered
    other = folders("--saft.layer=1")
    assert other[0] != embeddings and other[1] != filtered
    assert folders("--saft.micro_batch_size=3") == (embeddings, filtered)


@pytest.mark.parametrize(
    ("enabled", "argument", "matters"),
    [
        ("safe_mix", "--safety_pairs.refresh_every=3", True),
        ("safe_mix", "--sap.eps=0.4", False),
        ("lisa", "--lisa.rho=9", True),
        ("saft", "--saft.layer=1", True),
        ("ema", "--safety_pairs.refresh_every=3", False),
    ],
)
def test_settings_count_where_they_act(project, enabled, argument, matters):
    on = f"--methods.sft.{enabled}.enabled=true"
    assert (names(project, on)["train sft"] != names(project, on, argument)["train sft"]) == matters


def test_what_is_evaluated_is_what_was_trained(project):
    """An adapter on the start model, or a model of its own; both belong to the train stage's folder."""
    for adapter in ("lora", "full"):
        layout = Layout(
            recipes.load(project, strict_yaml.parse_overrides([f"--train.adapter={adapter}"]))
        )
        cell = next(layout.experiment.cells())
        subject, folder = layout.subject(cell), layout.train(cell)
        assert subject.trained == folder
        expected = (
            (layout.start_model(), folder / "adapter")
            if adapter == "lora"
            else (str(folder / "model"), None)
        )
        assert (subject.model, subject.adapter) == expected


@pytest.mark.parametrize(
    ("field", "choices"), [("dtype", ("float32", "bfloat16")), ("attention", ("sdpa", "eager"))]
)
def test_what_auto_means_here_counts_and_not_the_word(project, monkeypatch, field, choices):
    """One recipe on a machine with bf16 (or a GPU) and on one without must not share results."""
    folders = []
    for choice in choices:
        monkeypatch.setattr(devices, field, lambda name, choice=choice: choice)
        folders.append(names(project, f"--model.{field}=auto")["train sft"])
    assert folders[0] != folders[1]


def test_a_changed_data_file_counts_also_below_the_home_folder(project, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = (
        "--data.task.source=~/task.jsonl",
        "--data.task.columns={prompt: question, response: answer}",
    )
    write_jsonl(tmp_path / "task.jsonl", [{"question": "a", "answer": "b"}])
    before = names(project, *arguments)["prepare"]
    write_jsonl(tmp_path / "task.jsonl", [{"question": "a", "answer": "c"}])
    assert names(project, *arguments)["prepare"] != before


def test_built_in_texts_and_archives_count(project, monkeypatch):
    builtin_safety = ("--data.safety.source=builtin:advbench", "--data.safety.columns={}")
    before = names(project, *builtin_safety)["prepare"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrastive, "REFUSALS", ("No.",))
        assert names(project, *builtin_safety)["prepare"] != before
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            builtin.ARCHIVES, "pyrit", builtin.Archive("pyrit==9", "pyrit-9.whl", "0" * 64, "MIT")
        )
        assert names(project, *builtin_safety)["prepare"] != before
    assert names(project, *builtin_safety)["prepare"] == before


def test_a_layout_is_settled_when_it_is_made(project, tmp_path):
    """A file that changes while a stage runs must not change where the stage writes."""
    write_jsonl(tmp_path / "task.jsonl", [{"question": "a", "answer": "b"}])
    layout = Layout(
        recipes.load(project, {"data": {"task": {"source": str(tmp_path / "task.jsonl")}}})
    )
    before = layout.prepare()
    write_jsonl(tmp_path / "task.jsonl", [{"question": "a", "answer": "other"}])
    assert layout.prepare() == before


def test_a_project_that_is_moved_keeps_its_folders_names(tmp_path):
    """Data, model and template are found at other paths, and hold the same."""
    (tmp_path / "old").mkdir()
    content = make_project(tmp_path / "old")
    (tmp_path / "old" / "template.jinja").write_text("{{ messages }}")
    content["model"]["chat_template"] = str(tmp_path / "old" / "template.jinja")
    before = names(write_recipe(tmp_path / "old", content))
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    shutil.rmtree(tmp_path / "old")
    moved = tmp_path / "new" / "recipe.yaml"
    moved.write_text(moved.read_text().replace(str(tmp_path / "old"), str(tmp_path / "new")))
    assert names(moved) == before


def test_the_ending_of_a_file_counts_as_it_says_how_the_file_is_read(project, tmp_path):
    for ending in ("json", "jsonl"):
        write_jsonl(tmp_path / f"task.{ending}", [{"question": "a", "answer": "b"}])
    one, other = (
        names(project, f"--data.task.source={tmp_path}/task.{ending}")
        for ending in ("json", "jsonl")
    )
    assert all(one[stage] != other[stage] for stage in one)


FILES = ["chat_template.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "config.json"]


@pytest.mark.parametrize("harm", ["weights", *FILES])
def test_two_models_that_differ_in_any_file_do_not_share_results(project, tmp_path, harm):
    """Names and sizes of the weights are the same for all models of an architecture."""
    source = Path(yaml.safe_load(project.read_text())["model"]["path"])
    shutil.copytree(source, tmp_path / "model")
    here = f"--model.path={tmp_path / 'model'}"
    before = names(project, here)
    assert before == names(project), "a copy"
    if harm == "weights":
        file = tmp_path / "model" / "model.safetensors"
        size, weights = file.stat().st_size, load_file(file)
        weights["model.layers.2.mlp.up_proj.weight"] += 0.01
        save_file(weights, file, metadata={"format": "pt"})
        assert file.stat().st_size == size
    else:
        with (tmp_path / "model" / harm).open("a") as stream:
            stream.write(" ")
    after = names(project, here)
    assert all(before[stage] != after[stage] for stage in before)


def test_damaged_weights_have_a_fingerprint_too(tmp_path):
    """What is wrong with them is for the check of the model to say."""
    contents = [
        b"",
        b"123",
        b"\xff" * 40,
        b"\x02" + bytes(7) + b"[]",
        b"\x18" + bytes(7) + b'{"a":{"data_offsets":7}}',
    ]
    found = []
    for content in contents:
        (tmp_path / "model.safetensors").write_bytes(content)
        found.append(str(fingerprint(tmp_path)))
    assert len(set(found)) == len(contents)


def test_harmful_prompts_without_a_limit_tie_the_alignment_to_the_task(project):
    """How many the mix takes before the alignment follows from the task's samples; with a limit it does not."""
    for limit, expected in (("null", {"align"}), ("10", set())):
        pool = f"--data.harmful.limit={limit}"
        for argument in ("--data.test_samples=9", "--data.harmful_fraction=0.2"):
            before, after = names(project, pool), names(project, pool, argument)
            assert {stage for stage in ("align",) if before[stage] != after[stage]} == expected
            assert (
                before["prepare"] != after["prepare"] and before["train sft"] != after["train sft"]
            )


@pytest.mark.parametrize("name", [name for name, each in DEFENCES.items() if each.draws_pairs])
def test_a_method_that_draws_pairs_counts_how_it_draws_them(project, name):
    """Another number of pairs is another training; never a draw is another one, or refused."""
    on = f"--methods.sft.{name}.enabled=true"
    for argument in ("--safety_pairs.batch_size=3", "--safety_pairs.refresh_every=0"):
        try:
            assert "train sft" in changed_from(project, on, argument)
        except ValueError as refused:
            assert argument.endswith("=0") and "safety_pairs.refresh_every" in str(refused)


def changed_from(path: Path, base: str, argument: str) -> set[str]:
    before, after = names(path, base), names(path, base, argument)
    return {stage for stage in before if before[stage] != after[stage]}


def test_a_method_reads_any_stage_that_it_names(project, monkeypatch):
    """Layout has the folder by the stage's name: no list of those that defences may read."""
    monkeypatch.setitem(
        DEFENCES, "safe_mix", replace(DEFENCES["safe_mix"], reads=lambda section: ("mine",))
    )
    monkeypatch.setattr(Layout, "mine", lambda self, cell: self.root / "mine", raising=False)
    on = strict_yaml.parse_overrides(["--methods.sft.safe_mix.enabled=true"])
    layout = Layout(recipes.load(project, on))
    cell = layout.experiment.cell("sft", 0)
    assert layout.read_by(cell) == {"mine": layout.root / "mine"}
