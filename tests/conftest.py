"""Tests never reach a hub, never share cores they do not have, and use the CPU, also where there are GPUs:
`pytest -m gpu` is apart.
"""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also under nohup: what is started here is to hear it
os.environ.pop("MLFLOW_TRACKING_URI", None)
# tiny tensors gain nothing from a second, and stages started here inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")

TESTS = Path(__file__).parent
MARKED = ("distributed", "gpu", "slurm")  # folders, each a mark of what stands in it


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module brings in torch. What needs a GPU is asked for by name, whatever else is chosen."""
    chosen = config.option.markexpr
    if not re.search(r"(?<!not )\bgpu\b", chosen):
        config.option.markexpr = f"({chosen}) and not gpu" if chosen else "not gpu"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["DS_ACCELERATOR"] = "cpu"


@pytest.hookimpl(tryfirst=True)  # before -m chooses by the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that start processes come first: they take longest, and none may be left to run alone at the end."""
    for item in items:
        for folder in MARKED:
            if item.path.is_relative_to(TESTS / folder):
                item.add_marker(folder)
    items.sort(key=lambda item: item.get_closest_marker("processes") is None)


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    """A recipe's permissions are those of the process that opens it: not of the tests that come after."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)
