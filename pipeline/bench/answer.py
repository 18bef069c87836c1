"""One call of a function, in this process.

`python pipeline/bench/answer.py FOLDER` reads FOLDER/asked, (sys.path, "module:function", its pickled arguments), and
writes FOLDER/answer: (None, what it returns) or (what failed, None). processes.py starts it.
"""

import importlib
import pickle
import sys
import traceback
from pathlib import Path


def main(folder: Path) -> int:
    sys.path[:], function, given = pickle.loads((folder / "asked").read_bytes())
    module, name = function.split(":")
    try:
        answer = None, getattr(importlib.import_module(module), name)(*pickle.loads(given))
    except Exception as error:  # whatever it is, it is the caller's to say
        traceback.print_exc()
        answer = f"failed: {''.join(traceback.format_exception_only(error)).strip()}", None
    (folder / "half").write_bytes(pickle.dumps(answer))
    (folder / "half").rename(folder / "answer")
    return int(answer[0] is not None)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    from pipeline.entry import end  # after the path is known

    end(code)
