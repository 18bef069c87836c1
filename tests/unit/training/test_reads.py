"""How often a step makes the host wait for the device: at every tensor whose content decides what Python does next."""

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from pipeline.defences.plain import PlainStep
from pipeline.engines import open as launch
from pipeline.recipe.sections import TrainSection
from pipeline.training.loop import Loop, TrainingData
from tests.reads import counted, fused
from tests.tiny import family_model, tiny_lora, tiny_rows


@pytest.mark.parametrize("wrong", [False, True])
def test_the_count_sees_every_way_to_read(wrong):
    tensor = torch.ones(3)
    ways = [
        lambda: tensor.sum().item(), lambda: bool(tensor.sum() == 3), lambda: float(tensor[0]), lambda: tensor.tolist(),
        lambda: tensor[tensor > 0], lambda: tensor.nonzero(), lambda: tensor.add(1.0, alpha=tensor[0].detach()),
        lambda: torch.equal(tensor, tensor), lambda: tensor.numpy(),
    ]  # fmt: skip
    harmless = [
        lambda: tensor.sum().sqrt(),
        lambda: tensor[torch.tensor([0, 2])],
        lambda: torch.stack([tensor, tensor]),
    ]
    for way in ways if wrong else harmless:
        with counted() as found:
            way()
        assert bool(found) == wrong


@pytest.mark.parametrize(("budget", "packing"), [(None, False), (40, False), (40, True)])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "model", [tiny_lora, lambda: family_model("gemma3", tied=True)], ids=["lora", "gemma3"]
)
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

    assert Counted(
        engine, PlainStep(engine), TrainingData(tiny_rows(), [], 0), train, 0, tmp_path, "tiny"
    ).run()
    assert per_step == [["tolist"]] * 3
