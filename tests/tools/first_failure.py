"""A pytest plugin (-p tests.tools.first_failure): writes to the file named by FIRST_FAILURE which test
failed first, when, and by what.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

VARIABLE = "FIRST_FAILURE"


def pytest_configure(config) -> None:
    import pipeline

    assert Path(pipeline.__file__).is_relative_to(Path.cwd()), (
        "the copy must be tested, not the repository"
    )


def pytest_exception_interact(node, call, report) -> None:
    path = Path(os.environ[VARIABLE])
    if not path.exists():
        error = call.excinfo
        path.write_text(
            json.dumps(
                {
                    "test": node.nodeid,
                    "when": report.when,
                    "type": error.typename,
                    "message": str(error.value),
                }
            )
        )
