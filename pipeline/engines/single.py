"""One process, no sharding: the executable specification that every other engine must agree with.

engine = SingleEngine(model, torch.optim.AdamW(parameters), max_grad_norm=1.0)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.engines.autograd import AutogradEngine
from pipeline.engines.engine import ShardedVector, clip, step_counter


class SingleEngine(AutogradEngine):
    """A ShardedVector here is one flat tensor per trainable parameter, in the module's order."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float | None,
        device: torch.device | str = "cpu",
    ):
        self.device = torch.device(device)
        self.module = module.to(self.device).train()
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())

    def _gradients(self) -> ShardedVector:
        return [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.detach().flatten()
            for p in self.parameters
        ]

    def add_gradient(self, shard: ShardedVector, scale: float) -> None:
        for p, part in zip(self.parameters, shard, strict=True):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad.add_(part.view_as(p), alpha=scale)

    def weights(self) -> ShardedVector:
        return [p.detach().clone().flatten() for p in self.parameters]

    def drop_gathered(self) -> None:
        """Nothing is ever gathered."""

    def storage(self) -> list[torch.Tensor]:
        return [p.detach() for p in self.parameters]

    def step(self, lr: float, norm: float | None = None) -> None:
        if self.max_grad_norm is not None:
            clip(
                [p.grad for p in self.parameters if p.grad is not None],
                self.gradient_norm().item() if norm is None else norm,
                self.max_grad_norm,
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gathered(self, shard: ShardedVector) -> Iterator[tuple[str, torch.Tensor]]:
        for (name, p), part in zip(self.named.items(), shard, strict=True):
            yield name, part.view_as(p).cpu().clone()

    def shard(self, named: Mapping[str, torch.Tensor]) -> ShardedVector:
        return [named[name].to(p.device, p.dtype).flatten() for name, p in self.named.items()]

    def save(self, folder: Path, vectors: dict[str, ShardedVector]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {f"weight.{name}": p.detach() for name, p in self.named.items()}
        for name, p in self.named.items():
            state |= {
                f"optimizer.{key}.{name}": value for key, value in self.optimizer.state[p].items()
            }
        for key, parts in vectors.items():
            state |= {
                f"vector.{key}.{name}": part for name, part in zip(self.named, parts, strict=True)
            }
        save_file(
            {key: value.contiguous() for key, value in state.items()}, folder / "single.safetensors"
        )

    def load(self, folder: Path, vectors: Sequence[str] = ()) -> dict[str, ShardedVector]:
        state = load_file(folder / "single.safetensors", device=str(self.device))
        slots = [key.split(".")[1] for key in state if key.startswith("optimizer.")]
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(state[f"weight.{name}"])
                found = {
                    slot: state[f"optimizer.{slot}.{name}"]
                    for slot in slots
                    if f"optimizer.{slot}.{name}" in state
                }
                counted = (
                    {"step": step_counter(self.optimizer, found["step"], p)}
                    if "step" in found
                    else {}
                )
                self.optimizer.state[p] = found | counted
        return {key: [state[f"vector.{key}.{name}"] for name in self.named] for key in vectors}
