"""Model folders as people have them: what is wrong is said in one sentence, before torch is even imported."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.model.lora_targets import adapted_modules
from pipeline.model.model_checks import (
    check_lora,
    check_model,
    check_prompts,
    local_folder,
    positions,
)
from pipeline.model.model_facts import read_facts
from pipeline.recipe.sections import LoraSection, ModelSection, TrainSection
from tests.model_folder import (
    HIDDEN,
    LAYERS,
    PAD,
    POSITIONS,
    WORDS,
    change,
    make_folder,
    recipe_of,
    shapes,
    write_safetensors,
    write_shards,
)

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"


def config(**fields):
    return lambda folder: change(folder / "config.json", **fields)


def tokenizer(**fields):
    return lambda folder: change(folder / "tokenizer_config.json", **fields)


def text(name: str, content: str | bytes):
    return lambda folder: (folder / name).write_bytes(
        content.encode() if isinstance(content, str) else content
    )


def resized(name: str, by: int):
    """The file without its last bytes, or with some more."""

    def apply(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:by] if by < 0 else data + bytes(by))

    return apply


def tensors(**changed):
    return lambda folder: write_safetensors(
        folder / "model.safetensors",
        {n: s for n, s in (shapes() | changed).items() if s is not None},
    )


def without(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


def shards(folder: Path) -> None:
    held = list(shapes().items())
    write_shards(folder, {FIRST: dict(held[:4]), SECOND: dict(held[4:])})


def sharded(then):
    return lambda folder: (shards(folder), then(folder))


def both(first, second):
    return lambda folder: (first(folder), second(folder))


def cut_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20])


def added_words(*words: str, special: bool = False):
    def apply(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        content["added_tokens"] += [
            {"id": WORDS + i, "content": word, "special": special} for i, word in enumerate(words)
        ]
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return apply


def moved_in_index(folder: Path) -> None:
    path = folder / INDEX
    change(
        path,
        weight_map=json.loads(path.read_text())["weight_map"] | {"model.norm.weight": SECOND},
    )


def twice(folder: Path) -> None:
    held = dict(list(shapes().items())[4:])
    write_safetensors(folder / SECOND, held | {"model.norm.weight": (HIDDEN,)})


def quantised(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", shapes(), "F8_E4M3", 1)


BROKEN = {
    "config is no JSON": (text("config.json", '{"a": 1,\n "b"'), ["config.json is not valid JSON", "line 2"]),
    "config is a list": (text("config.json", "[1]"), ["config.json does not hold a JSON object"]),
    "config is no text": (text("config.json", b"\xff\xfe\x00"), ["config.json is not valid JSON"]),
    "empty config": (text("config.json", ""), ["config.json is empty"]),
    "generation config": (text("generation_config.json", "{"), ["generation_config.json is not valid JSON"]),
    "pointer for weights": (text("model.safetensors", LFS), ["model.safetensors is a Git LFS pointer", "git lfs pull"]),
    "pointer for the tokenizer": (text("tokenizer.json", LFS), ["tokenizer.json is a Git LFS pointer"]),
    "pointer for a shard": (sharded(text(SECOND, LFS)), [f"{SECOND} is a Git LFS pointer"]),
    "weights cut short": (resized("model.safetensors", -10), ["model.safetensors is cut short", "bytes"]),
    "weights cut in the header": (cut_header, ["model.safetensors is cut short, within its header"]),
    "weights too long": (resized("model.safetensors", 7), ["model.safetensors is too long"]),
    "weights are something else": (
        text("model.safetensors", b"<html>" + bytes(900)), ["model.safetensors is not a safetensors file"]
    ),
    "no weights at all": (text("model.safetensors", ""), ["model.safetensors is empty"]),
    "a shard is missing": (sharded(without(FIRST)), [f"lacks {FIRST}"]),
    "no index": (sharded(without(INDEX)), [f"neither model.safetensors nor {INDEX}"]),
    "index is no JSON": (sharded(text(INDEX, "{")), [f"{INDEX} is not valid JSON"]),
    "index of nothing": (sharded(text(INDEX, "{}")), ["has no weight_map"]),
    "index is wrong": (sharded(moved_in_index), [f"lists model.norm.weight in {SECOND}, which does not hold it"]),
    "a tensor twice": (sharded(twice), ["holds model.norm.weight twice"]),
    "pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), ["pickled weights only", "save_pretrained"]
    ),
    "an adapter": (text("adapter_config.json", "{}"), ["holds an adapter", "merge it"]),
    "tokenizer is no JSON": (text("tokenizer.json", "{"), ["tokenizer.json is not valid JSON"]),
    "tokenizer without vocabulary": (text("tokenizer.json", '{"model": {}}'), ["tokenizer.json has no vocabulary"]),
    "no tokenizer": (without("tokenizer.json"), ["holds no tokenizer"]),
    "no chat template": (without("chat_template.jinja"), ["has no chat template", "model.chat_template"]),
    "syntax of the template": (
        text("chat_template.jinja", "a\n{% for x in y %}"), ["chat_template.jinja has a syntax error in line 2"]
    ),
    "syntax of the saved template": (
        both(without("chat_template.jinja"), tokenizer(chat_template="{{ a")),
        ["tokenizer_config.json has a syntax error in line 1"],
    ),
    "no type": (config(model_type=None), ["config.json has no model_type"]),
    "unknown architecture": (config(model_type="llama9"), ["'llama9'", "does not know"]),
    "code of its own": (
        config(model_type="llama9", auto_map={"AutoModelForCausalLM": "m.M"}), ["code of its own, which is not run"]
    ),
    "quantised already": (
        config(quantization_config={"quant_method": "gptq"}), ["quantised already (gptq)", "model.quantization nf4"]
    ),
    "8-bit weights": (quantised, ["is stored as F8_E4M3"]),
    "another vocabulary": (config(vocab_size=WORDS + 5), ["vocab_size 25", "is 20 x 8"]),
    "another width": (config(hidden_size=16), ["hidden_size 16", "is 20 x 8"]),
    "more layers": (config(num_hidden_layers=LAYERS + 1), ["num_hidden_layers 3", "none of layer 2"]),
    "fewer layers": (config(num_hidden_layers=LAYERS - 1), ["num_hidden_layers 1", "weights of 2 layers"]),
    "head of another size": (
        tensors(**{"lm_head.weight": (WORDS + 4, HIDDEN)}), ["lm_head.weight has 24 rows", "resize_token_embeddings"]
    ),
    "words without a row": (
        added_words("<tool>", "<call>"), ["ids up to 21 ('<tool>' is 20)", "20 rows", "resize_token_embeddings"]
    ),
    "special words without a row": (added_words("<tool>", special=True), ["ids up to 20"]),
    "a pad without a row": (tokenizer(pad_token="[PAD]"), ["pad_token '[PAD]' has id 20", "20 rows"]),
    "an eos without a row": (tokenizer(eos_token={"content": "</s>"}), ["eos_token '</s>' has id 20"]),
    "an extra token without a row": (tokenizer(additional_special_tokens=["<x>"]), ["ids up to 20 ('<x>' is 20)"]),
    "an end without a row": (config(eos_token_id=[0, 99]), ["eos_token_id 99 is beyond"]),
    "no eos": (
        both(tokenizer(eos_token=None), config(eos_token_id=None)), ["names no eos token", "tokenizer_config.json"]
    ),
    "tokens that are none": (
        text("tokenizer.json", '{"model": {"vocab": {"a": 0}}, "added_tokens": [5]}'),
        ["tokenizer.json or tokenizer_config.json is not as a tokenizer's files are"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_one_sentence_about_the_folder_and_nothing_about_the_hub(tmp_path, case):
    damage, expected = BROKEN[case]
    recipe = recipe_of(make_folder(tmp_path / "model"))
    assert check_model(recipe) is not None, "the folder itself is fine"
    damage(tmp_path / "model")
    with pytest.raises(ValueError, match=r"^model.path ") as caught:
        check_model(recipe)
    sentence = str(caught.value)
    assert all(part in sentence for part in expected), sentence
    assert "\n" not in sentence and not any(
        word in sentence.lower() for word in ("hub", "huggingface", "network", "login")
    )


FINE = {
    "shards": shards,
    "more rows than tokens": both(
        config(vocab_size=32), tensors(**{"model.embed_tokens.weight": (32, HIDDEN), "lm_head.weight": (32, HIDDEN)})
    ),
    "no pad": tokenizer(pad_token=None),
    "eos in the config only": tokenizer(eos_token=None),
    "eos in the tokenizer only": config(eos_token_id=None),
    "an image's placeholder without a row": both(
        added_words("<image>", special=True), tokenizer(image_token="<image>")
    ),
    "layers that predict further tokens": both(
        config(num_nextn_predict_layers=1),
        tensors(**{f"model.layers.{LAYERS}.mlp.down_proj.weight": (HIDDEN, HIDDEN)}),
    ),
    "tags of transformers in the template": text(
        "chat_template.jinja", "{% for m in messages %}{% generation %}a{% endgeneration %}{% break %}{% endfor %}"
    ),
    "no limit of positions": config(max_position_embeddings=None),
}  # fmt: skip


@pytest.mark.parametrize("case", FINE)
def test_what_is_fine_is_taken(tmp_path, case):
    recipe = recipe_of(make_folder(tmp_path / "model"))
    FINE[case](tmp_path / "model")
    assert check_model(recipe)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"data": {"max_length": POSITIONS + 1}},
            ["data.max_length is beyond the 64 positions", "set it to 64"],
        ),
        ({"data": {"safety_max_length": POSITIONS + 1}}, ["data.safety_max_length is beyond"]),
        (
            {"evaluate": {"max_new_tokens": POSITIONS}},
            ["evaluate.max_new_tokens is beyond", "set it to 63"],
        ),
        (
            {"model": {"chat_template": "/nowhere.jinja"}},
            ["model.chat_template /nowhere.jinja does not exist"],
        ),
    ],
)
def test_the_recipe_against_the_model(tmp_path, sections, expected):
    with pytest.raises(ValueError) as caught:
        check_model(recipe_of(make_folder(tmp_path / "model"), **sections))
    assert all(part in str(caught.value) for part in expected)


def test_a_template_of_the_recipe_is_looked_at(tmp_path):
    (tmp_path / "own.jinja").write_text("{% if %}")
    with pytest.raises(
        ValueError, match=r"model.chat_template .*own.jinja has a syntax error in line 1"
    ):
        check_model(
            recipe_of(
                make_folder(tmp_path / "model"),
                model={"chat_template": str(tmp_path / "own.jinja")},
            )
        )


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"max_position_embeddings": 100}, 100),
        ({"n_positions": 100}, 100),
        ({}, None),
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 4096,
                "rope_parameters": {"full_attention": {"factor": 2.0}, "sliding_attention": {}},
            },
            8192,
        ),
        ({"max_position_embeddings": 7, "text_config": {"max_position_embeddings": 100}}, 100),
    ],
)
def test_positions_are_the_configs_with_rope_scaling(fields, limit):
    assert positions(fields) == limit


def test_a_prompt_and_its_answer_fit(tmp_path):
    recipe = recipe_of("model")
    check_prompts({"max_position_embeddings": 20}, [3, 12], recipe)
    check_prompts({}, [3, 10**9], recipe)
    check_prompts({"max_position_embeddings": 20}, [], recipe)
    with pytest.raises(
        ValueError, match=r"prompt has 13 tokens.*evaluate.max_new_tokens 8 .* 20 positions"
    ):
        check_prompts({"max_position_embeddings": 20}, [3, 13], recipe)


def test_facts_of_a_folder(tmp_path):
    folder = make_folder(tmp_path / "model")
    shards(folder)
    facts = read_facts(ModelSection(path=str(folder)), folder)
    assert {name: tensor.shape for name, tensor in facts.tensors.items()} == shapes()
    assert (
        facts.embedding == "model.embed_tokens.weight"
        and sorted(facts.layers) == list(range(LAYERS))
        and not facts.tied
    )
    assert (
        facts.layer_of("model.layers.1.mlp.down_proj.weight") == 1
        and facts.layer_of("lm_head.weight") is None
    )
    assert set(facts.linears) == {
        name.removesuffix(".weight") for name, shape in shapes().items() if len(shape) == 2
    } - {"model.embed_tokens"}
    assert (
        max(facts.tokenizer.vocabulary.values()) == WORDS - 1
        and facts.tokenizer.named["pad_token"] == PAD
        and facts.tokenizer.id_of("pad_token") == 1
    )
    tied = read_facts(ModelSection(path="tied"), make_folder(tmp_path / "tied", tied=True))
    assert tied.tied and tied.linears["lm_head"] == (WORDS, HIDDEN)


def test_facts_know_the_decoder_of_a_model_that_also_sees(tmp_path):
    folder = make_folder(tmp_path / "model")
    tower = {f"vision_tower.layers.{i}.q_proj.weight": (4, 4) for i in range(9)} | {
        "vision_tower.embed_tokens.weight": (3, 4)
    }
    decoder = {
        name.replace("model.", "model.language_model."): shape for name, shape in shapes().items()
    }
    write_safetensors(folder / "model.safetensors", tower | decoder)
    inner = {
        name: json.loads((folder / "config.json").read_text())[name]
        for name in ("vocab_size", "hidden_size", "num_hidden_layers")
    }
    change(
        folder / "config.json",
        model_type="gemma3",
        text_config=inner,
        vocab_size=None,
        hidden_size=1,
        num_hidden_layers=9,
    )
    facts = check_model(recipe_of(folder))
    assert facts.embedding == "model.language_model.embed_tokens.weight" and sorted(
        facts.layers
    ) == list(range(LAYERS))


def test_neither_torch_nor_transformers_is_imported(tmp_path):
    folder = make_folder(tmp_path / "model")
    code = (
        "import sys; from pipeline.model.model_checks import check_model; from tests.model_folder import recipe_of;"
        f"check_model(recipe_of({str(folder)!r})); assert not {{'torch', 'transformers'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=900)


def test_a_hub_model_in_the_cache_is_looked_at_like_a_folder(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    shards(make_folder(snapshot))
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert local_folder(ModelSection(path="owner/name")) == snapshot
    with pytest.raises(
        ValueError, match=r"data.max_length is beyond the 64 positions of model.path owner/name"
    ):
        check_model(recipe_of("owner/name", data={"max_length": 65}))
    (snapshot / SECOND).unlink()
    assert local_folder(ModelSection(path="owner/name")) is None, (
        "it is fetched later, and then looked at"
    )
    shutil.rmtree(snapshot)
    assert check_model(recipe_of("owner/name")) is None


LINEARS = [
    f"model.layers.{layer}.{name}"
    for layer in range(2)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
] + ["lm_head"]


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj"], 2),
        (["self_attn.q_proj", "mlp.up_proj"], 4),
        (["model.layers.1.mlp.up_proj"], 1),
        (["lm_head"], 1),
        ("all-linear", 6),
        ("All-Linear", 6),
        (r".*\.(q|k)_proj", 4),
        (r"model\.layers\.1\..*", 3),
    ],
)
def test_targets_are_pefts(targets, count):
    found = adapted_modules(targets, LINEARS, "lm_head", "train", ["model.norm"])
    assert len(found) == count and found == [name for name in LINEARS if name in found]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (
            ["w_proj"],
            "train.lora.target_modules names 'w_proj', which this model lacks: it has k_proj, lm_head, q_proj, up_proj",
        ),
        (["proj"], "names 'proj'"),
        (["all-linear"], "all-linear stands alone"),
        (["q_proj", "norm"], "names 'norm'"),
        (
            "q_proj",
            "'q_proj' matches no linear module: as a string it is all-linear, for all but the head, or a regular",
        ),
        (".*", "takes in model.norm, which is not a linear module"),
    ],
)
def test_targets_that_are_none(targets, expected):
    with pytest.raises(ValueError) as caught:
        adapted_modules(targets, LINEARS, "lm_head", "train", ["model.norm"])
    assert expected in str(caught.value)


def test_all_linear_of_a_model_that_has_but_a_head():
    with pytest.raises(ValueError, match="'all-linear' matches no linear module"):
        adapted_modules("all-linear", ["lm_head"], "lm_head", "train")


def test_targets_of_a_folder(tmp_path):
    folder = make_folder(tmp_path / "model", tied=True)
    experts = {f"model.layers.0.mlp.experts.{i}.w1.weight": (4, 4) for i in range(3)}
    write_safetensors(folder / "model.safetensors", shapes(tied=True) | experts)
    facts = check_model(recipe_of(folder))

    def found(targets, **fields):
        return check_lora(
            facts,
            TrainSection(steps=1, lora=LoraSection(target_modules=targets), **fields),
            "train",
        )

    assert found(["q_proj"]) == [
        f"model.layers.{layer}.self_attn.q_proj" for layer in range(LAYERS)
    ]
    assert (
        len(found("all-linear")) == 3 * LAYERS
        and found(["lm_head"]) == ["lm_head"]
        and found(["w1"]) == []
    )
    assert found(["nothing"], adapter="full") == []
    for targets, expected in (
        (["w_proj"], "lacks"),
        (".*norm", "is not a linear module"),
        ("model.layers.0.mlp", "is not a linear module"),
    ):
        with pytest.raises(ValueError, match=expected):
            found(targets)
