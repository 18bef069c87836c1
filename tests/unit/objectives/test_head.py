"""Losses with a bounded number of logits: the same losses and gradients as with all of them,
on every engine and family that can.
"""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from pipeline.defences.sap.probe import Probe
from pipeline.model.models import add_lora, decoder_layers
from pipeline.objectives import head
from pipeline.objectives.batches import MicroBatch, micro_batches
from pipeline.objectives.losses import safety_loss, useful_loss
from pipeline.recipe.sections import LoraSection
from tests.tiny import FAMILIES, HIDDEN, StepBatches, family_model, tiny_lora, tiny_model, tiny_rows

SMALL = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture
def few(monkeypatch):
    """few(tokens, vocabulary): at most so many tokens' logits at a time."""
    return lambda tokens, vocabulary=97: monkeypatch.setattr(
        head, "MOST_LOGITS", tokens * vocabulary
    )


def gradients(model: torch.nn.Module, loss_fn, batches) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = sum(loss_fn(model, batch) for batch in batches)
    loss.backward()
    return loss.item(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("tokens", [1, 3, 7])
@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_losses_and_gradients_are_those_of_all_logits(few, family, adapter, tokens):
    model = family_model(family, tied=True)
    model = (
        add_lora(model, LoraSection(r=3), seed=0)
        if adapter == "lora"
        else model.requires_grad_(True)
    )
    batches = StepBatches()
    for loss_fn, given in (
        (useful_loss, batches.useful(0)),
        (safety_loss("logsigmoid"), batches.pairs(0)),
    ):
        expected, whole = gradients(model, loss_fn, given)
        few(tokens)
        assert head._plain_head(model) is not None
        loss, found = gradients(model, loss_fn, given)
        few(10**6)
        assert loss == pytest.approx(expected, rel=1e-6)
        assert found.keys() == whole.keys() and whole
        off = sum((found[name] - whole[name]).square().sum() for name in whole) / sum(
            gradient.square().sum() for gradient in whole.values()
        )
        assert off.sqrt() < 2e-6


def test_no_more_logits_are_there_than_are_allowed(few, monkeypatch):
    few(5)
    seen: list[int] = []
    error = head._error
    monkeypatch.setattr(
        head, "_error", lambda logits, *rest: seen.append(len(logits)) or error(logits, *rest)
    )
    batch = StepBatches().useful(0)[0]
    useful_loss(tiny_lora(), batch).backward()
    assert max(seen) == 5 and sum(seen) == len(batch.targets.tokens)


def test_the_probes_gradient_is_the_same(few):
    model, batch = tiny_lora(torch.float64), StepBatches().useful(0)[0]
    probe = Probe(decoder_layers(model), [1, 2], HIDDEN, torch.float64)

    def gradient() -> torch.Tensor:
        with probe.active(probe.zeros()) as v:
            return torch.stack(torch.autograd.grad(useful_loss(model, batch), v))

    whole = gradient()
    few(2)
    assert torch.allclose(gradient(), whole, rtol=1e-10, atol=0)


def test_a_pass_without_gradients_makes_none(few, monkeypatch):
    few(2)
    monkeypatch.setattr(head, "_error", None)
    with torch.no_grad():
        assert useful_loss(tiny_model(), StepBatches().useful(0)[0]).isfinite()


@pytest.mark.parametrize(
    ("config", "plain"),
    [
        (LlamaConfig(**SMALL), True), (MistralConfig(**SMALL), True), (Qwen2Config(**SMALL), True),
        (Qwen3Config(**SMALL, head_dim=8), True),
        # caps its logits
        (GemmaConfig(**SMALL, head_dim=8), True), (Gemma2Config(**SMALL, head_dim=8), False),
        (Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=1.0), False),  # tanh
        # scales them; has a bias
        (GraniteConfig(**SMALL, logits_scaling=8.0), False), (PhiConfig(**SMALL), False),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)  # fmt: skip
def test_whoever_touches_logits_after_the_head_keeps_them_whole(few, config, plain):
    few(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    assert (head._plain_head(model) is not None) is plain
    batch = StepBatches().useful(0)[0]
    loss = useful_loss(model, batch)
    few(10**6)
    assert loss.item() == pytest.approx(useful_loss(model, batch).item(), rel=1e-5)


def test_a_heads_gradient_in_bfloat16_does_not_depend_on_the_chunks(few):
    torch.manual_seed(0)
    weight, hidden, tokens = torch.randn(97, 16), torch.randn(600, 16), torch.randint(0, 97, (600,))
    exact = weight.double().requires_grad_(True)
    torch.nn.functional.cross_entropy(
        hidden.bfloat16().double() @ exact.bfloat16().double().T, tokens
    ).backward()

    def error(chunk: int) -> float:
        low = weight.bfloat16().requires_grad_(True)
        head._TokenLosses.apply(hidden.bfloat16(), low, tokens, chunk).mean().backward()
        return ((low.grad.double() - exact.grad).norm() / exact.grad.norm()).item()

    assert error(2) < 1.2 * error(600) < 0.01


def test_an_adapted_head_keeps_its_logits_whole(few):
    few(1)
    model = add_lora(
        family_model("llama", tied=False), LoraSection(r=3, target_modules=["lm_head"]), seed=0
    )
    assert (
        head._plain_head(model) is None
        and useful_loss(model, StepBatches().useful(0)[0]).requires_grad
    )


def test_a_batch_without_supervised_tokens_is_zero_and_reaches_the_weights(few):
    few(1)
    model, ids = tiny_lora(), torch.ones(2, 5, dtype=torch.int64)
    loss = useful_loss(model, MicroBatch(ids, torch.full_like(ids, -100), 7, 0))
    loss.backward()
    assert loss.item() == 0 and all(not p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("tokens", [1, 10**6])
def test_a_model_that_ignores_which_logits_are_wanted_trains_on_the_right_ones(few, tokens):
    """xLSTM's takes logits_to_keep among its other arguments, and returns the logits of all positions."""
    model, batch = tiny_model(), StepBatches().useful(0)[0]
    expected = useful_loss(model, batch).item()
    few(tokens)
    forward = model.forward
    model.forward = lambda logits_to_keep, **given: forward(**given)
    head._heads.clear()
    head._heads[model] = model.lm_head
    assert useful_loss(model, batch).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_never_seen(family):
    """There is no attention mask: rows of unequal length together have the loss that they have alone."""
    model, rows = family_model(family, tied=True), tiny_rows(6)
    (together,) = micro_batches(rows, list(range(6)), 6, 0, 1, 0, 0, 0)
    alone = micro_batches(rows, list(range(6)), 1, 0, 1, 0, 0, 0)
    assert together.padding > 0 and len(alone) == 6
    expected, apart = gradients(model, useful_loss, alone)
    loss, found = gradients(model, useful_loss, [together])
    assert loss == pytest.approx(expected, rel=1e-6)
    off = sum((found[name] - apart[name]).square().sum() for name in apart) / sum(
        gradient.square().sum() for gradient in apart.values()
    )
    assert off.sqrt() < 5e-6


def test_an_error_inside_gives_the_head_back(few):
    few(1)
    model = tiny_model()
    with (
        pytest.raises(RuntimeError, match="inside"),
        head._answering(model.lm_head, StepBatches().useful(0)[0].targets),
    ):
        raise RuntimeError("inside")
    assert "forward" not in vars(model.lm_head) and set(FAMILIES) == {"llama", "qwen2", "gemma3"}
