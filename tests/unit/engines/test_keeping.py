"""train.keep_gathered: refused where there is nothing to keep, before anything is read."""

import json

import pytest

from pipeline.engines.ds_config import check_engine, cuts_frozen
from pipeline.recipe.sections import TrainSection


def section(tmp_path, zero: dict | None = None, **given) -> TrainSection:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, **(zero or {})}}))
    return TrainSection(steps=1, keep_gathered=True, ds_config=str(path), **given)


@pytest.mark.parametrize(
    ("zero", "given", "why"),
    [
        ({}, {"engine": "single"}, "align.train.engine is single, which gathers nothing"),
        ({}, {"adapter": "full"}, "align.train.adapter is full, so that no layer is frozen"),
        ({"offload_param": {"device": "cpu"}}, {}, "leaves frozen layers to DeepSpeed"),
        ({"zero_hpz_partition_size": 4}, {}, "leaves frozen layers to DeepSpeed"),
        ({"zero_quantized_nontrainable_weights": True}, {}, "leaves frozen layers to DeepSpeed"),
    ],
)
def test_nothing_to_keep_is_refused(tmp_path, zero, given, why):
    train = section(tmp_path, zero, **given)
    with pytest.raises(ValueError, match=why) as refused:
        check_engine("align.train", train, 1)
    assert "set align.train.keep_gathered to false, or to auto" in str(refused.value)
    check_engine("align.train", train.model_copy(update={"keep_gathered": "auto"}), 1)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_frozen_layers_are_kept_where_ranks_cut_them(tmp_path, engine):
    check_engine("train", section(tmp_path, engine=engine), 1)
    assert not cuts_frozen(
        {"offload_param": {"device": "none"}, "offload_optimizer": {"device": "cpu"}}
    )
