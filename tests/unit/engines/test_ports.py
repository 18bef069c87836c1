"""A process that no launcher has started finds a port of its own: two runs on one node do not meet."""

import os
import subprocess
import sys

import pytest

from pipeline.engines.open import init_distributed
from pipeline.recipe.sections import TrainSection
from tests.project import ROOT

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ALONE = """
import sys
import torch
from pipeline.engines.open import init_distributed, leave
from pipeline.recipe.sections import TrainSection
init_distributed(TrainSection(engine=sys.argv[1], steps=1))
total = torch.ones(1)
torch.distributed.all_reduce(total)
print("up", torch.distributed.get_world_size(), flush=True)
sys.stdin.read()
leave()
"""


@pytest.mark.processes
def test_two_runs_without_a_launcher_are_up_at_the_same_time():
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", ALONE, engine], cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for engine in ("fsdp2", "zero3")
    ]  # fmt: skip
    try:
        said = [run.stdout.readline() for run in runs]
        assert said == ["up 1\n"] * 2, [run.poll() is None or run.stderr.read() for run in runs]
        assert [run.poll() for run in runs] == [None, None]
        ends = [run.communicate(timeout=900)[1] for run in runs]
        assert [run.returncode for run in runs] == [0, 0], ends
    finally:
        for run in runs:
            run.kill()
            run.wait()


def test_ranks_whose_launcher_does_not_say_where_to_meet_are_refused(monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    missing = "no RANK and no MASTER_ADDR and no MASTER_PORT"
    with pytest.raises(
        ValueError, match=f"^the environment has WORLD_SIZE 2, but {missing}: .*torchrun"
    ):
        init_distributed(TrainSection(engine="fsdp2", steps=1))
    assert "MASTER_PORT" not in os.environ


def test_a_launcher_of_one_rank_a_node_need_not_count_them(monkeypatch):
    given = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400"}
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    joined = []
    monkeypatch.setattr(
        "torch.distributed.init_process_group",
        lambda *_, **__: joined.append(os.environ["LOCAL_RANK"]),
    )
    init_distributed(TrainSection(engine="fsdp2", steps=1))
    assert joined == ["0"]
    del os.environ["LOCAL_RANK"]
