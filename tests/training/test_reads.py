"""How often a step makes the host wait for the device: at every tensor whose content decides what Python does next."""

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pipeline.sections import TrainSection
from pipeline.sharding import launch
from pipeline.training.loop import Loop, TrainingData
from pipeline.training.plain import PlainStep
from tests.tiny import family_model, tiny_lora, tiny_rows

aten = torch.ops.aten
# Whose result has as many elements as the content says, or is a number of Python's.
_READS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2)


class Reads(TorchDispatchMode):
    """Counts what a GPU would make the host wait for, by name; the CPU's own tensors are not told apart."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = function.overloadpacket is aten.index and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if function.overloadpacket in _READS or by_mask:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """`tolist` and `numpy`, which copy a GPU's tensor without a word to the dispatcher where it is the CPU's."""

    def __init__(self, reads: Reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.tolist, torch.Tensor.numpy):
            self.reads.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted():
    reads = Reads()
    with reads, Lists(reads):
        yield reads.found


def fused(parameters, train: TrainSection) -> torch.optim.Optimizer:
    """As on a GPU: the form for CPUs reads a counter of steps that is kept on the CPU on purpose."""
    return torch.optim.AdamW(parameters, lr=train.lr, fused=True)


@pytest.mark.parametrize("wrong", [False, True])
def test_the_count_sees_every_way_to_read(wrong):
    tensor = torch.ones(3)
    ways = [
        lambda: tensor.sum().item(), lambda: bool(tensor.sum() == 3), lambda: float(tensor[0]), lambda: tensor.tolist(),
        lambda: tensor[tensor > 0], lambda: tensor.nonzero(), lambda: tensor.add(1.0, alpha=tensor[0].detach()),
        lambda: torch.equal(tensor, tensor), lambda: tensor.numpy(),
    ]  # fmt: skip
    harmless = [lambda: tensor.sum().sqrt(), lambda: tensor[torch.tensor([0, 2])], lambda: torch.stack([tensor, tensor])]
    for way in ways if wrong else harmless:
        with counted() as found:
            way()
        assert bool(found) == wrong


@pytest.mark.parametrize(("budget", "packing"), [(None, False), (40, False), (40, True)])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model", [tiny_lora, lambda: family_model("gemma3", tied=True)], ids=["lora", "gemma3"])
def test_a_plain_step_reads_once(model, checkpointing, budget, packing, tmp_path, monkeypatch):
    """However many micro-batches it has; what is looked at while they are built lies on the CPU."""
    monkeypatch.setattr(launch, "adamw", fused)
    train = TrainSection(
        engine="single", steps=3, batch_size=8, micro_batch_size=2, tokens_per_micro_batch=budget,
        gradient_checkpointing=checkpointing, packing=packing,
    )  # fmt: skip
    module = model()
    if checkpointing:
        module.gradient_checkpointing_enable({"use_reentrant": False})
    engine = launch.open_engine(module, train)
    per_step: list[list[str]] = []

    class Counted(Loop):
        def _useful(self, *given):
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                return super()._useful(*given)

        def _one_step(self, *given):
            with counted() as found:
                asked = super()._one_step(*given)
            per_step.append(found)
            return asked

    assert Counted(engine, PlainStep(engine), TrainingData(tiny_rows(), [], 0), train, 0, tmp_path, "tiny").run()
    assert per_step == [["tolist"]] * 3
