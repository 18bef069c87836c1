"""The companion methods as any engine trains them, and the same by hand:
one process, whole batches, float64, nothing of the product.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from pipeline.defences.ema.average import Ema
from pipeline.defences.making import make_step
from pipeline.defences.recipes import recipe_class
from pipeline.engines.engine import Engine
from pipeline.objectives.batches import BatchOrder
from pipeline.recipe.recipe import Recipe
from tests.tiny import StepBatches, tiny_lora, tiny_model

LR, STEPS, FULL_EPS = 1e-2, 7, 1e-3
PAIRS = {"safety_pairs": {"micro_batch_size": 1, "refresh_every": 2}}
METHODS = {
    "plain": {},
    "safe_mix": PAIRS | {"safe_mix": {"enabled": True}},
    "safety_gradient": PAIRS | {"safety_gradient": {"enabled": True, "correction": 0.6}},
    "lisa": PAIRS | {"lisa": {"enabled": True, "alignment_steps": 1, "task_steps": 2, "rho": 3.0}},
    "shadow": {"ema": {"enabled": True, "decay": 0.7, "warmup_steps": 2, "every": 2}},
    "momentum": {"ema": {"enabled": True, "mode": "momentum", "decay": 0.7, "every": 2}},
}


def recipe_of(**sections) -> Recipe:
    source = {"source": "x"}
    base = {
        "name": "t",
        "model": {"path": "x"},
        "data": {"task": source, "safety": source},
        "train": {"steps": STEPS},
        "evaluate": {"harmful": source},
    }
    return recipe_class().model_validate(base | sections)


def train(engine: Engine, method: str) -> dict[str, torch.Tensor]:
    """The weights that count after STEPS steps on this engine, whole, on rank 0."""
    recipe, batches = recipe_of(**METHODS[method]), StepBatches(engine.rank, engine.world_size)
    step, ema = make_step(recipe, engine), Ema(engine, recipe.ema) if recipe.ema.enabled else None
    for number in range(STEPS):
        step(batches.useful(number), lambda n=number: batches.pairs(n), number)
        engine.step(LR)
        if ema:
            ema.updated(number + 1)
    if ema is None:
        return engine.gather(engine.weights())
    before = engine.weights()
    with ema.weights():
        averaged = engine.gather(engine.weights())
    assert all(map(torch.equal, before, engine.weights()))
    return averaged


class Dense:
    """One method, written once more."""

    def __init__(self, method: str, full: bool = False):
        """full: of all weights, with an adam_eps at which AdamW does not amplify rounding (docs/correctness.md)."""
        self.model, self.settings = (
            (tiny_model().train() if full else tiny_lora()).double(),
            METHODS[method],
        )
        self.named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.weights = list(self.named.values())
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=LR, eps=FULL_EPS if full else 1e-8, weight_decay=0.0, foreach=False
        )
        self.batches, self.last = StepBatches(), self.copy()
        self.average = self.copy()

    def copy(self) -> list[torch.Tensor]:
        return [w.detach().clone() for w in self.weights]

    def sequence(self, ids: list[int], labels: list[int]) -> tuple[torch.Tensor, int]:
        logits, targets = (
            self.model(input_ids=torch.tensor([ids])).logits[0][:-1],
            torch.tensor(labels[1:]),
        )
        return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"), int(
            (targets != -100).sum()
        )

    def useful(self, sequences: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        parts = [self.sequence(*sequence) for sequence in sequences]
        return sum(loss for loss, _ in parts) / sum(count for _, count in parts)

    def side(self, number: int, side: str) -> list[tuple[list[int], list[int]]]:
        pairs = [
            self.batches.pair_rows[i]
            for i in BatchOrder(len(self.batches.pair_rows), 4, 0).step(number)
        ]
        return [(pair[f"{side}_input_ids"], pair[f"{side}_labels"]) for pair in pairs]

    def gradient(self, number: int) -> list[torch.Tensor]:
        rows = [self.batches.rows[i] for i in BatchOrder(len(self.batches.rows), 8, 0).step(number)]
        task = [(row["input_ids"], row["labels"]) for row in rows]
        if "safe_mix" in self.settings and number % 2 == 0:
            task += self.side(number, "chosen")
        if "lisa" in self.settings:
            return self.lisa(number, task)
        gradient = list(torch.autograd.grad(self.useful(task), self.weights))
        if "safety_gradient" in self.settings:
            if number % 2 == 0:
                margins = [
                    s[0] / s[1] - r[0] / r[1]
                    for s, r in zip(
                        *(
                            [self.sequence(*row) for row in self.side(number, side)]
                            for side in ("chosen", "rejected")
                        ),
                        strict=True,
                    )
                ]
                self.direction = torch.autograd.grad(
                    sum(torch.log1p(torch.exp(m)) for m in margins) / len(margins), self.weights
                )
            weight = 0.6 * norm(gradient) / norm(self.direction)
            gradient = [g + weight * d for g, d in zip(gradient, self.direction, strict=True)]
        return gradient

    def lisa(self, number: int, task: list) -> list[torch.Tensor]:
        if number % 3 < 2:  # steps 0, 3, 6 align; 1, 2, 4, 5 are the task's
            self.last = self.copy()
        loss = self.useful(self.side(number, "chosen") if number % 3 == 0 else task)
        loss = loss + 3.0 / 2 * sum(
            (w - last).square().sum() for w, last in zip(self.weights, self.last, strict=True)
        )
        return list(torch.autograd.grad(loss, self.weights))

    def train(self) -> dict[str, torch.Tensor]:
        for number in range(STEPS):
            gradient = self.gradient(number)
            factor = 1 / max(1.0, norm(gradient) + 1e-6)
            for w, g in zip(self.weights, gradient, strict=True):
                w.grad = g * factor
            self.optimizer.step()
            self.averaging(number + 1)
        ends = self.average if self.settings.get("ema", {}).get("warmup_steps") else self.copy()
        return dict(zip(self.named, ends, strict=True))

    def averaging(self, done: int) -> None:
        section = self.settings.get("ema")
        if section is None:
            return
        start = section.get("warmup_steps", 0)
        if done == start:
            self.average = self.copy()
        if done > start and (done - start) % 2 == 0:
            self.average = [
                0.7 * a + 0.3 * w.detach() for a, w in zip(self.average, self.weights, strict=True)
            ]
            if section.get("mode") == "momentum":
                with torch.no_grad():
                    for w, a in zip(self.weights, self.average, strict=True):
                        w.copy_(a)


def norm(vector) -> float:
    return math.sqrt(sum(t.square().sum().item() for t in vector))


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return norm([a[name].double() - b[name].double() for name in a])
