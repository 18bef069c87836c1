"""ZeRO-3 on two gloo ranks against the single process, in float32: parity, restore, traces, vectors, resume.

All cases run in one warm pair of processes (tests/distributed/worker.py), started once.
"""

import socket
from pathlib import Path

import pytest
import torch

from tests.distributed import worker
from tests.distributed.worker import make_step, open_tiny, run_steps
from tests.tiny import tiny_lora


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker.main, args=(port, str(folder)), nprocs=worker.WORLD)
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> dict:
    """The specification's weights after the same steps, per schedule; None: plain."""
    folder = Path(tmp_path_factory.mktemp("single"))
    result = {}
    for schedule in ("exact", "lagged", None):
        engine = open_tiny(folder, "single")
        result[schedule] = run_steps(engine, make_step(engine, schedule))
    return result


def start() -> dict:
    return {name: p.detach() for name, p in tiny_lora(dropout=0.1).named_parameters() if p.requires_grad}


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return torch.sqrt(sum((a[name].double() - b[name].double()).square().sum() for name in a)).item()


@pytest.mark.parametrize("schedule", ["exact", "lagged"])
@pytest.mark.parametrize("persistence", [0, 10**6])
def test_two_ranks_equal_the_single_process(found, single, schedule, persistence):
    update = distance(single[schedule], start())
    assert distance(found["parity"][f"{schedule}-{persistence}"], single[schedule]) / update < 1e-5


@pytest.mark.parametrize("schedule", ["exact", "lagged"])
def test_leaving_sap_out_would_be_caught(single, schedule):
    update = distance(single[schedule], start())
    assert distance(single[None], single[schedule]) / update > 1e-2


@pytest.mark.parametrize("persistence", ["0", "1000000"])
def test_perturbation_is_seen_and_undone_bit_for_bit(found, persistence):
    result = found["restore"][persistence]
    assert result["bitwise"] and result["loss_back"]
    assert result["slope"] == pytest.approx(1.0, abs=0.15)  # first order: the loss moves by |g| times the distance


def test_auxiliary_passes_leave_no_trace(found):
    plain, with_passes = found["traces"]["False"], found["traces"]["True"]
    assert with_passes["clean"]
    assert with_passes["counters"] == [(0, 0), (1, 1), (2, 2)]
    assert distance(plain["weights"], with_passes["weights"]) == 0.0


def test_vectors_survive_sharding_with_poisoned_padding(found):
    result, expected = found["vectors"], start()
    assert result["padding"] > 0, "the sizes must not divide, or the test shows nothing"
    assert result["round_trip"]
    assert all(torch.equal(result["named"][name], expected[name]) for name in expected)
    norm = torch.sqrt(sum(t.double().square().sum() for t in expected.values())).item()
    assert result["norm"] == pytest.approx(norm, rel=1e-12)


@pytest.mark.parametrize("schedule", ["exact", "lagged"])
def test_resume_is_bit_for_bit(found, schedule):
    assert found["resume"][schedule] == {"done": 3, "equal": True}
