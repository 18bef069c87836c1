"""The demo's chain on a tiny random model, end to end, through the real commands:
run, run again, stop, kill, resume, launchers.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from pipeline import artifacts
from pipeline.running.runner import free_port
from tests.project import ROOT, make_project, quiet, run, sap, write_jsonl, write_recipe

pytestmark = [pytest.mark.processes, pytest.mark.slow]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_recipe(folder, make_project(folder))
    return folder


@pytest.fixture(scope="module")
def finished(project) -> subprocess.CompletedProcess:
    return sap("run", project / "recipe.yaml")


def folder_of(project: Path, prefix: str) -> Path:
    found = sorted((project / "runs" / "tiny").glob(f"{prefix}*"))
    assert len(found) == 1, found
    return found[0]


def adapter(project: Path, method: str) -> dict[str, torch.Tensor]:
    return load_file(
        folder_of(project, f"train-{method}-s0-") / "adapter" / "adapter_model.safetensors"
    )


def steps_logged(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_run_prints_the_table_and_the_paths(finished):
    assert finished.returncode == 0, finished.stderr
    for word in ("shipped", "aligned", "sft", "sap", "report.html", "mlflow"):
        assert word in finished.stdout


def test_run_again_does_nothing_and_prints_the_same(project, finished):
    before = {
        path: path.stat().st_mtime_ns
        for path in (project / "runs" / "tiny").rglob("*")
        if path.is_file()
    }
    again = sap("run", project / "recipe.yaml")
    assert again.returncode == 0 and again.stdout == finished.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_evaluation_trains_nothing_again_and_says_what_it_leaves_out(
    project, finished, tmp_path
):
    """Two more prompts, and three that are trained on: prompts, evaluation and report are new, nothing is touched."""
    runs = project / "runs" / "tiny"
    pairs = pyarrow.parquet.read_table(folder_of(project, "prepare-") / "safety_pairs.parquet")
    trained = pairs.column("prompt").to_pylist()[:3]
    prompts = [f"harmful_eval forbidden request number {i}" for i in range(8)] + trained
    write_jsonl(tmp_path / "eval.jsonl", [{"goal": prompt} for prompt in prompts])
    there = set(runs.iterdir())
    before = {
        path: path.stat().st_mtime_ns for path in runs.rglob("*") if "tracking" not in path.parts
    }
    other = [
        f"--evaluate.harmful.source={tmp_path / 'eval.jsonl'}",
        "--evaluate.harmful_prompts=11",
    ]
    found = sap(
        "run", project / "recipe.yaml", "--methods", "sft", "--evaluate.baselines=false", *other
    )
    assert found.returncode == 0, found.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    new = {path.name.rpartition("-")[0]: path for path in set(runs.iterdir()) - there}
    assert new.keys() == {"prompts", "evaluate-sft-s0", "report"}
    assert "are in other sets already (safety_pairs 3): left out of the evaluation" in found.stderr
    assert "8 prompts instead of the 11" in found.stderr
    answers = [
        json.loads(line)
        for line in (new["evaluate-sft-s0"] / "answers.jsonl").read_text().splitlines()
    ]
    assert {answer["prompt"] for answer in answers if answer["set"] == "harmful"} == set(
        prompts[:8]
    )
    for path in new.values():
        shutil.rmtree(path)  # what the other tests know as finished has one of each


def test_products_are_complete(project, finished):
    metrics = [
        json.loads(line)
        for line in (folder_of(project, "train-sap-s0-") / "metrics.jsonl").read_text().splitlines()
    ]
    assert [m["step"] for m in metrics] == [0, 1, 2, 3, 4, 5, 6]
    assert {"validation/task_loss", "validation/harmful_loss"} <= metrics[0].keys()
    assert {"sap/delta_loss", "sap/probe_signal", "train/loss", "train/lr", "time/step"} <= metrics[
        1
    ].keys()
    assert any("sap/correction" in m for m in metrics) and any(
        "sap/probe_noise" in m for m in metrics
    )
    assert any("validation/harmful_loss" in m for m in metrics)
    summary = json.loads((folder_of(project, "direction-s0-") / "summary.json").read_text())
    assert len(summary["layers"]) == 4 and -1 <= summary["split_half_cosine"] <= 1
    answers = [
        json.loads(line)
        for line in (folder_of(project, "evaluate-sap-s0-") / "answers.jsonl")
        .read_text()
        .splitlines()
    ]
    aligned = artifacts.read_manifest(folder_of(project, "align-"))["facts"]
    assert aligned["samples"] + aligned["left_out"] == 16, (
        "eight refusals and eight harmless prompts"
    )
    attacks = {
        f"{attack}/{kind}": 3
        for attack in ("prefill", "role_play")
        for kind in ("harmful", "harmless")
    }
    assert Counter(a["set"] for a in answers) == {
        "harmful": 6,
        "harmless": 4,
        "ordinary": 4,
        "task": 4,
        **attacks,
    }
    assert all(a["prefill"] == "Sure, here is" for a in answers if a["set"].startswith("prefill/"))
    assert all(a["prompt"] in a["asked"] for a in answers if "/" in a["set"])
    assert not list((project / "runs" / "tiny").glob(".*")), "work and temporary folders are gone"


def test_methods_start_alike_and_end_apart(project, finished):
    sft, with_sap = adapter(project, "sft"), adapter(project, "sap")
    assert sft.keys() == with_sap.keys() and any(
        not torch.equal(sft[name], with_sap[name]) for name in sft
    )


def test_adapter_loads_with_peft(project, finished):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = json.loads(
        (folder_of(project, "train-sap-s0-") / "adapter" / "adapter_config.json").read_text()
    )
    assert config["target_modules"] == ["q_proj", "v_proj"], (
        "in the same order whatever process has written it"
    )
    base = AutoModelForCausalLM.from_pretrained(folder_of(project, "align-") / "model")
    ids = torch.tensor([[5, 6, 7]])
    plain = base(ids).logits.detach()
    model = PeftModel.from_pretrained(base, folder_of(project, "train-sap-s0-") / "adapter")
    weights = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert weights and all(p.numel() for p in weights.values())
    assert not torch.equal(model(ids).logits, plain)


def copy_upstream(project: Path, target: Path) -> Path:
    """A project whose prepare, align and direction are done and whose training is not."""
    runs = target / "runs" / "tiny"
    runs.mkdir(parents=True)
    for prefix in ("prepare-", "align-", "direction-"):
        source = folder_of(project, prefix)
        shutil.copytree(source, runs / source.name)
    return runs


def start_training(project: Path, target: Path, method: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "pipeline.cli",
        "train",
        str(project / "recipe.yaml"),
        "--method",
        method,
        f"--output_dir={target / 'runs'}",
        "--train.save_every=3",
    ]
    return subprocess.Popen(
        command, cwd=ROOT, env=quiet(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for(condition, seconds: float = 900.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize("method", ["sft", "sap"])
def test_kill_after_a_checkpoint_and_resume_bit_for_bit(project, finished, tmp_path, method):
    """6 steps = 3 + kill -9 + 3, on two ranks."""
    runs = copy_upstream(project, tmp_path)
    process = start_training(project, tmp_path, method)
    wait_for(
        lambda: (
            list(runs.glob(f".train-{method}-*/checkpoints/step-000003/DONE"))
            or process.poll() is not None
        )
    )
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(runs.glob(f"train-{method}-*")), "nothing that looks finished"
    process = start_training(project, tmp_path, method)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    assert "resumed after step" in errors
    again = load_file(
        next(runs.glob(f"train-{method}-*")) / "adapter" / "adapter_model.safetensors"
    )
    straight = adapter(project, method)
    assert all(torch.equal(again[name], straight[name]) for name in straight)
    assert steps_logged(next(runs.glob(f"train-{method}-*")) / "metrics.jsonl") == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_sigterm_saves_at_the_steps_end_and_leaves(project, finished, tmp_path):
    runs = copy_upstream(project, tmp_path)
    process = start_training(project, tmp_path, "sft")
    wait_for(
        lambda: (
            any(f.read_text().count("\n") > 1 for f in runs.glob(".train-sft-*/metrics.jsonl"))
            or process.poll() is not None
        )
    )
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=900)
    if process.returncode == 0:
        pytest.fail("the run ended before the signal reached it")
    assert process.returncode == 75, errors
    assert "stopped after step" in errors
    done = [path.name for path in next(runs.glob(".train-sft-*")).glob("checkpoints/step-*")]
    assert len(done) == 1 and done[0] != "step-000006"
    assert (
        sap(
            "train",
            project / "recipe.yaml",
            "--method",
            "sft",
            f"--output_dir={tmp_path / 'runs'}",
            "--train.save_every=3",
        ).returncode
        == 0
    )
    again = load_file(next(runs.glob("train-sft-*")) / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in adapter(project, "sft").items())


def test_interrupted_stage_leaves_nothing_that_counts(project, finished, tmp_path):
    runs = copy_upstream(project, tmp_path)
    prepared = next(runs.glob("prepare-*"))
    (prepared / "DONE").unlink()  # as if the machine had died between the rename and the marker
    refused = sap(
        "train", project / "recipe.yaml", "--method", "sft", f"--output_dir={tmp_path / 'runs'}"
    )
    assert refused.returncode == 2 and "is not complete" in refused.stderr
    assert (
        sap("prepare", project / "recipe.yaml", f"--output_dir={tmp_path / 'runs'}").returncode == 0
    )
    assert (prepared / "DONE").is_file()


def test_damaged_artefact_is_refused(project, finished, tmp_path):
    runs = copy_upstream(project, tmp_path)
    path = next(runs.glob("prepare-*")) / "task_train.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused = sap(
        "train", project / "recipe.yaml", "--method", "sft", f"--output_dir={tmp_path / 'runs'}"
    )
    assert (
        refused.returncode == 2
        and "does not match" in refused.stderr
        and str(path) in refused.stderr
    )


@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", free_port()],
        [],
    ],
    ids=["torchrun", "deepspeed", "python"],
)
def test_launchers(project, finished, tmp_path, launcher):
    copy_upstream(project, tmp_path)
    arguments = [
        "launch/train.py",
        "--config",
        str(project / "recipe.yaml"),
        "--method",
        "sft",
        f"--output_dir={tmp_path / 'runs'}",
        "--train.steps=2",
    ]
    result = run([*launcher, *arguments], {"DS_ACCELERATOR": "cpu"})
    assert result.returncode == 0, result.stderr
    manifest = json.loads(
        (next((tmp_path / "runs" / "tiny").glob("train-sft-*")) / "manifest.json").read_text()
    )
    assert manifest["world_size"] == (2 if launcher else 1)


@pytest.mark.parametrize(
    ("option", "printed"), [("--show", "lr: 0.0003"), ("--dry-run", "prepare    would run")]
)
def test_show_and_dry_run_run_nothing(project, tmp_path, option, printed):
    result = sap(
        "run",
        project / "recipe.yaml",
        option,
        "--train.lr",
        "3e-4",
        f"--output_dir={tmp_path / 'runs'}",
    )
    assert result.returncode == 0 and printed in result.stdout
    assert not (tmp_path / "runs").exists()


def test_help_shows_every_field():
    result = sap("--help")
    assert result.returncode == 0
    for field in ("train.lr", "sap.target_correction", "data.harmful_fraction"):
        assert field in result.stdout
