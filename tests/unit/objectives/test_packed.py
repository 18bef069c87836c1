"""Samples end to end in one row: loss, gradient and probe are those of a row for each, whatever the model's masks."""

import dataclasses
import inspect

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel, masking_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pipeline.defences.sap.probe import Probe
from pipeline.defences.sap.section import SapSection
from pipeline.defences.sap.step import SapStep
from pipeline.engines.open import open_engine
from pipeline.model.models import decoder_layers, enable_checkpointing
from pipeline.model.packable import PACKABLE, check_packing
from pipeline.objectives import head
from pipeline.objectives.batches import BatchOrder, MicroBatch, micro_batches
from pipeline.objectives.losses import useful_loss
from pipeline.objectives.packed import row_arguments, rows_hold
from pipeline.recipe.sections import TrainSection
from tests.tiny import (
    FAMILIES,
    VOCABULARY,
    StepBatches,
    family_model,
    tiny_lora,
    tiny_model,
    tiny_rows,
)

ROWS, BUDGET = tiny_rows(24, seed=3, longest=20), 60
for _row in ROWS[::3]:
    # supervised from the first token on, which has nobody to foretell it
    _row["labels"] = _row["input_ids"]
# Of configs of all families, what each has of it: small, windows shorter than samples, positions for a sample but not
# for a packed row, no dropout.
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "sliding_window": 6,
    "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 32, "n_inner": 48, "rotary_dim": 4, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "query_pre_attn_scalar": 8,
    "shared_expert_intermediate_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def model_of(kind: str, attention: str = "eager") -> PreTrainedModel:
    """A small random model of a type, with one layer at least of each kind that the type's own config has."""
    config_class = CONFIG_MAPPING[kind]
    default = config_class()
    own = {key: value for key, value in SIZES.items() if hasattr(default, key)}
    if getattr(default, "layer_types", None):
        own["layer_types"] = (list(dict.fromkeys(default.layer_types)) * 4)[:4]
    config = config_class(**own)
    for name in (
        name
        for name, value in vars(config).items()
        if ("drop" in name) and isinstance(value, float)
    ):
        setattr(config, name, 0.0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.train()


def cut(packing: bool, rows: list[dict] = ROWS, count: int = 8) -> list[MicroBatch]:
    """A step's micro-batches: packed, or a row for each sample."""
    indices = BatchOrder(len(rows), count, 0).step(0)
    return micro_batches(
        rows, indices, 1, 0, 1, 0, 0, 0, BUDGET if packing else None, packing=packing
    )


def gradient(model: torch.nn.Module, batches: list[MicroBatch]) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = useful_loss(model, batch)
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def as_one_sample(batch: MicroBatch) -> MicroBatch:
    """The same row, of which nobody says that it holds several."""
    told = batch.packed and dataclasses.replace(
        batch.packed, samples=torch.zeros_like(batch.packed.samples)
    )
    return dataclasses.replace(batch, packed=told)


def check_alike(model: torch.nn.Module, rows: list[dict] = ROWS, bound: float = 2e-5) -> None:
    """Packed as unpacked, and not as rows of several samples that see each other."""
    packed = cut(True, rows)
    assert len(packed) < len(rows) and any(batch.packed for batch in packed)
    (expected, whole), (loss, found) = gradient(model, cut(False, rows)), gradient(model, packed)
    assert loss == pytest.approx(expected, rel=bound)
    assert (found - whole).norm() / whole.norm() < bound
    _, mixed = gradient(model, [as_one_sample(batch) for batch in packed])
    assert (mixed - whole).norm() / whole.norm() > 1e-2, "what packing prevents would be seen"


@pytest.mark.parametrize("kind", sorted(PACKABLE))
def test_every_packable_type_keeps_samples_apart(kind):
    check_alike(model_of(kind))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_those_of_a_row_for_each_sample(family, attention, checkpointing):
    model = family_model(family, tied=True)
    model.set_attn_implementation(attention)
    if checkpointing:
        enable_checkpointing(model)
    check_alike(model)


@pytest.mark.parametrize("make", [tiny_model, tiny_lora])
def test_in_float64_nothing_but_rounding_is_left(make):
    check_alike(make(torch.float64), bound=1e-12)


def test_a_chunk_of_logits_at_a_time(monkeypatch):
    monkeypatch.setattr(head, "MOST_LOGITS", 3 * VOCABULARY)
    check_alike(tiny_model(torch.float64), bound=1e-12)


@pytest.mark.parametrize("window", [None, 6], ids=["whole", "window"])
def test_kernels_for_samples_of_any_length_are_told_where_each_begins(window, monkeypatch):
    """FlashAttention is not on a CPU: attention that knows nothing but the borders stands in for it."""
    seen = []

    def by_borders(
        module, query, key, value, attention_mask, scaling=None, sliding_window=None, **given
    ):
        borders = given.get("cu_seq_lens_q")
        seen.append(
            attention_mask is None
            and borders is not None
            and given["max_length_q"] == borders.diff().max()
        )
        length = query.shape[2]
        places = torch.arange(length)
        sample = (
            torch.zeros(length) if borders is None else torch.bucketize(places, borders, right=True)
        )
        apart = places[:, None] - places
        mask = (sample[:, None] == sample) & (apart >= 0) & (apart < (sliding_window or length))
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("flash_stand_in", by_borders)
    model = family_model("gemma3" if window else "llama", tied=True)
    assert getattr(model.config, "sliding_window", None) == window
    expected, whole = gradient(model, cut(False))
    model.config._attn_implementation = "flash_stand_in"
    loss, found = gradient(model, cut(True))
    assert (
        loss == pytest.approx(expected, rel=1e-5) and (found - whole).norm() / whole.norm() < 2e-5
    )
    assert seen and all(seen)


def test_other_attention_is_given_positions_alone():
    (batch, *_) = cut(True)
    assert row_arguments(tiny_model(), batch.input_ids, None) == {}
    assert list(row_arguments(tiny_model(), batch.input_ids, batch.packed)) == ["position_ids"]
    assert (
        batch.packed.borders.dtype == torch.int32
        and batch.packed.borders[-1] == batch.input_ids.numel()
    )


@pytest.mark.parametrize("schedule", ["exact", "lagged"])
def test_sap_finds_the_same_probe_and_gradient(schedule):
    """Three steps with their passes at perturbed weights; V is added at every token,
    and its gradient summed over them.
    """

    def trained(packing: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model = tiny_lora(torch.float64)
        engine = open_engine(model, TrainSection(engine="single", steps=3))
        section = SapSection(
            enabled=True, schedule=schedule, probe_step="rms", noise_every=2, correction_every=2
        )
        step = SapStep(
            engine,
            Probe(decoder_layers(model), [1, 2], model.config.hidden_size, torch.float64),
            section,
        )
        batches = StepBatches(
            micro_batch_size=1, token_budget=60 if packing else None, packing=packing
        )
        for number in range(3):
            step(batches.useful(number), lambda number=number: batches.pairs(number), number)
            engine.step(1e-2)
        return step.v, torch.cat(engine.weights())

    (v, weights), (other_v, other_weights) = trained(False), trained(True)
    assert v.any() and (other_v - v).norm() / v.norm() < 1e-9
    assert (other_weights - weights).norm() / weights.norm() < 1e-9


def test_no_sample_foretells_the_next_ones_first_token():
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    (batch,) = micro_batches(rows, [0, 1], 1, 0, 1, 0, 0, 0, 10, packing=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]] and batch.labels.tolist() == [
        [-100, 6, 7, -100, 9]
    ]
    assert batch.targets.columns.tolist() == [0, 1, 3] and batch.targets.tokens.tolist() == [
        6,
        7,
        9,
    ]
    assert batch.packed.positions.tolist() == [
        [0, 1, 2, 0, 1]
    ] and batch.packed.samples.tolist() == [[0, 0, 0, 1, 1]]
    assert batch.packed.borders.tolist() == [0, 3, 5] and batch.packed.longest == 3
    assert batch.global_tokens == 3 and batch.padding == 0


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 30])
def test_every_sample_is_in_one_row_and_every_rank_has_as_many_passes(ranks):
    indices = BatchOrder(len(ROWS), 24, 5).step(2)
    shares = [
        micro_batches(ROWS, indices, 1, rank, ranks, 0, 0, 2, BUDGET, packing=True)
        for rank in range(ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    batches = [batch for share in shares for batch in share]
    assert all(batch.input_ids.numel() <= BUDGET and batch.padding == 0 for batch in batches)
    found = []
    for batch in batches:
        lengths = (
            [batch.input_ids.numel()]
            if batch.packed is None
            else batch.packed.borders.diff().tolist()
        )
        samples = zip(
            batch.input_ids[0].split(lengths), batch.labels[0].split(lengths), strict=True
        )
        # a filler has no labels
        found += [ids.tolist() for ids, labels in samples if (labels != -100).any()]
    assert sorted(found) == sorted(ROWS[i]["input_ids"] for i in indices)
    model = tiny_model(torch.float64)
    alone = micro_batches(ROWS, indices, 1, 0, 1, 0, 0, 2)
    assert (gradient(model, batches)[1] - gradient(model, alone)[1]).norm() / gradient(
        model, alone
    )[1].norm() < 1e-12


def test_a_transformers_without_the_question_packs_nothing(monkeypatch):
    monkeypatch.delattr(masking_utils, "find_packed_sequence_indices")
    model, (packed, *_) = tiny_model(), cut(True)
    with rows_hold(None):
        pass
    with pytest.raises(
        ValueError,
        match=r"has no masking_utils.find_packed_sequence_indices.*train.packing to false",
    ):
        useful_loss(model, packed)


PACKED = TrainSection(steps=1, tokens_per_micro_batch=4096, packing=True)
YARN = {"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
LONG = {
    "model_type": "phi3",
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"type": "longrope"},
}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "mamba2"}, "is of the type 'mamba2', for which it was not shown"),
        ({"model_type": "opt"}, "is of the type 'opt', for which it was not shown"),
        ({"model_type": "bloom"}, "is of the type 'bloom', for which it was not shown"),
        (
            {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
            "has layers of the type 'conv'",
        ),
        (
            {"model_type": "qwen3_next", "layer_types": ["linear_attention"]},
            "has layers of the type 'linear_attention'",
        ),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
            "is of the type 'gemma3'",
        ),
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            "has attention in both directions",
        ),
        ({"model_type": "llama", "alibi": True}, "has attention biases by distance"),
        (LONG | {"max_position_embeddings": 131072}, "turns positions by the longest sample"),
    ],
)
def test_what_would_touch_is_refused_in_one_sentence(config, said):
    with pytest.raises(ValueError) as caught:
        check_packing(config, "align.train", PACKED, 8192, "model.path m")
    text = str(caught.value)
    assert (
        text.startswith("align.train.packing is true, but model.path m ")
        and said in text
        and "\n" not in text
    )
    assert text.endswith("set align.train.packing to false")
    check_packing(
        config, "train", PACKED.model_copy(update={"packing": False}), 8192, "model.path m"
    )


@pytest.mark.parametrize(
    "config", [YARN, LONG, {"model_type": "qwen3", "layer_types": ["sliding_attention"]}]
)
def test_what_keeps_apart_is_not(config):
    check_packing(config, "train", PACKED, 4096, "model.path m")


def test_packing_needs_to_know_how_much():
    with pytest.raises(
        ValueError, match="packing is true, and tokens_per_micro_batch does not say"
    ):
        TrainSection(steps=1, packing=True)


def test_the_names_given_to_flash_attention_are_transformers_own():
    from transformers.modeling_flash_attention_utils import _flash_attention_forward

    known = inspect.signature(_flash_attention_forward).parameters
    model, (batch, *_) = tiny_model(), cut(True)
    model.config._attn_implementation = "flash_attention_2"
    given = row_arguments(model, batch.input_ids, batch.packed)
    assert len(given) == 5 and given.keys() <= known.keys()
    alone = row_arguments(model, batch.input_ids, None)
    assert alone.keys() == given.keys() - {"position_ids"}
    length = batch.input_ids.shape[1]
    assert alone["cu_seq_lens_q"].tolist() == [0, length] and alone["max_length_k"] == length
    assert row_arguments(model, batch.input_ids.repeat(2, 1), None) == {}, "rows of one length each"
