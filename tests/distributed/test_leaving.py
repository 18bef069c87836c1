"""A disk that fails for one rank alone: all ranks leave at once, with the same error,
and nothing half-written stays.
"""

import errno
import json
import resource
from datetime import timedelta
from pathlib import Path

import pytest

from pipeline.engines.open import init_distributed
from pipeline.training import checkpoint
from tests.distributed.ranks import spawn
from tests.distributed.resume_worker import open_case
from tests.distributed.worker import make_step, train_section

pytestmark = [pytest.mark.processes, pytest.mark.slow]


def save_or_load(rank: int, folder: Path, alone: int, verb: str) -> None:
    """Save a checkpoint that rank `alone` cannot write, or publish, or load one that it cannot open;
    leave what each rank met.
    """
    # A rank that waits in vain fails after 20 seconds.
    init_distributed(train_section(folder, "fsdp2", 0), timedelta(hours=1))
    engine = open_case(folder, "fsdp2", "lora")
    step, root = make_step(engine, "exact"), folder / "checkpoints"
    if verb == "load":
        checkpoint.save(engine, step, root, 1, "same")
    limit, lowest = (resource.RLIMIT_FSIZE, 100) if verb == "save" else (resource.RLIMIT_NOFILE, 0)
    before = resource.getrlimit(limit)
    real = engine.load

    def load(*given: object) -> object:
        if rank == alone:
            resource.setrlimit(limit, (lowest, before[1]))
        return real(*given)

    def publish(temporary: Path, *given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(temporary))

    engine.load = load
    if verb == "publish" and rank == alone:
        checkpoint.artifacts.publish = publish
    if rank == alone and verb == "save":
        resource.setrlimit(limit, (lowest, before[1]))
    met = None
    try:
        if verb == "load":
            checkpoint.load_latest(engine, step, root, "same")
        else:
            checkpoint.save(engine, step, root, 1, "same")
    except OSError as error:
        met = [error.errno, error.filename]
    resource.setrlimit(limit, before)
    (folder / f"met-{rank}.json").write_text(json.dumps(met))


@pytest.mark.parametrize(
    ("verb", "alone", "number"),
    [
        ("save", 1, errno.EFBIG),
        ("save", 0, errno.EFBIG),
        ("publish", 0, errno.ENOSPC),
        ("load", 1, errno.EMFILE),
    ],
)
def test_an_error_of_one_ranks_disk_is_all_ranks_error_at_once(tmp_path, verb, alone, number):
    spawn(2, save_or_load, tmp_path, alone, verb)
    met = [json.loads((tmp_path / f"met-{rank}.json").read_text()) for rank in range(2)]
    assert None not in met, "a rank goes on alone"
    for found, file in met:
        assert found == number and file.startswith(str(tmp_path / "checkpoints"))
    assert not list((tmp_path / "checkpoints").glob(".*.tmp"))
