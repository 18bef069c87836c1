"""`--dry-run`: every check there is, without torch, then what would run and what is there;
`--show`: the resolved recipe.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline import artifacts
from pipeline.cli import main
from pipeline.defences import recipes
from pipeline.report.stage import ALL_STAGES
from pipeline.running import devices
from pipeline.stages import capacity
from pipeline.stages.layout import Layout
from tests.project import ROOT, make_project, quiet, write_jsonl, write_recipe


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("dry")
    return folder, make_project(folder)


def dry_run(capsys, path: Path, *arguments: str) -> tuple[int, list[str], str]:
    """Exit code, lines and what stands on stderr; nothing may be written."""
    before = sorted(path.parent.rglob("*"))
    code = main(["run", str(path), "--dry-run", *arguments])
    captured = capsys.readouterr()
    assert sorted(path.parent.rglob("*")) == before
    return code, captured.out.splitlines(), captured.err


def test_ten_lines_say_what_would_run_and_what_is_there(project, capsys):
    folder, content = project
    path = write_recipe(folder, content | {"name": "lines"})
    code, lines, _ = dry_run(capsys, path)
    assert (
        code == 0
        and [line.split()[0] for line in lines] == ["machine", "data", "steps", *ALL_STAGES]
        and len(lines) == 10
    )
    assert (
        "2 processes on the CPU" in lines[0] and "GB memory" in lines[0] and "GB disk" in lines[0]
    )
    assert lines[5].split(maxsplit=1)[1] == "not in this recipe" and all(
        "would run" in line for line in (*lines[3:5], *lines[6:])
    )
    layout = Layout(recipes.load(path))
    done = layout.train(recipes.load(path).cell("sft", 0))
    done.mkdir(parents=True)
    (done / artifacts.MARKER).touch()
    _, lines, _ = dry_run(capsys, path)
    train = next(line for line in lines if line.startswith("train"))
    assert (
        "train-sap-s0" in train and "train-sft" not in train and train.endswith("1 of 2 complete")
    )
    assert [
        line.split()[0]
        for line in dry_run(capsys, path, "--methods", "sft")[1]
        if " complete " in line
    ] == ["train"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--dry-run"),
        ("status",),
        ("run", "--show"),
        ("train", "--method", "sap", "--dry-run"),
        ("--help",),
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(project, arguments):
    """dtype auto included: it asked transformers once, which took five seconds."""
    folder, content = project
    path = write_recipe(
        folder, content | {"model": {"path": content["model"]["path"]}}, "light.yaml"
    )
    program = (
        "import sys; from pipeline.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'deepspeed', 'mlflow', 'datasets'} & set(sys.modules); "
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, arguments[0], str(path), *arguments[1:]],
        cwd=ROOT,
        env=quiet(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr


def test_show_prints_the_resolved_recipe_of_every_method(project, capsys):
    folder, content = project
    path = write_recipe(folder, content)
    assert main(["run", str(path), "--show", "--train.lr", "0.125"]) == 0
    shown = [
        yaml.safe_load(part)
        for part in re.split(r"^# .*, seed 0$", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    ]
    assert [found["sap"]["enabled"] for found in shown] == [False, True] and {
        found["train"]["lr"] for found in shown
    } == {0.125}


def test_rows_after_the_first_fifty_and_long_fields_are_read(project, capsys):
    folder, content = project
    lines = [json.dumps({"question": f"q {i}", "answer": "a"}) for i in range(80)]
    (folder / "late.jsonl").write_text("\n".join([*lines, "null"]))
    code, _, error = dry_run(
        capsys, write_recipe(folder, content), f"--data.task.source={folder / 'late.jsonl'}"
    )
    assert (
        code == 2
        and f"must hold objects with named values, and this one is a null ({folder}/late.jsonl, line 81)"
        in error
    )
    (folder / "long.csv").write_text(
        "question,answer\n" + "\n".join(f"q {i},{'word ' * 40_000}" for i in range(20))
    )
    assert (
        dry_run(
            capsys,
            write_recipe(folder, content),
            f"--data.task.source={folder / 'long.csv'}",
            "--data.test_samples=4",
        )[0]
        == 0
    )
    (folder / "latin.csv").write_bytes("question,answer\ncaf\xe9,oui\n".encode("latin-1"))
    code, _, error = dry_run(
        capsys, write_recipe(folder, content), f"--data.task.source={folder / 'latin.csv'}"
    )
    assert (
        code == 2
        and "the byte 0xe9 is not valid UTF-8: save the file as UTF-8" in error
        and "latin.csv, line 2)" in error
    )


BAD_CSV = {
    "commas without quotes": (
        "question,answer\nq,a\nBroken, row, with, commas\n",
        "4 fields, but 2 columns: put a field that holds commas in quotes (",
    ),
    "a quote that never closes": (
        'question,answer\nq,a\n"open,b\nc,d\n',
        "is not closed where it should be, in the row that begins in line 3 (",
    ),
    "semicolons": (
        "question;answer\nq;a\n",
        "has the one column 'question;answer': separate its fields with commas",
    ),
    "a name twice": ("question,answer,answer\nq,a,b\n", "names the column 'answer' twice"),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_a_damaged_csv_is_refused(project, capsys, case):
    """Two of these were trained on, cut short, without a word."""
    folder, content = project
    text, sentence = BAD_CSV[case]
    (folder / "damaged.csv").write_text(text)
    code, lines, error = dry_run(
        capsys, write_recipe(folder, content), f"--data.task.source={folder / 'damaged.csv'}"
    )
    assert code == 2 and not lines and sentence in error


def test_what_trains_nothing_new_or_never_reaches_its_rate_is_said(project, capsys):
    folder, content = project
    # switched off by the command line, or by the method itself
    methods = {"sft": {}, "lisa": {"lisa": {"rho": 0.5, "enabled": False}}}
    path = write_recipe(folder, content | {"methods": methods})
    code, _, error = dry_run(capsys, path, "--train.steps=4", "--train.warmup_steps=5")
    assert (
        code == 0
        and "note: methods sft and lisa train the same: set what makes lisa another one" in error
    )
    assert "note: method sft: train.warmup_steps 5 is not over within 4 steps" in error


def test_samples_and_steps_are_told_as_far_as_they_are_known(project, capsys, tmp_path):
    folder, content = project
    of_data = content["data"] | {"harmful_fraction": 0.2}
    filtered = {"saft": {"enabled": True}, "train": {"epochs": 2}}
    methods = content["methods"] | {"long": {"train": {"epochs": 3}}, "filtered": filtered}
    path = write_recipe(folder, content | {"methods": methods, "data": of_data, "seeds": [0, 1]})
    arguments = [f"--output_dir={tmp_path}"]
    lines = dry_run(capsys, path, *arguments)[1]
    # 64 are left, and a fifth of all is harmful: 80
    assert lines[1:3] == [
        "data       80 rows: 8 held out to test and 8 to validate, about 80 to train on; up to 8 safety pairs",
        "steps      2 for align; 6 for sft, sap; about 30 for long; up to about 20 for filtered",
    ]
    layout = Layout(recipes.load(path, {"output_dir": str(tmp_path)}))
    layout.prepare().mkdir(parents=True)
    counts = {"task_train": 71, "task_test": 7, "task_validation": 8, "safety_pairs": 5}
    (layout.prepare() / "facts.json").write_text(json.dumps({"samples": counts}))
    (layout.prepare() / artifacts.MARKER).touch()
    _, lines, error = dry_run(capsys, path, *arguments, "--methods.sap.safety_pairs.batch_size=6")
    assert lines[1:3] == [
        "data       prepared: 7 held out to test and 8 to validate, 71 to train on; 5 safety pairs",
        "steps      2 for align; 6 for sft, sap; 27 for long; up to 18 for filtered",
    ]
    assert "batch_size 6 is more than the 5 pairs that there are, so that pairs repeat" in error
    for damaged in ({"task_train": "x"}, {"task_train": -5}, {"safety_pairs": None}):
        facts = json.dumps({"samples": counts | damaged})
        (layout.prepare() / "facts.json").write_text(facts)
        assert lines_of_data(dry_run(capsys, path, *arguments)[1]).startswith("data       80 rows")


def lines_of_data(lines: list[str]) -> str:
    return next(line for line in lines if line.startswith("data "))


def test_batches_in_which_samples_repeat_are_said(project, capsys):
    folder, content = project
    path = write_recipe(folder, content | {"align": {"enabled": False}})
    _, lines, error = dry_run(capsys, path, "--data.task.limit=20", "--safety_pairs.batch_size=10")
    assert "20 rows: 8 held out to test and 8 to validate, about 4 to train on" in lines[1]
    assert (
        "note: train.batch_size 8 is more than about 4 samples to train on, "
        "so that samples repeat within a step: lower it, or use more data\n" in error
    )
    assert (
        "note: safety_pairs.batch_size 10 is more than the 8 pairs that data.safety_pairs asks for, "
        "so that pairs repeat within a draw: lower it, or raise data.safety_pairs\n" in error
    )
    assert "repeat" not in dry_run(capsys, path)[2]


def test_what_nobody_counted_is_not_guessed(project, capsys, monkeypatch):
    from pipeline.data import check

    monkeypatch.setattr(check, "_READ_WHOLE", 100)
    folder, content = project
    path = write_recipe(folder, content)
    _, lines, _ = dry_run(capsys, path, "--train.epochs=2")
    assert lines[1].endswith("how many are left to train on is known once they are prepared")
    assert lines[2] == "steps      2 for align; 2 epochs for sft, sap"


def test_methods_that_do_not_see_the_same_pairs_are_named(project, capsys):
    folder, content = project
    mix = {"safe_mix": {"enabled": True}}
    methods = content["methods"] | {"mix": mix, "other": mix | {"safety_pairs": {"batch_size": 6}}}
    path = write_recipe(folder, content | {"methods": methods})
    code, _, error = dry_run(capsys, path)
    assert code == 0
    assert (
        "note: these methods do not see the same safety pairs, for their safety_pairs differ: sap, mix with "
        "batch_size 4 and refresh_every 4; other with batch_size 6 and refresh_every 4\n" in error
    )
    assert "the same safety pairs" not in dry_run(capsys, path, "--methods", "sft,sap,mix")[2]


def test_an_override_of_a_section_that_no_method_enables_is_said(project, capsys):
    folder, content = project
    path = write_recipe(folder, content)
    assert (
        "note: --ema.decay does nothing, because no method enables ema\n"
        in (dry_run(capsys, path, "--ema.decay=0.5")[2])
    )
    assert "does nothing" not in dry_run(capsys, path, "--sap.eps=0.5")[2]


def test_prepare_says_what_it_left_out_and_cut(project, capsys):
    folder, content = project
    assert (
        main(
            [
                "prepare",
                str(write_recipe(folder, content)),
                "--data.max_length=80",
                f"--output_dir={folder / 'told'}",
                "--tracking.enabled=false",
            ]
        )
        == 0
    )
    said = capsys.readouterr().err
    assert (
        "prepared: " in said
        and "8 to test; 8 safety pairs" in said
        and "cut at their greatest length: 8 of data.validation_prompts" in said
    )


BAD_ROWS = {
    "a list for a text": ({"question": ["a"], "answer": "b"}, "data.task: prompt holds a list"),
    "no prompt anywhere": (None, "holds no row with a prompt"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_every_row_is_looked_at(project, capsys, case):
    folder, content = project
    row, sentence = BAD_ROWS[case]
    rows = [{"question": f"question {i}" if row else "", "answer": "yes"} for i in range(80)]
    write_jsonl(folder / "rows.jsonl", [*rows, row] if row else rows)
    path = write_recipe(folder, content)
    code, lines, error = dry_run(capsys, path, f"--data.task.source={folder / 'rows.jsonl'}")
    assert code == 2 and not lines and sentence in error


def test_too_few_rows_for_the_splits(project, capsys):
    folder, content = project
    code, lines, error = dry_run(capsys, write_recipe(folder, content), "--data.test_samples=72")
    assert (
        code == 2
        and not lines
        and "has 80 usable samples and leaves none for training after 72 test and 8 validation samples"
        in error
    )


def test_rows_that_are_all_alike_are_one_prompt(project, capsys):
    folder, content = project
    write_jsonl(folder / "alike.jsonl", [{"question": "Where is it?", "answer": "There."}] * 60)
    code, _, error = dry_run(
        capsys, write_recipe(folder, content), f"--data.task.source={folder / 'alike.jsonl'}"
    )
    assert (
        code == 2
        and "alike.jsonl has 1 different prompt, and all answers to one prompt stay in one split"
        in error
    )


def test_a_full_disk_is_known_before(project, capsys, monkeypatch):
    folder, content = project
    monkeypatch.setattr(artifacts, "free_bytes", lambda *_: 1000)
    code, lines, error = dry_run(capsys, write_recipe(folder, content))
    assert code == 2 and not lines
    assert (
        "output_dir" in error
        and "0.00 GB free" in error
        and "set output_dir to a folder on another disk" in error
    )


def test_memory_that_cannot_suffice_is_refused_and_what_may_not_is_said(
    project, capsys, monkeypatch
):
    folder, content = project
    path = write_recipe(folder, content)
    monkeypatch.setattr(capacity, "_host_memory", lambda: 1e8)
    code, lines, error = dry_run(capsys, path)
    assert (
        code == 2
        and not lines
        and "this machine has 0 GB and no GPU: use a machine with GPUs" in error
        and "train.micro_batch_size" in error
    )
    monkeypatch.setattr(capacity, "_host_memory", lambda: 1.2e9)
    code, lines, error = dry_run(capsys, path)
    assert code == 0 and "it may not fit" in error


def test_a_small_gpu_is_refused_by_the_planner(project, capsys, monkeypatch):
    folder, content = project
    found = (
        devices.Gpu("0", "Tiny", 10**9, 10**9, (9, 0)),
        devices.Gpu("1", "Tiny", 10**9, 10**9, (9, 0)),
    )
    monkeypatch.setattr(devices, "gpus", lambda: found)
    code, lines, error = dry_run(capsys, write_recipe(folder, content))
    assert (
        code == 2
        and not lines
        and "of every GPU by arithmetic (`sap plan`), and GPU 0 (Tiny) has 1.0: use more ranks (train.ranks)"
        in error
    )
    code, _, error = dry_run(
        capsys, write_recipe(folder, content), "--train.ranks=4", "--train.batch_size=8"
    )
    assert code == 2 and "train.ranks 4 needs as many GPUs, and this machine shows 2" in error
    elsewhere = ["--train.ranks=4", "--train.batch_size=8", "--dry-run"]
    assert main(["prepare", str(write_recipe(folder, content)), *elsewhere]) == 0, (
        "the training's node may have more"
    )


def test_the_disk_holds_products_and_the_checkpoints_of_one_run(project):
    folder, content = project
    content = content | {"align": content["align"] | {"enabled": False}}
    experiment = recipes.load(write_recipe(folder, content))
    from pipeline.model.model_checks import check_model

    facts, cells = check_model(experiment.base), list(experiment.cells())
    one, both = (capacity.capacity(experiment, facts, chosen).disk for chosen in (cells[:1], cells))
    # r x (in + out) of q and v in four layers, in float32
    adapter = 4 * 8 * (32 + 32 + 32 + 16) * 4
    # SAP's direction is in its checkpoints
    assert one == adapter + 2 * 3 * adapter and both == 2 * adapter + 2 * 4 * adapter


def test_pairs_that_leave_ranks_idle_are_said(project, capsys):
    folder, content = project
    code, _, error = dry_run(
        capsys, write_recipe(folder, content), "--methods.sap.safety_pairs.batch_size=1"
    )
    assert (
        code == 0
        and (
            "note: safety_pairs.batch_size 1 leaves 1 of 2 ranks without a pair of their own: 2 "
            "would take the same time"
        )
        in error
    )


def test_a_model_that_is_not_here_is_a_note(project, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SAP_CACHE", str(tmp_path))
    folder, content = project
    path = write_recipe(folder, content | {"model": {"path": "builtin:smollm2-135m-instruct"}})
    code, lines, error = dry_run(capsys, path)
    assert (
        code == 0
        and len(lines) == 10
        and "is not on this machine yet" in error
        and not list(tmp_path.iterdir())
    )


def test_a_large_file_is_looked_at_later(project, capsys, monkeypatch):
    from pipeline.data import check

    monkeypatch.setattr(check, "_READ_WHOLE", 100)
    folder, content = project
    code, _, error = dry_run(capsys, write_recipe(folder, content))
    assert (
        code == 0
        and "is large, so its columns and rows are looked at when they are prepared" in error
    )
    assert json.loads((folder / "data" / "task.jsonl").read_text().splitlines()[0])["question"]
