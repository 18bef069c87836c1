"""What ranks tell each other beside weights and gradients, as JSON:
torch's collectives of objects unpickle what another rank sends.

number = from_first(number)          # rank 0's, on every rank
sentences = of_every_rank(sentence)  # in the order of ranks
with leaving_together():             # an error of one rank's disk is all ranks' error, at once
    write_file_of_this_rank()
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from pipeline.system.system_errors import behind, from_parts, parts


def from_first(value: Any) -> Any:
    """Rank 0's value, of JSON, on every rank. A collective call; the value itself where no ranks have met."""
    if not dist.is_initialized():
        return value
    text = _tensor(value) if dist.get_rank() == 0 else None
    length = torch.tensor(0 if text is None else len(text), device=_device())
    dist.broadcast(length, 0)
    sent = (
        torch.empty(int(length.item()), dtype=torch.uint8, device=_device())
        if text is None
        else text
    )
    dist.broadcast(sent, 0)
    return _value(sent)


def of_every_rank(value: Any) -> list[Any]:
    """All ranks' values, of JSON, on every rank. A collective call; the value alone where no ranks have met."""
    if not dist.is_initialized():
        return [value]
    text = _tensor(value)
    own = torch.tensor([len(text)], device=_device())
    lengths = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, own)
    counts = [int(length.item()) for length in lengths]
    padded = torch.zeros(max(counts), dtype=torch.uint8, device=_device())
    padded[: len(text)] = text
    texts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(texts, padded)
    return [_value(found[:count]) for found, count in zip(texts, counts, strict=True)]


@contextlib.contextmanager
def leaving_together() -> Iterator[None]:
    """Inside the block, in which no rank may wait for another, an error of the system on one is
    raised on all at its end.

    Else those that met none would wait in the next collective for one that is about to leave, and nobody would say why
    for half a minute. A collective call. Where several ranks meet one, each raises its own, and those that met none the
    first's.
    """
    met = None
    try:
        yield
    except Exception as error:
        met = behind(error)
        if met is None:
            raise
    told = next(
        (found for found in of_every_rank(None if met is None else parts(met)) if found), None
    )
    if told is not None:
        raise met or from_parts(told)


def _tensor(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(_device())


def _value(text: torch.Tensor) -> Any:
    return json.loads(bytes(text.cpu().numpy()))


def _device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
