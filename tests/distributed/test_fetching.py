"""How ZeRO-3 fetches what it cuts itself: a layer or so with one collective, while the layer before it is at work; what
is live stays bounded. Frozen layers are test_frozen.py's, but for those that ZeRO-3 keeps in host memory.

And how FSDP2 reduces: the gradients of an adapter once a step.
"""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.engines.open import init_distributed, open_engine
from pipeline.model.models import decoder_layers, make_trainable
from pipeline.objectives.losses import useful_loss
from pipeline.recipe.sections import LoraSection, TrainSection
from tests.distributed.ranks import spawn
from tests.distributed.worker import SometimesMore
from tests.tiny import StepBatches, tiny_lora

LAYERS = 6
CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
)


class Trace:
    """What a pass does, in order: ("gather", layers), ("fetch", layer), ("work", layer),
    of layers alone; and how much is live.
    """

    def __init__(self, engine):
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
        from deepspeed.runtime.zero.partitioned_param_coordinator import (
            PartitionedParameterCoordinator as Coordinator,
        )

        self.events: list[tuple[str, object]] = []
        self.live = 0
        blocks = decoder_layers(engine.module)
        owner = {p: number for number, block in enumerate(blocks) for p in block.parameters()}
        place = {block: number for number, block in enumerate(blocks)}
        parameters = list(engine.module.parameters())
        gather_name = "_PartitionedParameterCoordinator__all_gather_params_"
        fetch, gather = Coordinator.fetch_sub_module, getattr(Coordinator, gather_name)

        def fetching(coordinator, module, forward):
            if module in place:
                self.events.append(("fetch", place[module]))
            fetch(coordinator, module, forward)
            live = sum(
                p.ds_numel for p in parameters if p.ds_status != ZeroParamStatus.NOT_AVAILABLE
            )
            self.live = max(self.live, live)

        def gathering(coordinator, params, *arguments, **options):
            params = list(params)
            asked = [p for p in params if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
            layers = sorted({owner[p] for p in asked if p in owner})
            if layers:
                self.events.append(("gather", layers))
            return gather(coordinator, params, *arguments, **options)

        Coordinator.fetch_sub_module = fetching
        setattr(Coordinator, gather_name, gathering)
        for number, block in enumerate(blocks):
            block.mlp.register_forward_hook(
                lambda *_, number=number: self.events.append(("work", number))
            )


def check_fetching(rank: int, folder, adapter: str) -> None:
    path = folder / "ds.json"
    zero = {
        "stage": 3,
        "overlap_comm": True,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        **({"offload_param": {"device": "cpu"}} if adapter == "lora" else {}),
    }
    if rank == 0:
        path.write_text(json.dumps({"zero_optimization": zero}))
    train = TrainSection(
        steps=1, engine="zero3", adapter=adapter, batch_size=8, micro_batch_size=2, gradient_checkpointing=False,
        lora=LoraSection(r=3, target_modules=["q_proj", "v_proj"]), ds_config=str(path),
    )  # fmt: skip
    init_distributed(train)
    torch.distributed.barrier()
    torch.manual_seed(0)
    module = make_trainable(LlamaForCausalLM(CONFIG), train, seed=0)
    sizes = [sum(p.numel() for p in block.parameters()) for block in decoder_layers(module)]
    others = sum(p.numel() for p in module.parameters()) - sum(sizes)
    largest = max(p.numel() for p in module.parameters())
    engine = open_engine(module, train)
    trace, batches = Trace(engine), StepBatches(rank, 2).useful(0)
    for _ in range(3):  # the first pass is recorded, prefetching begins with the second
        trace.events.clear()
        trace.live = 0
        engine.forward_backward(useful_loss, batches[:1])
    if rank == 0:
        # DeepSpeed asks for tensors until a size is reached, so the last one may exceed it.
        most = 2 * max(sizes) + others + largest
        found = {"events": trace.events, "live": trace.live, "least": max(sizes), "most": most}
        (folder / "trace.json").write_text(json.dumps(found))


def check_reducing(rank: int, folder, adapter: str) -> None:
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

    train = TrainSection(
        steps=1, engine="fsdp2", adapter=adapter, batch_size=8, micro_batch_size=2, gradient_checkpointing=False,
        lora=LoraSection(r=3, target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip
    init_distributed(train)
    torch.manual_seed(0)
    engine = open_engine(make_trainable(LlamaForCausalLM(CONFIG), train, seed=0), train)
    reduce, counted = groups.foreach_reduce, []
    groups.foreach_reduce = lambda *arguments, **options: (
        counted.append(1) or reduce(*arguments, **options)
    )
    batches = StepBatches(rank, 2).useful(0)
    assert len(batches) > 1
    engine.forward_backward(useful_loss, batches)
    if rank == 0:
        (folder / "counted.json").write_text(json.dumps([len(counted), len(batches)]))


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_fsdp2_reduces_an_adapter_s_gradients_once_a_step(tmp_path, adapter):
    spawn(2, check_reducing, tmp_path, adapter)
    counted, batches = json.loads((tmp_path / "counted.json").read_text())
    # an adapter in one go; else every layer, and the root's embeddings, norm and head
    assert counted == (1 if adapter == "lora" else (LAYERS + 1) * batches) and batches > 1


def first_uses_more(engine, batches: list):
    """A loss to which `more` of SometimesMore adds in the first micro-batch alone."""
    turns = iter([True] + [False] * (len(batches) - 1))
    return lambda module, batch: useful_loss(
        lambda **given: module(use_more=next(turns), **given), batch
    )


def check_once(rank: int, folder) -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Optimizer

    path = folder / "ds.json"
    if rank == 0:
        path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    train = TrainSection(
        steps=1, engine="zero3", batch_size=8, micro_batch_size=2, ds_config=str(path)
    )
    init_distributed(train)
    torch.distributed.barrier()
    engine = open_engine(SometimesMore(tiny_lora()), train)
    name = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"
    reduce, counted = getattr(Optimizer, name), []
    setattr(Optimizer, name, lambda *given: counted.append(1) or reduce(*given))
    batches, v = StepBatches(rank, 2).useful(0), torch.ones(1, requires_grad=True)

    def loss(module, batch):
        return base(module, batch) * v[0]

    base = first_uses_more(engine, batches)
    _, of_v = engine.forward_backward(loss, batches, [v])
    found = engine.gather(engine.accumulated_gradient())
    clean = all(p.grad is None for p in engine.module.parameters())
    engine.discard()
    base = first_uses_more(engine, batches)
    _, again = engine.gradient(loss, batches)
    again = engine.gather(again)
    _, without = engine.gradient(useful_loss, batches)
    unused = engine.gather(without).get("more.weight")
    if rank == 0:
        counts = {"reduced": len(counted), "batches": len(batches), "clean": clean}
        (folder / "counted.json").write_text(json.dumps(counts))
        results = {"main": found, "auxiliary": again, "v": of_v, "unused": unused}
        torch.save(results, folder / "found.pt")


def test_zero3_reduces_an_adapter_s_gradients_once_a_step_and_loses_none(tmp_path):
    spawn(2, check_once, tmp_path)
    counts = json.loads((tmp_path / "counted.json").read_text())
    assert counts == {"reduced": 3, "batches": 2, "clean": True}, "once for each of three passes"
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    alone = open_engine(SometimesMore(tiny_lora()), TrainSection(steps=1, engine="single"))
    # the micro-batches of both ranks, of which each rank's first one uses more
    shares = [StepBatches(rank, 2).useful(0) for rank in (0, 1)]
    v = torch.ones(1, requires_grad=True)
    for batches in shares:
        base = first_uses_more(alone, batches)
        for batch in batches:
            (base(alone.module, batch) * v[0]).backward()
    expected = alone.gather(alone.accumulated_gradient())
    assert expected["more.weight"].any() and found["v"].shape == (1, 1)
    assert not found["unused"].any(), "that of what no micro-batch uses"
    assert torch.allclose(found["v"].flatten(), v.grad, rtol=1e-4)
    for gradient in (found["main"], found["auxiliary"]):
        for name, value in expected.items():
            assert torch.allclose(gradient[name], value, rtol=1e-3, atol=1e-6), name


def asked_for(events: list, layer: int) -> bool:
    return any(kind == "gather" and layer in what for kind, what in events)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_next_layer_is_on_its_way_while_one_works(tmp_path, adapter):
    spawn(2, check_fetching, tmp_path, adapter)
    found = json.loads((tmp_path / "trace.json").read_text())
    events = found["events"]
    assert found["least"] < found["live"] <= found["most"], found
    assert sum(kind == "gather" for kind, _ in events) <= 2 * LAYERS + 4, events
    turn = events.index(["work", LAYERS - 1])
    for layer in range(1, LAYERS):
        before, there = events.index(["work", layer - 1]), events.index(["work", layer])
        assert asked_for(events[:before], layer), (
            f"layer {layer} is not asked for in time: {events}"
        )
        assert not asked_for(events[before:there], layer), (
            f"something of layer {layer} is asked for when it is needed: {events}"
        )
    backward = events[turn:]
    for layer in range(LAYERS - 2, -1, -1):
        at = backward.index(["fetch", layer])
        end = backward.index(["fetch", layer - 1]) if layer else len(backward)
        assert not asked_for(backward[at:end], layer), (
            f"something of layer {layer} is asked for when it is needed: {events}"
        )
