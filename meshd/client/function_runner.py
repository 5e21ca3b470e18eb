"""The process of a task whose calls came from a `MeshExecutor`: runs them one after the other, in one warm interpreter.

Reads its part of the pack from stdin. Each result is written to stdout the moment it is there, so that a call which
takes the process down with it (a segmentation fault, `os._exit`, the memory limit) costs none of those before it.
What functions print goes to the task's stderr; their stdin is empty.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress

from meshd.client import calls, pickles

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> int:
    results = _keep_stdout()
    task = int(os.environ["MESHD_TASK"])
    try:
        # Not through sys.stdin, which would keep what it has read ahead.
        with open(0, "rb", closefd=False) as stdin:
            part = calls.read_part(stdin, task)
    except calls.Mismatch as error:
        print(error, file=sys.stderr)
        return 2
    _empty_stdin()
    try:
        function = pickles.load_function(part.function)
    except BaseException as error:
        failure = calls.record(calls.ERROR, pickles.dump_error(error))
        _write(results, calls.record(calls.BEGIN, b"") + failure * len(part.calls) + calls.end_record(0.0))
        return 0
    _write(results, calls.record(calls.BEGIN, b""))
    process = os.getpid()
    began_s = now_s = time.monotonic()
    ends_s = began_s + part.budget_s if part.budget_s else float("inf")
    for call in part.calls:
        if now_s >= ends_s:
            break
        try:
            args, kwargs = pickles.load_call(call)
            answer = calls.record(calls.RESULT, pickles.dump_result(function(*args, **kwargs), function))
        except BaseException as error:  # whatever it raises is its answer, SystemExit too
            if os.getpid() != process:
                raise
            answer = calls.record(calls.ERROR, pickles.dump_error(error))
        if os.getpid() != process:
            return 0  # a child that the function forked, and that came back from it: its parent has the answer
        _write(results, answer)
        now_s = time.monotonic()
    _write(results, calls.end_record(now_s - began_s))
    return 0


def _keep_stdout() -> int:
    """The descriptor for results, which nothing that a function starts inherits; prints go where errors go."""
    results = os.dup(1)
    os.dup2(2, 1)
    return results


def _empty_stdin() -> None:
    """Functions, and what they start, read nothing: the pack holds other calls too."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _end(code: int) -> NoReturn:
    """At once, as a worker of `concurrent.futures`: its results are read when it has ended, so a thread that a function
    has left behind would hold them. Processes left behind are the node's to end.
    """
    for stream in (sys.stdout, sys.stderr):
        # A function may have closed it, or put something else there.
        with suppress(Exception):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _end(main())
