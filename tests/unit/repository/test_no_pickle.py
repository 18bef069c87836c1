"""Nothing that comes from a disk or from another rank is unpickled: it could be a program."""

import re

import pytest
import torch

from pipeline.engines.exchange import from_first, of_every_rank
from pipeline.engines.open import init_distributed, leave
from pipeline.recipe.sections import TrainSection
from tests.distributed.ranks import spawn
from tests.project import ROOT

UNPICKLES = re.compile(
    r"\b(import|from) "
    r"(pickle|cPickle|dill|joblib|cloudpickle|shelve|marshal)\b|\bpickle\.\w+\("
    r"|torch\.load\b|distributed\.checkpoint|allow_pickle"
    r"|\b(broadcast|scatter|gather|all_gather|send|recv)_object(_list)?\(|trust_remote_code\s*=\s*True"
    r"|yaml\.(unsafe|full)_load|yaml\.load\((?![^;]{0,160}\b(_Loader|C?SafeLoader)\b)|read_pickle"
)

MODULES = sorted((ROOT / "pipeline").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_unpickles(path):
    code = "\n".join(
        line for line in path.read_text().splitlines() if not line.strip().startswith("#")
    )
    without_words = re.sub(r'"""[\s\S]*?"""', "", code)
    found = UNPICKLES.search(without_words)
    assert found is None, f"{path}: {found.group()}"


def test_the_pattern_finds_what_it_is_there_for():
    for text in (
        "import pickle",
        "torch.load(path)",
        "dist.broadcast_object_list(x)",
        "dcp.all_gather_object(a, b)",
        "yaml.load(text, Loader=Loader)",
    ):
        assert UNPICKLES.search(text), text


def told(rank: int) -> None:
    init_distributed(TrainSection(steps=1, engine="fsdp2"))
    value = {"rank": rank, "text": "é" * (rank + 1), "none": None, "list": [rank, 0.5]}
    assert from_first(value) == {"rank": 0, "text": "é", "none": None, "list": [0, 0.5]}
    assert of_every_rank(value)[2] == {"rank": 2, "text": "ééé", "none": None, "list": [2, 0.5]}
    assert [part["rank"] for part in of_every_rank(value)] == [0, 1, 2]
    leave()


@pytest.mark.distributed
@pytest.mark.processes
def test_ranks_tell_each_other_what_json_holds():
    spawn(3, told)
    assert not torch.distributed.is_initialized()
    assert from_first([1]) == [1] and of_every_rank("a") == ["a"], "a process that is alone"
