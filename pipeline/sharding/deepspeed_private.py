"""What this project needs of DeepSpeed's insides, in one place.

    with gradients_by_parameter():
        deepspeed.initialize(...)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def gradients_by_parameter() -> Iterator[None]:
    """Engines that are made inside take the gradient of each parameter of a leaf module as it comes, as elsewhere.

    DeepSpeed takes a leaf's gradients in a full backward hook on the module. It fires before they are there where the
    module's input needs no gradient (the first layer under LoRA), and leaves `grad` behind after passes that end no step.
    Raises ValueError where this version of DeepSpeed has no such distinction.
    """
    import deepspeed
    from deepspeed.runtime.zero import stage3

    leaf = getattr(stage3, "z3_leaf_parameter", None)
    if leaf is None:
        raise ValueError(f"deepspeed {deepspeed.__version__} has no z3_leaf_parameter in runtime.zero.stage3: install deepspeed 0.19.4 to 0.19.8")
    stage3.z3_leaf_parameter = lambda parameter: False
    try:
        yield
    finally:
        stage3.z3_leaf_parameter = leaf
