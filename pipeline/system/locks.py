"""Locks between processes, on an open file.

with path.open("w") as stream:
    if locked(stream, wait=False): ...
"""

from __future__ import annotations

import fcntl
import os
import warnings
from pathlib import Path
from typing import IO

_told: set[int] = set()  # devices of which it has been said that they have no locks


def locked(stream: IO[str], wait: bool) -> bool:
    """Whether this process has the lock of a file that it has opened, until it closes it.

    Another one's is waited for, or False. True, too, on a file system without locks, as some network mounts are:
    nothing could be done there otherwise. That is said once for each of them.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        device = os.fstat(stream.fileno()).st_dev
        if device not in _told:
            _told.add(device)
            reason = os.strerror(error.errno or 0)
            warnings.warn(
                f"{Path(stream.name).parent} cannot lock files ({reason}): processes that write the "
                "same there do not see each other, so start no two at once",
                stacklevel=2,
            )
    return True
