"""A run goes on from its checkpoint: bit for bit at the same number of ranks, within float32 parity at another (ZeRO-3, FSDP2)."""

import pytest
import torch

from tests.distributed import resume_worker
from tests.distributed.ranks import spawn
from tests.distributed.resume_worker import CASES, SAVED, STEPS, name_of
from tests.tiny import tiny_lora, tiny_model

pytestmark = pytest.mark.processes

TOLERANCE = {"lora": 1e-5, "full": 1e-4}  # shares of the whole update, as in docs/correctness.md


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """Findings of two ranks, which save, and of three and one, which go on from what those saved."""
    folder = tmp_path_factory.mktemp("resume")
    results = {}
    for world_size, save in ((2, True), (3, False), (1, False)):
        spawn(world_size, resume_worker.main, folder, world_size, save)
        results[world_size] = torch.load(folder / f"found-{world_size}{'-save' if save else ''}.pt", weights_only=True)
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
    # A direction refreshed every second step is one step old at the checkpoint's step, so it and its age have to survive.
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
    return torch.sqrt(sum((a[name].double() - b[name].double()).square().sum() for name in a)).item()
