"""Names that libraries keep to themselves are used behind a fence, which says what is missing; and bounds hold them.

Not seen: a private name that is put together from parts or comes from a file, and one of an object that is ours and a
library's at once (a subclass) where something of ours has the same name.
"""

import ast
import sys
import tomllib
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from pipeline.engines import deepspeed_private
from pipeline.engines.open import init_distributed
from pipeline.libraries import torch_private, transformers_private
from pipeline.libraries.needed import need
from pipeline.recipe.sections import TrainSection
from pipeline.running import entry
from pipeline.stages import evaluate, on_ranks
from tests.tools.architecture import ROOT, modules, tree

FENCES = {
    "pipeline.engines.deepspeed_private",
    "pipeline.libraries.transformers_private",
    "pipeline.libraries.torch_private",
}
# Modules of theirs that these libraries document; of others, each without an underscore is taken for public.
DOCUMENTED = {
    "deepspeed": {"deepspeed", "deepspeed.utils"},
    "transformers": {"transformers", "transformers.utils.logging"},
    "peft": {"peft"},
}
BY_NAME = ("getattr", "hasattr", "setattr", "delattr")
OF_DEEPSPEED = {"initialize", "init_distributed", "zero", "utils", "__version__"}
# No name of DeepSpeed's insides is said by these, which others have, too.
COMMON = {"optimizer", "partition", "pin_memory", "AVAILABLE", "offload_optimizer", "ds_config"}
INSIDE = {name.rpartition(".")[2].rpartition(":")[2] for name in deepspeed_private._NAMES} - COMMON


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and len(name) > 1


def defined(module: ast.Module) -> set[str]:
    """Names that a module gives: functions, classes, variables, and attributes that its classes set on themselves."""
    found = set()
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif (
            isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and own(node.value)
        ):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "object.__setattr__":
            found.add(ast.literal_eval(node.args[1]))
    return found


def own(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


@cache
def ours() -> set[str]:
    return set().union(*(defined(tree(module)) for module in modules()))


@cache
def theirs() -> set[str]:
    """Private names of the classes whose objects are handled here."""
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import (
        GenerationConfig,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerFast,
    )

    classes = (
        torch.nn.Module, torch.Tensor, torch.nn.Parameter, torch.optim.AdamW, torch.distributed.fsdp.FSDPModule,
        torch.distributed.tensor.DTensor, Init, DeepSpeedZeroOptimizer_Stage3, PeftModel, LoraLayer, PreTrainedModel,
        PretrainedConfig, GenerationConfig, PreTrainedTokenizerFast,
    )  # fmt: skip
    instances = torch.nn.Module(), PretrainedConfig()
    return {name for value in (*classes, *instances) for name in dir(value) if private(name)}


def faults(module: ast.Module):
    """(line, name) of what a module uses of a library's insides."""
    here, standard = defined(module), {"self", "cls"}
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names = (name for name in node.names if library(name.name) in sys.stdlib_module_names)
            standard |= {name.asname or name.name for name in names}
    for node in ast.walk(module):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            yield from ((line, name.name) for name in node.names if not documented(name.name))
        elif (
            isinstance(node, ast.ImportFrom)
            and node.module
            and library(node.module) not in ("pipeline", "launch")
        ):
            whole = [
                node.module,
                *(f"{node.module}.{name.name}" for name in node.names if private(name.name)),
            ]
            yield from ((line, name) for name in whole if not documented(name))
        elif isinstance(node, ast.Attribute):
            on = ast.unparse(node.value)
            inherited = own(node.value) or on == "super()"
            undocumented = on == "deepspeed" and node.attr not in OF_DEEPSPEED
            foreign = on not in standard | {"super()"} and node.attr not in here
            hidden = private(node.attr) and (foreign or (inherited and node.attr not in ours()))
            if undocumented or hidden or node.attr in INSIDE or inside_parameter(node.attr):
                yield line, f"{on}.{node.attr}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if (node.value in theirs() and node.value not in here) or inside_parameter(node.value):
                yield line, repr(node.value)
        elif (
            isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME and len(node.args) > 1
        ):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
            if name and (name in INSIDE or private(name)) and name not in here:
                yield line, repr(name)


def inside_parameter(name: str) -> bool:
    """Whether it is a name that ZeRO-3 gives to what a parameter carries."""
    return name.startswith("ds_") and name.isidentifier() and name not in COMMON | {"ds_configs"}


def documented(module: str) -> bool:
    if library(module) in sys.stdlib_module_names:
        return True
    return not any(map(private, module.split("."))) and module in DOCUMENTED.get(
        library(module), {module}
    )


def library(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("module", sorted(modules().keys() - FENCES))
def test_no_private_name_of_a_library_outside_a_fence(module):
    assert not list(faults(tree(module)))


@pytest.mark.parametrize(
    "text",
    [
        "from torch.distributed._composable import fsdp",
        "import torch._dynamo",
        "from torch import _foreach_mul_",
        "import torch\ntorch._foreach_mul_([], 2)",
        "def f(owner):\n    return owner._parameters",
        "class A:\n    def f(self):\n        return self.optimizer._offload_boundary_param_ids",
        "class A(Base):\n    def f(self):\n        return self._init_weights(1)",
        "class A(Base):\n    def f(self):\n        return super()._init_weights(1)",
        "def f(model):\n    return getattr(model, '_supports_sdpa', False)",
        "FLAGS = {'sdpa': '_supports_sdpa'}",
        "def f(model):\n    return getattr(model, '_whatever')",
        "def f(p):\n    return p.ds_tensor",
        "def f(p):\n    return getattr(p, 'ds_numel')",
        "def f(optimizer):\n    return getattr(optimizer, 'fp16_groups')",
        "class A:\n    def f(self):\n        return self.optimizer.fp16_groups",
        "from deepspeed.runtime.zero import stage3",
        "import deepspeed\nops = deepspeed.ops",
        "from transformers.core_model_loading import rename_source_key",
        "from peft.import_utils import is_bnb_available",
        "def f(config):\n    return config.get_text_config()._attn_implementation",
    ],
)
def test_the_rule_sees_what_is_private(text):
    assert len(set(faults(ast.parse(text)))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "import os\nos._exit(1)",
        "import deepspeed\nfrom deepspeed.utils import logger\ndeepspeed.initialize(model=1)",
        "class A:\n    def __init__(self, other):\n        self._kept = other._kept",
        "from torch.distributed.fsdp import fully_shard\nfor _ in (): fully_shard.__name__",
        "def f(train):\n    return train.ds_config, train.optimizer, 'ds_config'",
        "SUFFIX = '_low'",
    ],
)
def test_the_rule_lets_pass_what_is_public_or_ours(text):
    assert not list(faults(ast.parse(text)))


def test_every_fence_has_something_behind_it():
    assert all(list(faults(tree(module))) for module in FENCES)


class Kept:
    """As DeepSpeed's optimizer: names that only its instances have."""

    def __init__(self):
        self.flat = 1

        def inner():
            self.inside = 2

        inner()


def test_names_that_only_instances_have_are_found_in_the_code():
    need(
        "pytest",
        "pytest>=8",
        [f"{__name__}:Kept.flat", f"{__name__}:Kept.inside", f"{__name__}:Kept.__init__"],
    )


@pytest.mark.parametrize("name", [f"{__name__}:Kept.lost", f"{__name__}:lost", "pytest.lost:name"])
def test_what_is_missing_is_one_sentence_and_exit_code_2(name, capsys):
    assert entry.guarded(lambda: need("pytest", "pytest>=8", [f"{__name__}:Kept.flat", name])) == 2
    said = f"error: pytest {version('pytest')} has no {name.replace(':', '.')}, which this project needs of its insides"
    assert capsys.readouterr().err.strip() == f"{said}: pip install 'pytest>=8'"


@pytest.fixture
def undistributed(monkeypatch):
    """No process group, whatever other tests have left; and none is begun."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", None)


def test_a_deepspeed_without_a_name_is_refused_before_anything_is_begun(monkeypatch, undistributed):
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    deepspeed_private.check()
    monkeypatch.delattr(Stage3, "_finalize_offload_gradient_accumulation")
    said = r"deepspeed [\d.]+ has no .*Stage3\._finalize_offload.*: pip install 'deepspeed>=0.19.4,<0.20'"
    with pytest.raises(ValueError, match=said):
        init_distributed(TrainSection(engine="zero3", steps=1))


@pytest.mark.parametrize("engine", ["single", "fsdp2"])
def test_a_torch_without_a_name_is_refused_before_anything_is_begun(
    monkeypatch, undistributed, engine
):
    monkeypatch.delattr(torch, "_foreach_mul_")
    with pytest.raises(
        ValueError, match=r"torch \S+ has no torch\._foreach_mul_.*: pip install 'torch>=2.6,<3'"
    ):
        init_distributed(TrainSection(engine=engine, steps=1))


def test_bounds_are_those_of_the_package_and_hold_what_was_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {Requirement(text).name: text for text in project["dependencies"]}
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    of_transformers = transformers_private.TRANSFORMERS, transformers_private.PEFT
    for text in (deepspeed_private.REQUIREMENT, *of_transformers, torch_private.REQUIREMENT):
        requirement = Requirement(text)
        assert declared[requirement.name] == text
        assert tested[requirement.name] in requirement.specifier
        assert any(part.operator == "<" for part in requirement.specifier)


@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_what_peft_lacks_is_said_before_weights_are_read(monkeypatch, where):
    def read(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(
        transformers_private,
        "need",
        lambda library, *_: (_ for _ in ()).throw(ValueError(f"{library} has no x")),
    )
    monkeypatch.setattr(on_ranks, "open_model", read)
    monkeypatch.setattr(evaluate, "load_whole", read)
    base = SimpleNamespace(model=None, evaluate=None)
    with pytest.raises(ValueError, match="peft has no x"):
        if where == "training":
            on_ranks.start_engine(base, "model", TrainSection(steps=1, engine="single"), 0)
        else:
            evaluate._measure(
                SimpleNamespace(base=base),
                SimpleNamespace(model="m", adapter=Path("a")),
                None,
                None,
                {},
            )
