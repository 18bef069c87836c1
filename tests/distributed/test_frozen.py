"""Frozen layers: each rank keeps its part, a layer is on its way while the one before it is at work, two are whole at
the most, and what engines see of the model is the rest.
"""

import functools
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from pipeline.engines import frozen as frozen_layers
from pipeline.engines.open import init_distributed, open_engine
from pipeline.model.models import decoder_layers, make_trainable
from pipeline.model.weights import Sources
from pipeline.objectives.losses import useful_loss
from pipeline.recipe.sections import LoraSection, TrainSection
from tests.distributed.ranks import spawn
from tests.distributed.test_fetching import CONFIG, LAYERS
from tests.tiny import StepBatches


def adapted(engine: str, checkpointing: str = "") -> tuple[TrainSection, nn.Module]:
    """checkpointing: inside, as transformers has it, where a recomputation is of the layer's forward alone; or around
    its call, hooks and all, as its older versions have it.
    """
    train = TrainSection(
        steps=1, engine=engine, batch_size=8, micro_batch_size=2, gradient_checkpointing=checkpointing == "inside",
        lora=LoraSection(r=3, target_modules=["q_proj", "v_proj"]),
        ds_config=Path("ds_configs/zero3_cpu.json"),
    )  # fmt: skip
    init_distributed(train)
    torch.manual_seed(0)
    module = make_trainable(LlamaForCausalLM(CONFIG), train, seed=0)
    for block in decoder_layers(module) if checkpointing == "around" else ():
        block.__class__ = _around(type(block))
    return train, module


@functools.cache
def _around(layer: type) -> type:
    def call(self, *arguments, **given):
        return checkpoint(layer.__call__, self, *arguments, use_reentrant=False, **given)

    return type("Around", (layer,), {"__call__": call})


class Trace:
    """What passes do, in order: ["gather", layer], ["wait", layer], ["work", layer], ["back", layer]; and how many
    layers hold memory at most.
    """

    def __init__(self, engine):
        self.events: list[list] = []
        self.most = 0
        layers = engine.frozen.layers
        for number, (layer, block) in enumerate(
            zip(layers, decoder_layers(engine.module), strict=True)
        ):
            self._watch(layers, layer, number)
            block.mlp.register_forward_pre_hook(
                lambda *_, number=number: self.events.append(["work", number])
            )
            block.mlp.register_full_backward_hook(
                lambda *_, number=number: self.events.append(["back", number])
            )

    def _watch(self, layers, layer, number: int) -> None:
        gather, wait = layer.gather, layer.wait

        def gathering():
            if not layer.is_whole:
                self.events.append(["gather", number])
            gather()
            self.most = max(self.most, sum(other.is_whole for other in layers))

        def waiting():
            if layer._work is not None:
                self.events.append(["wait", number])
            wait()

        layer.gather, layer.wait = gathering, waiting


def trace(rank: int, folder: Path, engine: str, checkpointing: str) -> None:
    opened = open_engine(*reversed(adapted(engine, checkpointing)))
    watched, batches = Trace(opened), StepBatches(rank, 2).useful(0)[:1]
    found = {}

    def note(name: str) -> None:
        found[name] = list(watched.events)
        watched.events.clear()

    opened.forward_backward(useful_loss, batches)
    note("first")
    opened.discard()
    opened.forward_backward(useful_loss, batches)
    note("second")
    opened.loss(useful_loss, batches)
    note("loss")
    v = torch.zeros(64, requires_grad=True)
    handle = decoder_layers(opened.module)[3].register_forward_hook(
        lambda module, arguments, output: output + v
    )
    opened.probe_gradient(useful_loss, batches, [v])
    handle.remove()
    note("probe")
    if rank == 0:
        (folder / "trace.json").write_text(json.dumps({"passes": found, "most": watched.most}))


@pytest.mark.parametrize("checkpointing", ["", "inside", "around"])
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_the_next_layer_is_on_its_way_while_one_works(tmp_path, engine, checkpointing):
    spawn(2, trace, tmp_path, engine, checkpointing)
    found = json.loads((tmp_path / "trace.json").read_text())
    assert found["most"] == 2
    for name, events in found["passes"].items():
        for number in range(1 if name == "first" else 0, LAYERS):
            turn = events.index(["work", number])
            gathers = [at for at, event in enumerate(events) if event == ["gather", number]]
            ahead = events.index(["work", number - 1]) if number else turn
            before = [at for at in gathers if at < turn]
            # the first two are there from the pass before, which ended with them
            assert (before and before[0] < ahead) or (not before and number < 2), (name, events)
            assert not before or before[0] < events.index(["wait", number]) < turn, (name, events)
    for name in ("first", "second"):
        events = found["passes"][name]
        backward = events[events.index(["work", LAYERS - 1]) :]
        again = [event[1] for event in backward[1:] if event[0] == "work"]
        assert again == (list(reversed(range(LAYERS))) if checkpointing else [])
        works = [event[1] for event in backward if event[0] == "back"]
        assert works == list(reversed(range(LAYERS)))[: len(works)] and len(works) >= LAYERS - 1
        for number in range(LAYERS - 3, -1, -1):
            asked = backward.index(["gather", number])
            assert asked < backward.index(["back", number + 1]), (number, events)
    gathered = [event for event in found["passes"]["second"] if event[0] == "gather"]
    assert len(gathered) == 2 * LAYERS - 4
    probed = found["passes"]["probe"]
    turn = probed.index(["work", LAYERS - 1])
    assert ["gather", 1] not in probed[turn:], "backward went below the lowest probe"


def stay(rank: int, folder: Path, engine: str) -> None:
    train, module = adapted(engine)
    opened = open_engine(module, train.model_copy(update={"keep_gathered": True}))
    kept_some = open_engine(adapted(engine)[1], train, kept=3)
    none_kept = open_engine(adapted(engine)[1], train)
    batches = StepBatches(rank, 2).useful(0)
    watched = [Trace(kept_some), Trace(opened)]
    gradients = [
        one.gradient(useful_loss, batches)[1]
        for one in (none_kept, kept_some, opened)
        for _ in range(2)
    ]
    same = [
        all(torch.equal(a, b) for a, b in zip(gradient, gradients[0], strict=True))
        for gradient in gradients
    ]
    if rank == 0:
        events = [[event[1] for event in one.events if event[0] == "gather"] for one in watched]
        found = {"same": same, "gathered": events, "most": [one.most for one in watched]}
        (folder / "found.json").write_text(json.dumps(found))


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_layers_that_are_kept_are_gathered_once(tmp_path, engine):
    spawn(2, stay, tmp_path, engine)
    found = json.loads((tmp_path / "found.json").read_text())
    some, every = found["gathered"]
    assert all(found["same"]) and found["most"] == [3 + 2, LAYERS]
    assert sorted(every) == list(range(LAYERS))
    assert sorted(number for number in some if number < 3) == [0, 1, 2]
    assert len(some) > 2 * LAYERS


def of_activations(engine):
    """A loss of what comes out of a middle layer, and of nothing else."""

    def loss(module, batch):
        seen = []
        layer = decoder_layers(module)[3]
        handle = layer.register_forward_hook(lambda _m, _a, output: seen.append(output))
        useful_loss(module, batch)
        handle.remove()
        return seen[0].square().mean()

    return loss


def middle(rank: int, folder: Path, engine: str) -> None:
    train, module = adapted(engine)
    opened, batches = open_engine(module, train), StepBatches(rank, 2).useful(0)
    found = {
        "middle": opened.gather(opened.gradient(of_activations(opened), batches)[1]),
        "after": opened.gather(opened.gradient(useful_loss, batches)[1]),
    }
    if rank == 0:
        torch.save(found, folder / "found.pt")


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_loss_of_activations_alone_has_its_gradient(tmp_path, engine):
    spawn(2, middle, tmp_path, engine)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    alone = open_engine(*reversed(adapted("single")))
    shares = [batch for rank in (0, 1) for batch in StepBatches(rank, 2).useful(0)]
    for name, loss in (("middle", of_activations(alone)), ("after", useful_loss)):
        expected = alone.gather(alone.gradient(loss, shares)[1])
        away = sum((found[name][key] - value).square().sum() for key, value in expected.items())
        size = sum(value.square().sum() for value in expected.values())
        assert away < 1e-10 * size, name


def keep(rank: int, folder: Path, engine: str) -> None:
    train, module = adapted(engine)
    expected = {
        name: p.detach().clone()
        for name, p in module.named_parameters()
        if not p.requires_grad and ".layers." in name
    }
    opened = open_engine(module, train)
    same = {name: torch.equal(weight, expected[name]) for name, weight in opened.frozen.gathered()}
    layers = opened.frozen.layers
    held = opened.sum_over_ranks(torch.tensor(float(sum(layer.part.nbytes for layer in layers))))
    if rank == 0:
        found = {
            "same": same,
            "named": sorted(expected),
            "seen": [name for name, p in opened.module.named_parameters() if not p.requires_grad],
            "bytes": held.item(),
            "all": sum(p.nbytes for p in expected.values()),
            "whole": sum(layer.is_whole for layer in layers),
        }
        (folder / "found.json").write_text(json.dumps(found))


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_each_rank_keeps_its_part_and_the_engine_sees_the_rest(tmp_path, engine):
    spawn(2, keep, tmp_path, engine)
    found = json.loads((tmp_path / "found.json").read_text())
    assert sorted(found["same"]) == found["named"] and all(found["same"].values())
    assert not any(".layers." in name for name in found["seen"]) and len(found["seen"]) == 3
    assert found["all"] <= found["bytes"] <= found["all"] + 2 * 64 * LAYERS
    assert found["whole"] <= 2


def alone(rank: int, folder: Path) -> None:
    _, module = adapted("fsdp2")
    blocks = decoder_layers(module)
    shared = blocks[0].mlp.gate_proj.weight
    blocks[1].mlp.gate_proj.weight = shared
    before = [block.self_attn.o_proj.weight.detach().clone() for block in blocks]
    kept = frozen_layers.FrozenLayers(module, blocks, Sources(), torch.device("cpu"))
    places = [block.mlp.gate_proj.weight for block in blocks[:2]]
    whole = dict(kept.gathered())
    found = {
        "gathered": len(whole) == sum(len(layer.weights) for layer in kept.layers),
        "shared stays": all(p is shared for p in places) and isinstance(shared, nn.Parameter),
        "same": all(
            torch.equal(block.self_attn.o_proj.weight, value)
            for block, value in zip(blocks, before, strict=True)
        ),
        "no hooks": not any(block._forward_pre_hooks or block._forward_hooks for block in blocks),
        "no copy": all(
            weight.untyped_storage().data_ptr() == layer.part.data_ptr()
            for layer in kept.layers
            for weight in layer.weights
        ),
    }
    (folder / "found.json").write_text(json.dumps(found))


def test_one_rank_fetches_nothing_and_what_layers_share_stays(tmp_path):
    spawn(1, alone, tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(found.values()), found
