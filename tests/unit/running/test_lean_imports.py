"""What a rank imports to begin: neither torch's compiler nor mlflow; both are there for those who ask."""

import sys

import pytest
import torch

from pipeline.running.lean_imports import uncompiled, without
from tests.project import run

RANK = """
import sys
from pipeline.recipe.sections import LoraSection, TrainSection
from pipeline.engines.open import init_distributed, open_engine
from pipeline.model.models import add_lora
from tests.tiny import tiny_model
train = TrainSection(engine="zero3", steps=1)
init_distributed(train)
open_engine(add_lora(tiny_model(), LoraSection(r=3, alpha=6), seed=0), train)
assert "deepspeed" in sys.modules and "peft" in sys.modules
print("begun with", *sorted({"mlflow", "bitsandbytes", "torch._inductor.compile_fx"} & sys.modules.keys()))
import bitsandbytes, mlflow
"""


def test_a_rank_begins_without_mlflow_and_compilers_and_they_come_when_asked_for():
    found = run(["-c", RANK], {"DS_ACCELERATOR": "cpu"})
    assert found.returncode == 0, found.stderr
    assert "begun with\n" in found.stdout


def test_what_is_hidden_is_back_after_the_block(monkeypatch):
    monkeypatch.setattr("pipeline.running.lean_imports.threading.active_count", lambda: 1)
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with without("this"), pytest.raises(ImportError):
        import this  # noqa: F401
    assert "this" not in sys.modules


def test_what_is_marked_inside_is_not_compiled_and_what_comes_later_is():
    compiling = torch.compile

    def plain():
        pass

    with uncompiled():
        assert torch.compile(plain) is torch.compile(dynamic=False)(plain) is plain
    assert torch.compile is compiling


def test_nothing_is_hidden_that_is_there_or_beside_another_thread(monkeypatch):
    with without("json"):
        import json

        assert json.dumps([]) == "[]"
    monkeypatch.setattr("pipeline.running.lean_imports.threading.active_count", lambda: 2)
    monkeypatch.delitem(sys.modules, "antigravity", raising=False)
    with without("antigravity"):
        assert "antigravity" not in sys.modules
