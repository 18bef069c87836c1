"""ZeRO-3 and FSDP2 on two gloo ranks against the single process, in float32: parity, restore, traces, vectors.

Everything runs in one warm pair of processes (tests/distributed/worker.py), started once; only what the selected tests
ask for. tests/distributed/equivalence.py has the systematic matrix, test_resume.py what survives a checkpoint.
"""

from pathlib import Path

import pytest
import torch

from pipeline.defences.saft.embeddings import embed
from pipeline.engines.open import open_engine
from tests.companions import METHODS, Dense
from tests.distributed import worker
from tests.distributed.ranks import spawn
from tests.distributed.worker import budgeted, make_step, run_steps, shares, train_section
from tests.tiny import tiny_lora, tiny_model, tiny_rows

pytestmark = [pytest.mark.processes, pytest.mark.slow]

SHARDED = ["zero3-0", "zero3-1000000", "fsdp2"]


def finds(name: str, engines: list[str]):
    """Gives a test the finding worker.CASES[name] of each of the engines, which worker.SETTINGS describes."""

    def mark(test):
        test.finds = name
        return pytest.mark.parametrize("engine", engines)(test)

    return mark


@pytest.fixture(scope="module")
def found(request, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("ranks")
    asking = [
        item for item in request.session.items if hasattr(getattr(item, "function", None), "finds")
    ]
    wanted = sorted({(item.function.finds, item.callspec.params["engine"]) for item in asking})
    spawn(2, worker.main, folder, wanted)
    return {
        (name, engine): torch.load(folder / f"{name}-{engine}.pt", weights_only=True)
        for name, engine in wanted
    }


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> dict:
    """The specification's weights after the same steps, per schedule; None: plain."""
    folder = Path(tmp_path_factory.mktemp("single"))
    result = {}
    for schedule in ("exact", "lagged", None):
        engine = open_engine(tiny_lora(dropout=0.1), train_section(folder, "single", 0))
        result[schedule] = run_steps(engine, make_step(engine, schedule))
    return result


def start() -> dict:
    return {
        name: p.detach() for name, p in tiny_lora(dropout=0.1).named_parameters() if p.requires_grad
    }


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return torch.sqrt(
        sum((a[name].double() - b[name].double()).square().sum() for name in a)
    ).item()


@finds("parity", SHARDED)
@pytest.mark.parametrize("schedule", ["exact", "lagged"])
def test_two_ranks_equal_the_single_process(found, single, schedule, engine):
    update = distance(single[schedule], start())
    assert distance(found["parity", engine][schedule], single[schedule]) / update < 1e-5


@pytest.mark.parametrize("schedule", ["exact", "lagged"])
def test_leaving_sap_out_would_be_caught(single, schedule):
    update = distance(single[schedule], start())
    assert distance(single[None], single[schedule]) / update > 1e-2


@finds("restore", [*SHARDED, "zero3-offload", "zero3-full", "fsdp2-full"])
def test_perturbation_is_seen_and_undone_bit_for_bit(found, engine):
    result = found["restore", engine]
    assert result["bitwise"] and result["loss_back"]
    # first order: the loss moves by |g| times the distance
    assert result["slope"] == pytest.approx(1.0, abs=0.01)


@finds("traces", ["zero3-0", "zero3-offload", "fsdp2"])
def test_auxiliary_passes_leave_no_trace(found, engine):
    plain, with_passes = found["traces", engine]["without"], found["traces", engine]["with"]
    assert with_passes["clean"]
    assert with_passes["counters"] == [(0, 0), (1, 1), (2, 2)]
    assert distance(plain["weights"], with_passes["weights"]) == 0.0


@finds("replaced", [*SHARDED, "zero3-offload", "zero3-full", "fsdp2-full"])
def test_replaced_weights_are_seen_and_gone_bit_for_bit(found, engine):
    assert found["replaced", engine] == dict.fromkeys(
        ("exact", "bitwise", "loss_back", "seen", "assigned"), True
    )


@finds("chunks", [*SHARDED, "zero3-full", "fsdp2-full"])
def test_logits_of_two_tokens_at_a_time_train_the_same_weights(found, engine):
    """Adapters have a head that is frozen and gathered; with all weights trained,
    its gradient is made in chunks too.
    """
    result = found["chunks", engine]
    begin = (
        start()
        if "full" not in engine
        else {name: p.detach() for name, p in tiny_model().named_parameters()}
    )
    assert result["most"] == 2
    # All weights: AdamW divides gradients that are next to nothing by their own size (docs/correctness.md).
    assert distance(result["chunks"], result["whole"]) / distance(result["whole"], begin) < (
        1e-4 if "full" in engine else 1e-5
    )


@finds("embeddings", SHARDED)
def test_embeddings_of_two_ranks_equal_the_single_process_s(found, engine, tmp_path):
    alone = open_engine(tiny_lora(dropout=0.1), train_section(tmp_path, "single", 0))
    expected = embed(alone, tiny_rows(11), 2, "response_mean", 4, 0)
    result = found["embeddings", engine]
    assert (
        result["same"]
        and torch.allclose(result["embeddings"], expected, atol=1e-5)
        and expected.norm(dim=1).min() > 0
    )
    after = run_steps(alone, make_step(alone, None), 1)
    assert distance(result["weights"], after) / distance(after, start()) < 1e-5, (
        "a step after the embeddings is as any other"
    )


@finds("discarded", [*SHARDED, "zero3-offload", "zero3-full", "fsdp2-full"])
def test_a_gradient_that_is_thrown_away_leaves_no_trace(found, engine):
    result = found["discarded", engine]
    assert all(
        torch.equal(result["discarding"][name], weights)
        for name, weights in result["straight"].items()
    )


@finds("share", SHARDED)
def test_v_of_a_share_of_the_samples_is_the_single_process_s(found, tmp_path, engine):
    expected, begin = (
        shares(open_engine(tiny_lora(), train_section(tmp_path, "single", 0))),
        start(),
    )
    assert distance(expected["1"], expected["2"]) / distance(expected["2"], begin) > 1e-3, (
        "the case tells nothing"
    )
    for samples, weights in found["share", engine].items():
        assert distance(weights, expected[samples]) / distance(expected[samples], begin) < 1e-4


@pytest.fixture(scope="module")
def unbudgeted(tmp_path_factory) -> dict:
    """The single process on micro-batches of two rows each."""
    return budgeted(
        open_engine(tiny_lora(), train_section(tmp_path_factory.mktemp("rows"), "single", 0)), None
    )


@finds("budget", [*SHARDED, "zero3-offload"])
def test_a_token_budget_leaves_the_single_process_s_gradient(found, unbudgeted, engine):
    """Passes differ in number from step to step: DeepSpeed's gradient_accumulation_steps must not matter."""
    result = found["budget", engine]
    assert len(set(result["passes"])) > 1 and max(result["passes"]) > unbudgeted["passes"][0] // 2
    check_unbudgeted(result, unbudgeted)


@finds("reads", ["fsdp2"])
def test_a_plain_step_reads_once_on_two_ranks_too(found, engine):
    """DeepSpeed's own step reads a norm for itself, and is left out."""
    assert found["reads", engine] == [["tolist"]] * worker.STEPS


@finds("packed", ["zero3-0", "fsdp2"])
def test_packed_rows_leave_the_single_process_s_gradient(found, unbudgeted, engine):
    """SAP's passes among them: V is added to every token of a packed row."""
    check_unbudgeted(found["packed", engine], unbudgeted)


def check_unbudgeted(result: dict, unbudgeted: dict) -> None:
    assert result["losses"] == pytest.approx(unbudgeted["losses"], rel=1e-6)
    zero = {name: torch.zeros_like(p) for name, p in unbudgeted["gradients"][0].items()}
    for mine, expected in zip(result["gradients"], unbudgeted["gradients"], strict=True):
        assert distance(mine, expected) / distance(expected, zero) < 1e-5
    begin = {name: p.detach() for name, p in tiny_lora().named_parameters() if p.requires_grad}
    assert (
        distance(result["weights"], unbudgeted["weights"]) / distance(unbudgeted["weights"], begin)
        < 1e-5
    )


@pytest.fixture(scope="module")
def dense() -> dict:
    return {method: Dense(method).train() for method in METHODS}


@finds("companions", [*SHARDED, "zero3-offload"])
@pytest.mark.parametrize("method", METHODS)
def test_companion_methods_on_two_ranks_equal_the_dense_reference(found, dense, method, engine):
    begin = {name: p.detach() for name, p in tiny_lora().named_parameters() if p.requires_grad}
    assert (
        distance(found["companions", engine][method], dense[method])
        / distance(dense[method], begin)
        < 1e-5
    )


@finds("companions", ["zero3-full", "fsdp2-full"])
@pytest.mark.parametrize("method", METHODS)
def test_companion_methods_of_all_weights_equal_the_dense_reference(found, method, engine):
    begin = {name: p.detach() for name, p in tiny_model().named_parameters()}
    expected = Dense(method, full=True).train()
    assert (
        distance(found["companions", engine][method], expected) / distance(expected, begin) < 1e-4
    )


@finds("vectors", ["zero3-0", "fsdp2"])
def test_vectors_survive_sharding_with_poisoned_padding(found, engine):
    result, expected = found["vectors", engine], start()
    assert result["missing"] > 0, "the sizes must not divide, or the test shows nothing"
    assert result["round_trip"]
    assert all(torch.equal(result["named"][name], expected[name]) for name in expected)
    norm = torch.sqrt(sum(t.double().square().sum() for t in expected.values())).item()
    assert result["norm"] == pytest.approx(norm, rel=1e-12)
