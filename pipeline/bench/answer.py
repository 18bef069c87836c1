"""One call of a function, in this process.

`python pipeline/bench/answer.py FOLDER` reads FOLDER/asked, [sys.path, "module:function", its arguments], and writes
FOLDER/answer: [null, what it returns], [what failed, null], or [what failed, the system's error in parts]. JSON, in
which {"Case": {...}} stands for a case of cases.py. processes.py starts it.
"""

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any


def main(folder: Path) -> int:
    """Call the function that `folder`/asked names, and leave its answer, or what went wrong, in the folder."""
    sys.path[:], function, given = json.loads((folder / "asked").read_text())
    module, name = function.split(":")
    answer: tuple[str | None, Any]
    try:
        from pipeline.bench.cases import Case  # after the path is known

        arguments = [
            Case(**value["Case"]) if isinstance(value, dict) and "Case" in value else value
            for value in given
        ]
        answer = None, getattr(importlib.import_module(module), name)(*arguments)
        text = json.dumps(answer)
    except Exception as error:  # whatever it is, it is the caller's to say
        from pipeline.system.system_errors import behind, parts

        met = behind(error)
        if met is None:
            traceback.print_exc()
        answer = (
            f"failed: {''.join(traceback.format_exception_only(error)).strip()}",
            None if met is None else parts(met),
        )
        text = json.dumps(answer)
    (folder / "half").write_text(text)
    (folder / "half").rename(folder / "answer")
    return int(answer[0] is not None)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    from pipeline.running.entry import end  # after the path is known

    end(code)
