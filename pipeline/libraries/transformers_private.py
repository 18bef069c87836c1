"""What this project needs of the insides of transformers and peft, in one place; looked for when this is imported.

    attention_of(model.config), supports_attention(model, "sdpa"), conversions(model)

What has an underscore there, and what its documentation does not have. Where a name can be done without, as the one
that packing needs, its function says so when it is asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pipeline.libraries.needed import need

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

TRANSFORMERS, PEFT = "transformers>=5.0,<6", "peft>=0.17,<1"  # as pyproject.toml has them
# Whether a form of attention is there, by the name that from_pretrained gives it.
_FORMS = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}
_MODEL = "transformers:PreTrainedModel"
_NAMES = (
    *(f"{_MODEL}.{name}" for name in _FORMS.values()),
    f"{_MODEL}._no_split_modules",
    f"{_MODEL}._skip_keys_device_placement",
    f"{_MODEL}._keep_in_fp32_modules_strict",
    "transformers:PretrainedConfig._attn_implementation",
    "transformers.conversion_mapping:get_model_conversion_mapping",
    "transformers.core_model_loading:WeightConverter",
    "transformers.core_model_loading:rename_source_key",
    "transformers.core_model_loading:revert_weight_conversion",
)
# What masking_utils asks: position ids (B, T) -> number of each token's sample in its row (B, T), or None for one each.
_QUESTION = "find_packed_sequence_indices"


def attention_of(config: PretrainedConfig) -> str:
    """The form of attention that the text model of a config computes, e.g. sdpa."""
    return str(config.get_text_config()._attn_implementation)


def supports_attention(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers has the model with this form of attention, as from_pretrained names it."""
    return name not in _FORMS or bool(getattr(model, _FORMS[name]))


def not_split(model: nn.Module) -> set[str]:
    """Names of the classes of modules that one device must hold whole."""
    return set(getattr(model, "_no_split_modules", None) or ())


def not_moved(model: nn.Module) -> Any:
    """Names of the arguments that stay where they are when a layer's inputs go to its device; None for none."""
    return getattr(model, "_skip_keys_device_placement", None)


def keeps_float32(model: PreTrainedModel) -> bool:
    """Whether some weights stay in float32 whatever dtype the model is loaded in."""
    return bool(model._keep_in_fp32_modules_strict)


def conversions(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether loading does anything to a checkpoint's tensor, by its name there: renames it, or makes it of others."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [
        transform for transform in transforms if not isinstance(transform, WeightConverter)
    ]
    return lambda name: rename_source_key(name, renamings, converters) != (name, None)


def as_in_files(
    model: PreTrainedModel, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A whole model's tensors under the names, and in the shapes, that its files had before they were loaded."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)


@contextlib.contextmanager
def samples_in_rows(samples: torch.Tensor | None, packed: bool) -> Iterator[None]:
    """Inside the block masks are made for rows with these samples, without a look at the position ids.

    samples: number of each token's sample in its row (B, T); None: one in every row. ValueError for packed rows where
    this version of transformers has no such question; without them it is left alone.
    """
    from transformers import masking_utils

    asked = getattr(masking_utils, _QUESTION, None)
    if asked is None:
        if packed:
            raise ValueError(
                f"transformers {version('transformers')} has no masking_utils.{_QUESTION}, so that packed samples "
                "might see each other: install transformers 5.23, or set train.packing to false"
            )
        yield
        return
    setattr(masking_utils, _QUESTION, lambda position_ids: samples)
    try:
        yield
    finally:
        setattr(masking_utils, _QUESTION, asked)


def settle_bitsandbytes() -> None:
    """Have peft look for bitsandbytes now: it keeps the answer, and asked first later it would import it."""
    need("peft", PEFT, ["peft.import_utils:is_bnb_available"])
    from peft.import_utils import is_bnb_available

    is_bnb_available()


need("transformers", TRANSFORMERS, _NAMES)
