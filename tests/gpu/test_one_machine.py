"""On a machine with GPUs: `pytest -m gpu`. Left out elsewhere; without a GPU they fail, they are not skipped."""

import os
from pathlib import Path

import pytest

from pipeline.recipe.sections import TrainSection
from pipeline.running import devices
from tests.project import make_project, run, sap, write_recipe


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The tiny project with everything that has an `auto` left to it."""
    folder = tmp_path_factory.mktemp("gpu")
    content = make_project(folder)
    content["model"] = {"path": content["model"]["path"]}
    for section in (content["train"], content["align"]["train"]):
        del section["ranks"], section["ds_config"]
        section |= {"batch_size": 8, "micro_batch_size": 2}
    return write_recipe(folder, content)


def test_the_gpus_are_those_that_torch_sees():
    import torch

    found = devices.gpus()
    assert found and len(found) == torch.cuda.device_count(), (
        "no GPU here, or another count than torch's"
    )
    assert [gpu.capability for gpu in found] == [
        torch.cuda.get_device_capability(index) for index in range(len(found))
    ]
    assert all(0 < gpu.free <= gpu.total for gpu in found)


def test_the_chain_runs_on_every_gpu(project):
    done = sap("run", project)
    assert done.returncode == 0, done.stderr
    assert (
        f"{devices.ranks(TrainSection(steps=1, batch_size=8))} process" in done.stderr
        and "model.attention sdpa" in done.stderr
    )
    assert "sap" in done.stdout


def test_more_ranks_than_gpus_is_one_sentence(project):
    too_many = len(devices.gpus()) + 1
    done = sap("run", project, f"--train.ranks={too_many}", f"--train.batch_size={too_many}")
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and f"train.ranks {too_many} needs as many GPUs" in done.stderr
    )


def test_a_launcher_that_starts_too_many_is_told_so(project):
    """As torchrun would: the first rank says so, before any collective."""
    count = len(devices.gpus())
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": str(count + 1)}
    assert sap("prepare", project).returncode == sap("align", project).returncode == 0
    done = run(
        ["launch/train.py", "--config", str(project), "--method", "sft"], {**os.environ, **ranks}
    )
    assert (
        done.returncode == 2
        and f"{count + 1} processes were started on this machine" in done.stderr
        and "Traceback" not in done.stderr
    )
