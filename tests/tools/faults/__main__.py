"""Faults at random moments and places of the chain; after each the same command must end with identical artefacts.

    python -m tests.tools.faults --minutes 5 --seed 0 [--engines single,zero3,fsdp2] \\
        [--kinds "a bit flipped,..."] [--json faults.json]

Or with a refusal that names the file, after which it is removed as the sentence says, and the command run again.
Anything else is a loss: other artefacts, a hang, a traceback, processes left behind. Exit code 1 where there was one.
Every trial's seed is printed: with --trial SEED it is repeated, as far as the machine's own timing lets it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.tools.faults.chain import ENGINES, Chain, products
from tests.tools.faults.kinds import FAULTS
from tests.tools.faults.trial import Verdict, tried

RESULTS = ("identical", "refused", "lost")
ROOM = 768  # MiB of the small file system that a trial runs on


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own for the trials, where this user may mount one; else a folder."""
    room = folder / "room"
    room.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={ROOM}m", "tmpfs", str(room)], capture_output=True
    ).returncode  # fmt: skip
    if not mounted:
        print(
            "note: no file system of their own for the trials (that takes root): the disk is never full",
            file=sys.stderr,
        )
    try:
        yield room
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(room)], check=True)


def main() -> int:
    options = _options()
    deadline, verdicts = time.monotonic() + 60 * options.minutes, []
    kinds = options.kinds.split(",") if options.kinds else list(FAULTS)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        with small_disk(folder) as room:
            chains = {}
            for engine in options.engines.split(","):
                chain = Chain(folder / engine, engine)
                undisturbed = chain.folder / "undisturbed"
                ended = chain.run(undisturbed)
                if ended.code:
                    raise SystemExit(
                        f"without a fault the chain ends with {ended.code}:\n{ended.said}"
                    )
                chains[engine] = (chain, products(undisturbed), undisturbed)
                print(f"[faults] {engine}: undisturbed, {len(chains[engine][1])} files", flush=True)
            number = 0
            while time.monotonic() < deadline and not (options.trial is not None and number):
                seed = options.seed * 1_000_000 + number if options.trial is None else options.trial
                # Every kind in turn, and every engine with every kind: the sum of round and kind.
                kind, engine = (
                    kinds[number % len(kinds)],
                    list(chains)[sum(divmod(number, len(kinds))) % len(chains)],
                )
                chain, expected, undisturbed = chains[engine]
                number += 1
                verdict = tried(chain, expected, undisturbed, kind, seed, room)
                if verdict is not None:
                    verdicts.append(verdict)
                    print(
                        f"[faults] {seed} {engine}, {kind} ({verdict.told}): "
                        f"{verdict.result}{f', {verdict.reason}' if verdict.reason else ''}, "
                        f"{verdict.runs} runs",
                        flush=True,
                    )
        if options.json:
            options.json.write_text(
                json.dumps([verdict.as_dict() for verdict in verdicts], indent=1) + "\n"
            )
        print(table(verdicts))
        lost = [verdict for verdict in verdicts if verdict.result == "lost"]
        if lost:
            print(
                f"{len(lost)} of {len(verdicts)} lost; what was printed: {folder / 'lost'}",
                file=sys.stderr,
            )
        return int(bool(lost) or not verdicts)
    finally:
        if not any(verdict.result == "lost" for verdict in verdicts):
            shutil.rmtree(folder, ignore_errors=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="after which no trial is begun; default 5"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of kinds' moments and places; default 0"
    )
    parser.add_argument(
        "--engines", default=",".join(ENGINES), help=f"by commas; default {','.join(ENGINES)}"
    )
    parser.add_argument("--kinds", help=f"by commas, some of: {', '.join(FAULTS)}; default all")
    parser.add_argument(
        "--trial",
        type=int,
        help="repeat the one trial of this seed; name its engine and kind as well",
    )
    parser.add_argument("--json", type=Path, help="file for every verdict")
    options = parser.parse_args()
    for name, known in (("engines", ENGINES), ("kinds", tuple(FAULTS))):
        for each in (getattr(options, name) or "").split(","):
            if each and each not in known:
                parser.error(f"--{name} names '{each}': it takes some of {', '.join(known)}")
    return options


def table(verdicts: list[Verdict]) -> str:
    """Kinds by results, as Markdown."""
    counted = Counter((verdict.kind, verdict.result) for verdict in verdicts)
    lines = [
        f"| fault | tried | {' | '.join(RESULTS)} |",
        f"| --- |{' --- |' * (1 + len(RESULTS))}",
    ]
    for kind in dict.fromkeys(verdict.kind for verdict in verdicts):
        counts = [counted[kind, result] for result in RESULTS]
        lines.append(f"| {kind} | {sum(counts)} | {' | '.join(map(str, counts))} |")
    totals = [sum(verdict.result == result for verdict in verdicts) for result in RESULTS]
    lines.append(f"| all | {len(verdicts)} | {' | '.join(map(str, totals))} |")
    engines = Counter(verdict.engine for verdict in verdicts)
    return "\n".join(
        [
            *lines,
            "",
            "engines: " + ", ".join(f"{engine} {count}" for engine, count in engines.items()),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
