"""What `auto` means on machines that tests do not have: a made-up driver library says how many GPUs there are."""

import importlib.metadata
import os
import sys
from types import SimpleNamespace

import pytest

from pipeline.recipe.sections import ModelSection, TrainSection
from pipeline.running import devices

GB = 10**9


class Driver:
    """What pipeline/running/devices.py asks of nvidia-ml-py.

    gpus: (name, total bytes, free bytes, compute capability, processes).
    """

    NVMLError = type("NVMLError", (Exception,), {})
    NVML_ERROR_NOT_SUPPORTED, NVML_DEVICE_MIG_ENABLE = 3, 1

    def __init__(self, *gpus, cuda: int = 13000):
        self.gpus, self.cuda = gpus, cuda

    def nvmlDeviceGetMigMode(self, handle):
        if self.gpus[handle][0].endswith("in parts"):
            return 1, 1
        raise self.NVMLError

    def nvmlInit(self):
        pass

    def nvmlShutdown(self):
        pass

    def nvmlDeviceGetCount(self):
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetUUID(self, handle):
        return f"GPU-{handle}{handle}{handle}-abc"

    def nvmlDeviceGetName(self, handle):
        return self.gpus[handle][0]

    def nvmlDeviceGetMemoryInfo(self, handle):
        if not self.gpus[handle][1]:
            raise self.NVMLError
        return SimpleNamespace(total=self.gpus[handle][1], free=self.gpus[handle][2])

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return self.gpus[handle][3]

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=pid) for pid in self.gpus[handle][4]]

    def nvmlSystemGetCudaDriverVersion_v2(self):
        return self.cuda

    def nvmlSystemGetDriverVersion(self):
        return "535.104.05"


def gpu(
    name: str = "NVIDIA H100", total: int = 80 * GB, free: int = 79 * GB, capability=(9, 0), busy=()
):
    return name, total, free, capability, busy


@pytest.fixture
def machine(monkeypatch):
    """machine(gpu(), gpu(), visible="0"): from then on this machine has these GPUs,
    and a torch that is built for CUDA 13.0.
    """

    def pretend(
        *gpus, visible: str | None = None, cuda: int = 13000, built: str | None = "13.0"
    ) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", Driver(*gpus, cuda=cuda))
        monkeypatch.setattr(
            devices, "_torch_build", lambda: {"cuda": built, "hip": None, "__version__": "2.13.0"}
        )
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        devices.gpus.cache_clear()

    yield pretend
    devices.gpus.cache_clear()


def train(**fields) -> TrainSection:
    return TrainSection(**{"steps": 1, "batch_size": 8, **fields})


AMPERE, TURING = gpu("NVIDIA A100", capability=(8, 0)), gpu("NVIDIA T4", 16 * GB, 15 * GB, (7, 5))


@pytest.mark.parametrize(
    ("gpus", "flash", "ranks", "dtype", "attention", "ds_config"),
    [
        ([], "2.8.3", 2, None, "eager", "zero3_cpu.json"),
        ([gpu()], None, 1, "bfloat16", "sdpa", "zero3.json"),
        ([gpu()], "2.8.3.post1", 1, "bfloat16", "flash_attention_2", "zero3.json"),
        ([gpu()], "2.3.2", 1, "bfloat16", "sdpa", "zero3.json"),
        ([AMPERE] * 4, None, 4, "bfloat16", "sdpa", "zero3.json"),
        ([AMPERE] * 4, "2.3.3", 4, "bfloat16", "flash_attention_2", "zero3.json"),
        ([AMPERE, TURING], "2.8.3", 2, "float32", "sdpa", "zero3.json"),
    ],
)
def test_auto_is_what_the_machine_has(
    machine, monkeypatch, gpus, flash, ranks, dtype, attention, ds_config
):
    machine(*gpus)
    monkeypatch.setattr(devices, "_flash_version", lambda: flash)
    assert devices.ranks(train()) == ranks and devices.ranks(train(engine="single")) == 1
    assert devices.attention(ModelSection(path="owner/name")) == attention
    assert devices.ds_config(train()).name == ds_config and devices.ds_config(train()).is_file()
    assert dtype is None or devices.dtype("auto") == dtype
    line = devices.describe(ModelSection(path="owner/name"), train())
    assert (
        f"{ranks} process" in line
        and f"model.attention {attention}" in line
        and f"train.ds_config {ds_config}" in line
    )
    assert (
        ("no GPU is visible" in line)
        if not gpus
        else (f"{len(gpus)} GPU" in line and gpus[0][0] in line)
    )


def test_one_gpu_is_told_that_it_shards_nothing(machine):
    hint = "train.engine single does the same in less time"

    def say(**fields):
        return devices.describe(ModelSection(path="owner/name"), train(**fields))

    machine(gpu())
    assert hint in say() and hint in say(engine="fsdp2")
    assert hint not in say(engine="single") and hint not in say(adapter="full"), (
        "all weights need a float32 master, which single has not"
    )
    machine(gpu(), gpu())
    assert hint not in say()


def test_what_a_recipe_names_is_taken(machine, tmp_path):
    machine(gpu(), gpu())
    assert devices.ranks(train(ranks=1)) == 1 and devices.dtype("float32") == "float32"
    assert devices.attention(ModelSection(path="owner/name", attention="eager")) == "eager"
    assert devices.ds_config(train(ds_config=tmp_path / "mine.json")) == tmp_path / "mine.json"


@pytest.mark.parametrize(
    ("gpus", "flash", "dtype", "said"),
    [
        ([], "2.8.3", "auto", "needs a GPU, and none is visible"),
        (
            [AMPERE, TURING],
            "2.8.3",
            "bfloat16",
            "needs compute capability 8.0, and GPU 1 (NVIDIA T4) has 7.5",
        ),
        ([AMPERE], "2.8.3", "float32", "computes in bfloat16, and model.dtype is float32"),
        (
            [AMPERE],
            None,
            "auto",
            "needs the package flash-attn 2.3.3 or newer, and it is not installed",
        ),
        (
            [AMPERE],
            "2.1",
            "auto",
            "needs the package flash-attn 2.3.3 or newer, and 2.1 is installed",
        ),
        ([AMPERE], "2.8.3", "auto", None),
    ],
)
def test_flash_attention_that_cannot_be_had_is_refused_by_name_only(
    machine, monkeypatch, gpus, flash, dtype, said
):
    machine(*gpus)
    monkeypatch.setattr(devices, "_flash_version", lambda: flash)
    named = ModelSection(path="owner/name", dtype=dtype, attention="flash_attention_2")
    for other in ("auto", "sdpa", "eager"):
        devices.check_attention(named.model_copy(update={"attention": other}))
    if said is None:
        devices.check_attention(named)
        return
    with pytest.raises(ValueError) as caught:
        devices.check_attention(named)
    assert (
        str(caught.value)
        == f"model.attention flash_attention_2 {said}: set model.attention to auto, or to sdpa"
    )


def test_the_installed_package_is_asked_for_its_version(monkeypatch):
    versions = {"flash-attn": "2.8.3"}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert devices._flash_version() == "2.8.3"
    versions.clear()
    assert devices._flash_version() is None


@pytest.mark.parametrize(
    ("kind", "gpus", "flash", "attention", "said"),
    [
        (
            "gemma2",
            [AMPERE],
            None,
            "auto",
            "model.attention auto (sdpa on this machine) is not there for model.path m",
        ),
        ("gemma2", [AMPERE], "2.8.3", "auto", None),
        ("gemma2", [AMPERE], None, "sdpa", "model.attention sdpa is not there for model.path m"),
        ("gemma2", [], None, "auto", None),
        ("llama", [AMPERE], None, "auto", None),
        ("bloom", [AMPERE], "2.8.3", "auto", "transformers has no such form of BloomForCausalLM"),
    ],
)
def test_an_attention_that_the_model_has_not_is_refused(
    machine, monkeypatch, kind, gpus, flash, attention, said
):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from pipeline.model.models import check_attention, without_weights

    machine(*gpus)
    monkeypatch.setattr(devices, "_flash_version", lambda: flash)
    config = CONFIG_MAPPING[kind](hidden_size=64, num_hidden_layers=1, vocab_size=11)
    section = ModelSection(path="m", attention=attention, dtype="bfloat16")
    if said is None:
        check_attention(without_weights(config, "m"), section)
        return
    with pytest.raises(ValueError, match=r"set model.attention to eager$") as caught:
        check_attention(without_weights(config, "m"), section)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_batch_that_does_not_divide_takes_fewer_gpus_and_says_so(machine):
    machine(*[gpu()] * 4)
    assert devices.ranks(train(batch_size=6)) == 3
    assert (
        "3 processes on 4 GPUs: NVIDIA H100, because train.batch_size 6 is not divisible by more"
        in devices.describe(ModelSection(path="owner/name"), train(batch_size=6))
    )


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["0", "1", "2"]), ("", []), ("2,0", ["2", "0"]), ("1", ["1"]), ("GPU-111", ["GPU-111"]),
        ("0,-1,2", ["0"]), ("0,7,2", ["0"]), ("-1", []), (" 1 , 2 ", ["1", "2"]), ("0,0", []), ("01", ["01"]),
        ("0;1", ["0;1"]), ("GPU-", []), ("MIG-abc", []),
    ],
)  # fmt: skip
def test_the_variable_is_read_as_cuda_reads_it(machine, visible, names):
    machine(gpu(), gpu(), gpu(), visible=visible)
    assert [found.name for found in devices.gpus()] == names


def test_more_ranks_than_gpus_is_one_sentence(machine):
    machine(gpu())
    devices.check_ranks("train", train(ranks=1))
    with pytest.raises(
        ValueError,
        match=r"^align.train.ranks 2 needs as many GPUs, and this machine shows 1 \(1 GPU: NVIDIA H100\): "
        "set align.train.ranks to auto or to at most 1$",
    ):
        devices.check_ranks("align.train", train(ranks=2))
    machine()
    devices.check_ranks("train", train(ranks=8))  # processes of a CPU are the user's choice


def test_a_driver_that_is_too_old_for_torch_is_one_sentence(machine):
    machine(gpu(), cuda=12020)
    with pytest.raises(
        ValueError,
        match=r"torch 2.13.0 is built for CUDA 13.0, and this machine's driver 535.104.05 knows CUDA "
        r"12.2: install a newer",
    ):
        devices.gpus()
    machine(gpu(), cuda=12020, built="12.8")  # minor versions go together
    assert len(devices.gpus()) == 1


def test_a_torch_without_cuda_computes_on_the_cpu_and_says_so(machine):
    machine(gpu(), built=None)
    assert devices.gpus() == () and "torch is built without CUDA" in devices.describe(
        ModelSection(path="owner/name"), train()
    )


@pytest.mark.parametrize(
    ("untold", "visible"),
    [(gpu("NVIDIA H100 in parts"), "MIG-abc"), (gpu("NVIDIA GB10", total=0), "0")],
)
def test_gpus_of_which_the_library_tells_too_little_are_asked_of_torch(
    machine, monkeypatch, untold, visible
):
    import torch

    properties = SimpleNamespace(name="a part", total_memory=40 * GB, major=9, minor=0)
    monkeypatch.setattr(devices.Path, "exists", lambda path: str(path) == "/dev/nvidiactl")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    machine(untold, visible=visible)
    assert devices.gpus() == (devices.Gpu(visible, "a part", 40 * GB, 40 * GB, (9, 0)),)


def test_the_build_of_torch_is_read_without_importing_it():
    import torch

    found = devices._torch_build()
    assert (found["__version__"], found["cuda"], found["hip"]) == (
        torch.__version__,
        torch.version.cuda,
        torch.version.hip,
    )


def test_a_gpu_that_is_too_small_or_busy_is_one_sentence(machine):
    machine(gpu(), gpu("NVIDIA T4", 16 * GB, 4 * GB, (7, 5), busy=(4711, os.getpid())))

    def check(needed):
        return devices.check_memory(needed, "method sap", "use more ranks (train.ranks)")

    assert check(3 * GB) is None
    with pytest.raises(
        ValueError,
        match=r"method sap needs about 20.0 GB .* GPU 1 \(NVIDIA T4\) has 16.0: use more ranks",
    ):
        check(20 * GB)
    with pytest.raises(
        ValueError,
        match=r"GPU 1 \(NVIDIA T4\) has 4.0 of 16.0 GB free \(process 4711 holds the rest\): wait for it",
    ):
        check(8 * GB)
    assert "GPU 1 (NVIDIA T4) has 4.0 GB free: it may not fit" in check(4.5 * GB)


def test_jobs_side_by_side_get_a_gpu_each(machine):
    from pipeline.running.runner import _one_gpu

    machine(gpu(), gpu(), gpu(), visible="2,0")
    assert [_one_gpu(slot) for slot in range(3)] == [
        {"CUDA_VISIBLE_DEVICES": name} for name in ("2", "0", "2")
    ]
    machine()
    assert _one_gpu(0) == {}


def test_a_launcher_that_starts_more_processes_than_gpus_is_told_so(monkeypatch):
    import torch

    from pipeline.running.devices import device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert device() == torch.device("cuda", 1)
    for name, value in (("LOCAL_WORLD_SIZE", "4"), ("LOCAL_SIZE", "4"), ("LOCAL_RANK", "3")):
        with (
            monkeypatch.context() as patch,
            pytest.raises(
                ValueError,
                match=r"^4 processes were started on this machine, and each sees 2 GPUs: start at most 2",
            ),
        ):
            patch.setenv(name, value)
            device()


@pytest.mark.parametrize(
    ("rank", "size"), [("0", "0"), ("0", "-2"), ("", ""), ("abc", "2"), ("2", "2"), ("0", "2.0")]
)
def test_a_launcher_that_says_nonsense_is_one_sentence(monkeypatch, rank, size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(
        ValueError, match=f"^RANK is '{rank}' and WORLD_SIZE '{size}' in the environment"
    ):
        devices.environment()
