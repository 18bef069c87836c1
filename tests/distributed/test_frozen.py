"""Frozen layers: each rank keeps its part, a layer is on its way while the one before it is at work, two are whole at
the most, and what engines see of the model is the rest.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.engines import frozen as frozen_layers
from pipeline.engines.open import init_distributed, open_engine
from pipeline.model.models import decoder_layers, make_trainable
from pipeline.model.weights import Sources
from pipeline.objectives.losses import useful_loss
from pipeline.recipe.sections import LoraSection, TrainSection
from tests.distributed.ranks import spawn
from tests.tiny import StepBatches

LAYERS = 6
CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def adapted(engine: str, checkpointing: bool = False) -> tuple[TrainSection, torch.nn.Module]:
    train = TrainSection(
        steps=1, engine=engine, batch_size=8, micro_batch_size=2, gradient_checkpointing=checkpointing,
        lora=LoraSection(r=3, target_modules=["q_proj", "v_proj"]),
        ds_config=Path("ds_configs/zero3_cpu.json"),
    )  # fmt: skip
    init_distributed(train)
    torch.manual_seed(0)
    return train, make_trainable(LlamaForCausalLM(CONFIG), train, seed=0)


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
            block.mlp.register_forward_hook(
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


def trace(rank: int, folder: Path, engine: str, checkpointing: bool) -> None:
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


@pytest.mark.parametrize("checkpointing", [False, True])
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
    for gradient in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradient, gradients[0], strict=True))
    some, every = (
        [event[1] for event in one.events if event[0] == "gather"] for one in watched
    )  # fmt: skip
    assert sorted(every) == list(range(LAYERS)) and watched[1].most == LAYERS
    assert sorted(number for number in some if number < 3) == [0, 1, 2]
    assert len(some) > 2 * LAYERS and watched[0].most == 3 + 2
    if rank == 0:
        (folder / "done").touch()


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_layers_that_are_kept_are_gathered_once(tmp_path, engine):
    spawn(2, stay, tmp_path, engine)
    assert (tmp_path / "done").exists()


def keep(rank: int, folder: Path, engine: str) -> None:
    train, module = adapted(engine)
    expected = {
        name: p.detach().clone()
        for name, p in module.named_parameters()
        if not p.requires_grad and ".layers." in name
    }
    numel = sum(p.numel() for p in expected.values())
    opened = open_engine(module, train)
    for name, weight in opened.frozen.gathered():
        assert torch.equal(weight, expected.pop(name)), name
    assert not expected
    seen = {name for name, p in opened.module.named_parameters() if not p.requires_grad}
    assert not any(".layers." in name for name in seen) and len(seen) == 3, seen
    parts = opened.sum_over_ranks(
        torch.tensor(float(sum(layer.part.nbytes for layer in opened.frozen.layers)))
    )
    assert 4 * numel <= parts.item() <= 4 * numel + 2 * 64 * LAYERS, (parts, numel)
    whole = [layer for layer in opened.frozen.layers if layer.is_whole]
    assert len(whole) <= 2
    if rank == 0:
        (folder / "done").touch()


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_each_rank_keeps_its_part_and_the_engine_sees_the_rest(tmp_path, engine):
    spawn(2, keep, tmp_path, engine)
    assert (tmp_path / "done").exists()


def alone(rank: int, folder: Path) -> None:
    _, module = adapted("fsdp2")
    blocks = decoder_layers(module)
    shared = blocks[0].mlp.gate_proj.weight
    blocks[1].mlp.gate_proj.weight = shared
    before = [block.self_attn.o_proj.weight.detach().clone() for block in blocks]
    kept = frozen_layers.FrozenLayers(module, blocks, Sources(), torch.device("cpu"))
    assert blocks[0].mlp.gate_proj.weight is shared is blocks[1].mlp.gate_proj.weight
    assert isinstance(shared, torch.nn.Parameter)
    for block, value in zip(blocks, before, strict=True):
        assert torch.equal(block.self_attn.o_proj.weight, value)
        assert not block._forward_pre_hooks and not block._forward_hooks
    for layer in kept.layers:
        start, size = layer.part.data_ptr(), layer.part.nbytes
        assert all(start <= w.data_ptr() < start + size for w in layer.weights)
    (folder / "done").touch()


def test_one_rank_fetches_nothing_and_what_layers_share_stays(tmp_path):
    spawn(1, alone, tmp_path)
    assert (tmp_path / "done").exists()
