"""One case, in a process of its own: `python -m pipeline.bench.measure '{"system": "fsdp2"}'` prints one line of JSON.

Our own steps run in the training loop as `sap train` runs it; a step's time is from one step's metrics to the next
one's. Trainer and SFTTrainer get the same module, the same rows in the same order, the same optimizer and learning
rate.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeline.bench.cases import MICRO_BATCHES, OTHERS, Case, plain_step_flops
from pipeline.defences.callback import Callback
from pipeline.defences.ema.average import Ema
from pipeline.defences.ema.section import EmaSection
from pipeline.defences.lisa.section import LisaSection
from pipeline.defences.lisa.step import LisaStep
from pipeline.defences.plain import PlainStep
from pipeline.defences.sap.probe import probe_of
from pipeline.defences.sap.section import SapSection
from pipeline.defences.sap.step import SapStep
from pipeline.defences.step import Step
from pipeline.engines import open as launch
from pipeline.engines.engine import Engine
from pipeline.model.models import make_trainable
from pipeline.objectives.batches import BatchOrder, pad_rows
from pipeline.recipe.sections import LoraSection, TrainSection
from pipeline.running.devices import environment
from pipeline.training.callbacks import Console, Watched
from pipeline.training.loop import Loop, TrainingData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LR = 1e-4
# Sizes of what is fetched come from the model (ds_config.fetched_by_layer); nothing is kept from pass to pass.
_ZERO = {
    "stage": 3,
    "overlap_comm": False,
    "reduce_bucket_size": 10_000_000,
    "stage3_max_reuse_distance": 0,
}


class Clock:
    """When each step ended, and its loss; profiles what comes after the warm-up, where the case asks for it."""

    def __init__(self, case: Case):
        self.case = case
        self.marks: list[float] = []
        self.losses: list[float] = []
        activities = [
            torch.profiler.ProfilerActivity.CPU,
            *([torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []),
        ]
        self.profiler = torch.profiler.profile(activities=activities) if case.profile else None

    def tick(self, loss: float) -> None:
        """A step has ended with this loss: note the time, and profile the steps after the warm-up."""
        _wait()
        self.marks.append(time.perf_counter())
        self.losses.append(loss)
        if self.profiler and len(self.marks) == self.case.warm_up:
            self.profiler.start()
        if self.profiler and len(self.marks) == self.case.warm_up + self.case.steps:
            self.profiler.stop()

    def times(self) -> list[float]:
        """Milliseconds of the steps after the warm-up."""
        assert len(self.marks) == self.case.warm_up + self.case.steps, "a step was not measured"
        return [
            1000 * (stop - start) for start, stop in zip(self.marks, self.marks[1:], strict=False)
        ][self.case.warm_up - 1 :]

    def profile(self) -> str | None:
        """The dearest operators on the device (without one, on the CPU), as torch prints them."""
        if not self.profiler:
            return None
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        return self.profiler.key_averages().table(
            sort_by=key, row_limit=30, max_name_column_width=60
        )


def measure(case: Case) -> dict[str, Any]:
    """The case, its step times in ms, the losses, and what memory it took: of the first rank, where there are several.

    RuntimeError where a rank fails.
    """
    if case.ranks > 1 and "RANK" not in os.environ:
        return _on_ranks(case)
    if case.model.hidden_size <= 64:
        torch.set_num_threads(1)  # two would wait for each other longer than they work
    with tempfile.TemporaryDirectory() as folder:
        train = section(case, Path(folder))
        launch.init_distributed(train)
        started = time.perf_counter()
        module = make_trainable(random_model(case).train(), train, 0)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        run = _trainer if case.system in OTHERS else _loop
        clock = run(case, train, module, Path(folder))
    if environment()[0]:  # what happens is logged, and so timed, on the first rank alone
        launch.leave()
        return {}
    times = clock.times()
    tokens = sum(len(row["input_ids"]) for row in case.rows()) / (case.warm_up + case.steps)
    middle = statistics.median(times)
    launch.leave()
    return {
        **asdict(case), "ms": middle, "times": times, "tokens_per_s": 1000 * tokens / middle, "loss": clock.losses[-1],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        "before_s": clock.marks[0] - started, "flops": plain_step_flops(case), "profile": clock.profile(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }  # fmt: skip


def _on_ranks(case: Case) -> dict[str, Any]:
    """A Python for each rank, on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    command = [sys.executable, "-m", "pipeline.bench.measure", json.dumps(asdict(case))]
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ
            | where
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(case.ranks)
    ]
    said = [rank.communicate()[0] for rank in ranks]
    codes = [rank.returncode for rank in ranks]
    if any(codes):
        raise RuntimeError(f"the ranks of {case.system} ended with exit codes {codes}: see above")
    return json.loads(said[0].splitlines()[-1])


def matmul_rate() -> float:
    """FLOP/s of a large matrix product in the dtype of the frozen weights, on random numbers:
    what a step is held against.
    """
    device = launch.device()
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        _wait()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[3:])


def section(case: Case, folder: Path) -> TrainSection:
    """What the case trains; writes DeepSpeed's configuration into the folder."""
    (folder / "ds.json").write_text(
        json.dumps({"zero_optimization": _ZERO, "steps_per_print": 10**6})
    )
    total, size = case.warm_up + case.steps, case.model.batch_size
    packed = {"tokens_per_micro_batch": case.tokens, "packing": case.packing}
    return TrainSection(
        steps=total, engine="single" if case.system in OTHERS else case.system, ds_config=str(folder / "ds.json"),
        batch_size=case.ranks * size, micro_batch_size=size // MICRO_BATCHES, lr=_LR,
        gradient_checkpointing=case.checkpointing, keep_gathered=case.keep_gathered,
        **({} if case.system in OTHERS else packed),
        warmup_steps=0, decay="constant", save_every=total + 1, validate_every=total + 1,
        lora=LoraSection(r=8, target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip


def random_model(case: Case) -> nn.Module:
    """The same weights for every system on one device: bfloat16 on a GPU, float32 on a CPU."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    device = launch.device()
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(
                **case.model.config(),
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
                tie_word_embeddings=False,
            ),
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            attn_implementation="sdpa",
        )
    model.config.use_cache = False
    return model


def _loop(case: Case, train: TrainSection, module: nn.Module, folder: Path) -> Clock:
    engine = launch.open_engine(module, train)
    clock = Clock(case)
    data = TrainingData(case.rows(), case.pairs(), pad_id=0, pairs_per_step=4, pairs_micro_batch=2)
    average = [Ema(engine, EmaSection(enabled=True))] if case.method == "ema" else []
    callbacks = [
        *average,
        _Ticking(clock),
        Console(case.system),
        Watched(train.watchdog_seconds, engine.rank),
    ]
    Loop(engine, _step(case, engine), data, train, 0, folder / "work", "bench", callbacks).run()
    return clock


class _Ticking(Callback):
    def __init__(self, clock: Clock):
        self.clock = clock

    def logged(self, metrics: dict[str, float], number: int) -> None:
        self.clock.tick(metrics["train/loss"])


def _step(case: Case, engine: Engine) -> Step:
    if case.method in ("sap", "sap_lagged"):
        section = SapSection(
            enabled=True, schedule="exact" if case.method == "sap" else "lagged", noise_every=0
        )
        return SapStep(engine, probe_of(engine.module, section.layers), section, refresh_every=4)
    return (
        LisaStep(engine, LisaSection(enabled=True)) if case.method == "lisa" else PlainStep(engine)
    )


def _trainer(case: Case, train: TrainSection, module: nn.Module, folder: Path) -> Clock:
    """transformers.Trainer, or TRL's SFTTrainer, told to do what the loop does:
    rows in the loop's order, no schedule, no saving.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    clock = Clock(case)

    class Ticks(TrainerCallback):
        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, float], **given: Any
        ) -> None:
            if "loss" in logs:
                clock.tick(float(logs["loss"]))

    order = BatchOrder(len(case.rows()), train.batch_size, 0)
    rows = [case.rows()[index] for step in range(train.steps or 0) for index in order.step(step)]
    cuda = torch.cuda.is_available()
    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"), "max_steps": train.steps,
        "per_device_train_batch_size": train.micro_batch_size, "gradient_accumulation_steps": MICRO_BATCHES,
        "learning_rate": train.lr, "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "max_grad_norm": train.max_grad_norm, "bf16": cuda, "use_cpu": not cuda, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "gradient_checkpointing": case.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if case.checkpointing else None,
        "train_sampling_strategy": "sequential", "remove_unused_columns": False, "disable_tqdm": True,
        "logging_nan_inf_filter": False,
    }  # fmt: skip
    if case.system == "trl":
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        masks = [
            {
                "input_ids": row["input_ids"],
                "completion_mask": [int(label >= 0) for label in row["labels"]],
            }
            for row in rows
        ]
        trainer: Trainer = SFTTrainer(
            module, SFTConfig(**settings | {"remove_unused_columns": True}, max_length=None, completion_only_loss=True),
            train_dataset=Dataset.from_list(masks), processing_class=_tokenizer(), callbacks=[Ticks()],
        )  # fmt: skip
    else:
        trainer = Trainer(
            module,
            TrainingArguments(**settings),
            train_dataset=rows,
            data_collator=_collated,
            callbacks=[Ticks()],
        )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock


def _tokenizer() -> PreTrainedTokenizerBase:
    """Of rows that are tokens already, SFTTrainer only wants the padding's id."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


def _collated(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    ids, labels = pad_rows([row["input_ids"] for row in rows], [row["labels"] for row in rows], 0)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        "labels": labels,
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
