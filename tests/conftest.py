"""Tests never reach a hub, never share cores they do not have, and use the CPU, also where there are GPUs:
`pytest -m gpu` is apart.
"""

import os
import signal
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also under nohup: what is started here is to hear it
os.environ.pop("MLFLOW_TRACKING_URI", None)
# tiny tensors gain nothing from a second, and stages started here inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module brings in torch."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["DS_ACCELERATOR"] = "cpu"


def pytest_collection_modifyitems(items) -> None:
    """Modules that start processes come first: they take longest, and none may be left to run alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("processes") is None)


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    """A recipe's permissions are those of the process that opens it: not of the tests that come after."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)
