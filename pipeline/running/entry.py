"""What the launch scripts share: arguments, the choice of a cell, errors as one sentence and exit code 2.

deepspeed launch/train.py --config launch/recipes/demo.yaml --method sap --seed 0 --train.lr 2e-4
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import re
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

from pipeline import artifacts
from pipeline.recipe import recipe, strict_yaml
from pipeline.recipe.recipe import Cell, Experiment
from pipeline.recipe.redaction import redact, shielded
from pipeline.running.batch_job import report_error, report_fault
from pipeline.running.runner import STOPPED, SYSTEM_ERROR, Stopped
from pipeline.running.stop_signals import end_with_parent
from pipeline.system import system_errors

BAD_INPUT = 2
INTERRUPTED = 130  # as a shell says of a program that SIGINT ended
_LEAVING = 5.0  # seconds for what is registered with atexit, after a request to leave
_BROKEN_PIPE = 141  # the same of SIGPIPE
_BEHIND_THE_FIRST = 25.0  # seconds that a node's other ranks leave its first to say the same: it may deliver to MLflow for 20 before it ends
_BEHIND_ANOTHER = 2.0  # the same for a rank that notices another one's end
_ANOTHER_RANK = re.compile(r"Connection (closed|reset) by peer|remote process exited|recv, got 0 bytes|Broken pipe")  # gloo, NCCL, c10d's store


def arguments(description: str, argv: list[str] | None = None, checkable: bool = False) -> tuple[argparse.Namespace, Experiment]:
    """Parse a launch script's command line and load its recipe. checkable: whether the script knows --check."""
    parser = argparse.ArgumentParser(description=description, epilog="Any field of the recipe can be overridden: --train.lr 2e-4")
    parser.add_argument("--config", required=True, help="path of the recipe")
    parser.add_argument("--method", help="method of the recipe; needed where it has several")
    parser.add_argument("--seed", type=int, help="seed of the recipe; needed where it has several")
    if checkable:
        parser.add_argument("--check", action="store_true", help="check what can be checked before weights are read or ranks meet, and stop")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    options, rest = parser.parse_known_args(argv)
    if options.local_rank is not None and options.local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    return options, open_recipe(options.config, strict_yaml.parse_overrides(rest))


def open_recipe(given: str, overrides: dict[str, Any]) -> Experiment:
    """`recipe.load`, and a line on stderr where a shipped recipe stands in for a file that is not there.

    What this process writes from now on has the recipe's permissions.
    """
    experiment = recipe.load(given, overrides)
    artifacts.keep_from_others(experiment.base.umask)
    if experiment.path != Path(given) and os.environ.get("RANK", "0") == "0":
        print(f"no file {Path(given).absolute()}: the recipe is the shipped {experiment.path}", file=sys.stderr)
    return experiment


def recipe_given(module: str) -> Experiment:
    """The recipe that `python -m MODULE RECIPE [--dotted.override value]` names. ValueError without one."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise ValueError(f"give a recipe: python -m {module} launch/recipes/compare.yaml [--dotted.override value]")
    return open_recipe(sys.argv[1], strict_yaml.parse_overrides(sys.argv[2:]))


def choose_cell(experiment: Experiment, method: str | None, seed: int | None) -> Cell:
    """The one cell meant; ValueError listing the choices where there are several, or where there is none such."""
    methods, seeds = list(experiment.base.methods), list(experiment.base.seeds)
    if method is None and len(methods) > 1:
        raise ValueError(f"{experiment.path} has the methods {', '.join(methods)}: choose one with --method")
    if seed is None and len(seeds) > 1:
        raise ValueError(f"{experiment.path} has the seeds {', '.join(map(str, seeds))}: choose one with --seed")
    return experiment.cell(method or methods[0], seeds[0] if seed is None else seed)


def guarded(main: Callable[[], int | None]) -> int:
    """Run main; what goes wrong by the input, by the system or on request becomes one sentence on stderr and an exit code, without a traceback.

    ValueError: 2. What the system is behind (system_errors.py): 74. Stopped: 75. KeyboardInterrupt: 130. Whoever reads our
    output may leave before its end: 0 where all that was left to do was to print, else 141. A rank whose connection to
    another one breaks: 1. Any other passes.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    try:
        with shielded():
            return _guarded(main)
    finally:
        os.umask(umask)  # a recipe's permissions are those of the command that opens it


def _guarded(main: Callable[[], int | None]) -> int:
    try:
        code = main() or 0
        with system_errors.naming(Path("standard output")):
            sys.stdout.flush()  # here, where an error of it is still ours to tell
        return code
    except (Exception, KeyboardInterrupt) as error:
        found = system_errors.behind(error)
        if found is None and not _is_expected(error):
            raise
        code = _told(found or error)
        if os.environ.get("SAP_DEBUG"):
            raise
        return code


def _is_expected(error: BaseException) -> bool:
    """Whether an exception with which the system has nothing to do is told in one sentence; others are faults of ours."""
    if isinstance(error, RuntimeError):
        return os.environ.get("WORLD_SIZE", "1") != "1" and _ANOTHER_RANK.search(str(error)) is not None
    # io.UnsupportedOperation is both.
    return isinstance(error, KeyboardInterrupt | ValueError) and not isinstance(error, OSError)


def _told(error: BaseException) -> int:
    """Tell the user and the batch script of the error; returns the exit code that it stands for."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if isinstance(error, ValueError):  # once a node: a path may be missing on one node only
        sentence = redact(str(error))
        if not isinstance(error, artifacts.Busy):
            report_error(sentence)
        return _say(f"error: {sentence}", BAD_INPUT) if first else BAD_INPUT
    if isinstance(error, Stopped):
        return _say(f"stopped on request ({error}): run the same command again to go on", STOPPED)
    if isinstance(error, KeyboardInterrupt):
        return _say("interrupted", INTERRUPTED) if first else INTERRUPTED
    if isinstance(error, RuntimeError):
        time.sleep(_BEHIND_ANOTHER)  # where that rank has told why it ends, the launcher ends this one now; it may have been killed, or its node is lost
        return _say("error: the connection to another rank is lost: it has ended, or its node is gone; its own words say why", 1) if first else 1
    gone = [stream for stream in (sys.stdout, sys.stderr) if _unusable(stream)]
    for stream in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or the interpreter would try, and complain, once more
    if isinstance(error, BrokenPipeError) and gone:
        return _BROKEN_PIPE if sys.stderr in gone else 0  # stages tell their progress on stderr; stdout gets what is printed in the end
    if gone and error.filename is None:
        error.filename = "standard output" if sys.stdout in gone else "standard error"
    sentence = redact(system_errors.sentence(error))
    report_fault(sentence)
    if not first:
        time.sleep(_BEHIND_THE_FIRST)  # where all fail alike the first has said it by then, and the launcher ends the others
    return _say(f"error: {sentence}", SYSTEM_ERROR)


def _say(sentence: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    with contextlib.suppress(OSError):  # the log may be on the disk that is full
        print(sentence if rank == "0" else f"{sentence} (rank {rank})", file=sys.stderr, flush=True)
    return code


def _unusable(stream: TextIO) -> bool:
    """Whether what the stream still holds cannot be written: its reader is gone, or its disk is full."""
    try:
        stream.flush()
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(events & select.POLLERR for _, events in poll.poll(0))
    except ValueError:  # no file behind it
        return False
    except OSError:
        return True


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run main, guarded, and end the process with its exit code; a traceback is redacted as all else is. Where the `sap` that has started it has ended meanwhile, it does not begin."""
    with shielded():
        try:
            code = guarded(main) if end_with_parent() else STOPPED
        except Exception:
            traceback.print_exc()
            code = 1
    end(code)


def end(code: int) -> NoReturn:
    """End this process without the interpreter's finalization.

    Threads of communication libraries may outlive the process group. One that asks for the interpreter while it finalizes is ended
    in the middle of C++ code, and a rank that has done all its work aborts: "terminate called without an active exception", seen
    once in some hundred launches. What is registered with atexit still runs, and output is flushed.

    After a request to leave it runs for a while only. The request may have come while two threads imported, as MLflow's
    and our own do: the lock of imports was then seen to stay taken, and libraries (torch) import when they leave.
    """
    if code in (STOPPED, INTERRUPTED):
        threading.Thread(target=_leave, args=(code,), daemon=True).start()
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _leave(code: int) -> NoReturn:
    time.sleep(_LEAVING)
    os._exit(code)
