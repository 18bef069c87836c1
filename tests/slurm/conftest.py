"""One cluster, and one chain that nobody disturbs, for all tests that ask for them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.site import SEEN, Site, Stopwatch, opened


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's own paths are too long for sockets
    try:
        with opened(folder) as site:
            yield site
        print(
            "\n"
            + "\n".join(f"| {fault} | {what} | {seconds:.0f} s |" for fault, what, seconds in SEEN)
        )
    finally:
        if os.environ.get("KEEP_SLURM"):
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder)


@pytest.fixture
def nothing_left(site) -> Iterator[None]:
    """A test that failed leaves no job behind for the next."""
    yield
    site.shell("scancel", "--user=root", check=False)


@pytest.fixture(scope="session")
def undisturbed(site) -> Path:
    """The whole chain through slurm/submit.sh, evaluation in two shards;
    what every fault's adapter is compared with.
    """
    output = site.output("undisturbed")
    clock = Stopwatch()
    jobs = site.chain(output, "--shards", "2")
    site.wait(jobs["report"], seconds=1100)
    SEEN.append(
        (
            "none: the whole chain",
            "prepare, direction, two trainings, eight evaluation tasks, report",
            clock(),
        )
    )
    site.upstream = output / "tiny"
    site.jobs, site.submitted = jobs, site.printed
    return output
