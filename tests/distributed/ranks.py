"""Local processes as the ranks of one process group: spawn(2, main, "argument") calls main(rank,
"argument") in each of two.

They are forked from a process that has imported what they need and done nothing else, so that a rank starts in no time,
and clean, whatever this process has computed. The first that spawns starts it; it lives as long as this process.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pipeline.running import entry


def spawn(ranks: int, main: Callable[..., None], *arguments: Any) -> None:
    """Returns when all are done; raises what torch.multiprocessing raises where one fails, after ending the others.

    main joins the process group itself, if it needs one. It must be a module's function.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(["tests.distributed.imported"])
    torch.multiprocessing.start_processes(
        _enter, (ranks, port, main, arguments), nprocs=ranks, start_method="forkserver"
    )


def _enter(
    rank: int, ranks: int, port: int, main: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in names.items()}
    torch.set_num_threads(1)
    main(rank, *arguments)
    if dist.is_initialized():
        # A rank that is gone first may abort the others' communication threads.
        dist.barrier()
        dist.destroy_process_group()
    entry.end(0)
