"""A run goes on from its checkpoint: bit for bit at the same number of ranks,
within float32 parity at another (ZeRO-3, FSDP2).
"""

import pytest
import torch

from pipeline.engines.engine import step_counter
from pipeline.engines.single import SingleEngine
from pipeline.objectives.losses import useful_loss
from tests.distributed import resume_worker
from tests.distributed.ranks import spawn
from tests.distributed.resume_worker import CASES, SAVED, STEPS, name_of
from tests.distributed.worker import make_step, run_steps
from tests.tiny import StepBatches, tiny_lora, tiny_model

pytestmark = [pytest.mark.processes, pytest.mark.slow]

TOLERANCE = {"lora": 1e-5, "full": 1e-4}  # shares of the whole update, as in docs/correctness.md


@pytest.mark.parametrize("form", [{"fused": True}, {"foreach": False}], ids=str)
def test_one_process_goes_on_bit_for_bit_with_either_form_of_adamw(tmp_path, form):
    """GPUs take the fused form, whose counter of steps lies beside the weights."""

    def opened() -> SingleEngine:
        model = tiny_lora()
        return SingleEngine(
            model,
            torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **form),
            1.0,
        )

    batches, straight, resumed = StepBatches(), opened(), opened()
    run_steps(straight, make_step(straight, "exact"), 2)
    straight.save(tmp_path, {})
    resumed.load(tmp_path)
    for engine in (straight, resumed):
        engine.forward_backward(useful_loss, batches.useful(3))
        engine.step(1e-2)
    assert all(map(torch.equal, straight.weights(), resumed.weights()))
    counter = step_counter(resumed.optimizer, torch.tensor(3.0), torch.empty(1, device="meta"))
    assert counter.device.type == ("meta" if form.get("fused") else "cpu")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """Findings of two ranks, which save, and of three and one, which go on from what those saved."""
    folder = tmp_path_factory.mktemp("resume")
    results = {}
    for world_size, save in ((2, True), (3, False), (1, False)):
        spawn(world_size, resume_worker.main, folder, world_size, save)
        results[world_size] = torch.load(
            folder / f"found-{world_size}{'-save' if save else ''}.pt", weights_only=True
        )
    return results


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_same_ranks_go_on_bit_for_bit(found, case):
    straight, resumed = found[2][f"{name_of(case)}-straight"], found[2][name_of(case)]
    assert (straight["done"], resumed["done"]) == (0, SAVED)
    assert resumed["weights"].keys() == straight["weights"].keys() != set()
    for name, tensor in straight["weights"].items():
        assert torch.equal(tensor, resumed["weights"][name]), name


@pytest.mark.parametrize("world_size", [3, 1])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_other_ranks_go_on_within_parity(found, case, world_size):
    straight, resumed = found[2][f"{name_of(case)}-straight"], found[world_size][name_of(case)]
    assert resumed["done"] == SAVED
    # A direction refreshed every second step is one step old at the checkpoint's step,
    # so it and its age have to survive.
    assert resumed["ages"] == straight["ages"][SAVED:] == [1.0, 0.0, 1.0]
    started = start(case[1])
    update = distance(straight["weights"], started)
    assert update > 0.1 * STEPS * 1e-2, "the run must move, or the difference shows nothing"
    assert distance(straight["weights"], resumed["weights"]) / update < TOLERANCE[case[1]]


def start(adapter: str) -> dict:
    model = tiny_lora(warm=False) if adapter == "lora" else tiny_model()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return torch.sqrt(
        sum((a[name].double() - b[name].double()).square().sum() for name in a)
    ).item()
