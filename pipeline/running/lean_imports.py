"""Libraries without what they import in case it is wanted: a rank starts a quarter sooner.

    import_peft()      # and engines/deepspeed_private.py's import_deepspeed

peft imports bitsandbytes, and that torch's compiler, as does deepspeed's Muon optimizer; deepspeed's autotuner
imports mlflow. None is used by way of them: pipeline/model/quantization.py and pipeline/tracking/mlflow_store.py import
their own, and nothing here is compiled.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

from pipeline.libraries import transformers_private


def import_peft() -> None:
    """Import peft, which then knows no bitsandbytes: it would serve what bitsandbytes has quantised, not ours."""
    with without("bitsandbytes"):
        import peft  # noqa: F401

        transformers_private.settle_bitsandbytes()


@contextlib.contextmanager
def without(package: str) -> Iterator[None]:
    """What is imported inside takes `package` for one that is not installed.

    Nothing is hidden where it has been imported already, nor beside other threads, which may be about to.
    """
    if package in sys.modules or threading.active_count() > 1:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # how Python's import is told that there is none
    try:
        yield
    finally:
        del sys.modules[package]


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Functions that are marked with torch.compile inside stay as they are:
    to mark one already imports the compiler.
    """
    import torch

    compiling = torch.compile
    torch.compile = lambda function=None, **_: function or (lambda other: other)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiling
