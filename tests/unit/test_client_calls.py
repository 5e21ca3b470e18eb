"""Calls as bytes, and the process that runs them: what it writes, whatever the calls do."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from meshd.client import calls, pickles
from meshd.client.calls import BEGIN, ERROR, RESULT, Part


def run(
    function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], *, budget_s: float = 0.0, data: bytes = b""
) -> tuple[list[Any], float | None, subprocess.CompletedProcess[bytes]]:
    """Results and exceptions as a caller sees them, in a process as a node starts it."""
    part = Part(pickles.dump_function(function), [pickles.dump_call(each, {}) for each in arguments], budget_s)
    with tempfile.TemporaryFile() as stdin:
        stdin.write(data or calls.pack([part]))
        stdin.seek(0)
        done = subprocess.run(
            [sys.executable, "-m", "meshd.client.function_runner"],
            stdin=stdin, capture_output=True, env={**os.environ, "MESHD_TASK": "0"}, timeout=20,
        )  # fmt: skip
    records, seconds = calls.read_records(done.stdout)
    if records:
        assert records.pop(0) == (BEGIN, b"")
    load = {RESULT: pickles.load_result, ERROR: pickles.load_error}
    return [load[kind](payload) for kind, payload in records], seconds, done


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_each_task_reads_its_own_part_and_a_function_travels_once() -> None:
    shared = b"F" * 10_000
    data = calls.pack([Part(shared, [b"a", b""], 0.5), Part(b"g", []), Part(shared, [b"c"])])
    assert data.count(shared) == 1
    found = [calls.read_part(io.BytesIO(data), task) for task in range(3)]
    assert [(part.function, list(part.calls), part.budget_s) for part in found] == [
        (shared, [b"a", b""], 0.5), (b"g", [], 0.0), (shared, [b"c"], 0.0),
    ]  # fmt: skip


@pytest.mark.parametrize("cut", [0, 5, 20, -1])
def test_a_pack_that_is_cut_short_is_refused(cut: int) -> None:
    data = calls.pack([Part(b"function", [b"call"])])
    with pytest.raises(ValueError, match="cut short"):
        calls.read_part(io.BytesIO(data[:cut]), 0)


def test_records_end_where_a_process_died() -> None:
    whole = calls.record(RESULT, b"one") + calls.record(ERROR, b"two")
    assert calls.read_records(whole + calls.end_record(1.5)) == ([(RESULT, b"one"), (ERROR, b"two")], 1.5)
    for cut in range(len(calls.record(RESULT, b"one")), len(whole)):
        assert calls.read_records(whole[:cut]) == ([(RESULT, b"one")], None)


# --- the process ------------------------------------------------------------------------------------------------------


def test_results_come_in_order_and_what_is_printed_does_not_disturb_them() -> None:
    def shout(word: str) -> str:
        print("printed", word)
        os.system("echo from a child")
        return word.upper()

    found, seconds, done = run(shout, [("a",), ("b",)])
    assert found == ["A", "B"] and seconds is not None
    assert b"printed a" in done.stderr and b"from a child" in done.stderr


def test_an_exception_is_an_answer_with_its_remote_traceback() -> None:
    def picky(number: int) -> int:
        if number == 1:
            raise KeyError("no one")
        if number == 2:
            sys.exit(3)
        return number

    found, _, done = run(picky, [(0,), (1,), (2,), (3,)])
    assert done.returncode == 0
    assert [found[0], found[3]] == [0, 3]
    assert isinstance(found[1], KeyError) and found[1].args == ("no one",)
    assert 'raise KeyError("no one")' in str(found[1].__cause__) or "in picky" in str(found[1].__cause__)
    assert isinstance(found[2], SystemExit)


def test_an_exception_that_cannot_be_carried_over_is_named() -> None:
    def awkward() -> None:
        class Awkward(Exception):
            def __init__(self, one: int, two: int) -> None:
                super().__init__("says this")

        raise Awkward(1, 2)

    def unpicklable() -> object:
        return (letter for letter in "abc")

    found, _, _ = run(awkward, [()])
    assert isinstance(found[0], pickles.RemoteError) and "Awkward: says this" in str(found[0])
    found, _, _ = run(unpicklable, [()])
    assert isinstance(found[0], TypeError) and "generator" in str(found[0])
    (note,) = found[0].__notes__
    assert "the result of" in note and "unpicklable" in note


def test_a_function_and_what_it_starts_read_nothing_of_the_calls_around_it() -> None:
    def read(secret: str) -> tuple[str, bytes]:
        try:
            said = input()
        except EOFError:
            said = "nothing"
        return said, subprocess.run(["cat"], capture_output=True).stdout

    # More of them than the reader of the pack takes into its buffer.
    found, _, _ = run(read, [("secret " * 2000,), ("secret " * 2000,)])
    assert found == [("nothing", b"")] * 2


def test_a_call_that_takes_the_process_down_costs_none_of_those_before_it() -> None:
    def careless(number: int) -> int:
        if number == 2:
            os._exit(9)
        return number

    found, seconds, done = run(careless, [(0,), (1,), (2,), (3,)])
    assert (found, seconds, done.returncode) == ([0, 1], None, 9)


def test_a_forked_child_that_comes_back_answers_no_call() -> None:
    def fork(ends: str) -> tuple[str, int] | str:
        child = os.fork()
        if child:
            return "parent", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if ends == "badly":
            raise LookupError("in the child")
        print("the child was here")
        return "child"

    found, seconds, done = run(fork, [("well",), ("badly",), ("well",)])
    assert found == [("parent", 0), ("parent", 1), ("parent", 0)] and seconds is not None
    assert b"the child was here" in done.stderr and b"in the child" in done.stderr


def test_a_thread_that_a_function_leaves_behind_holds_no_result() -> None:
    def leave(word: str) -> str:
        threading.Thread(target=time.sleep, args=(3600,)).start()
        print("printed", word)
        return word

    found, seconds, done = run(leave, [("a",), ("b",)])
    assert found == ["a", "b"] and seconds is not None and done.returncode == 0
    assert b"printed b" in done.stderr


def test_what_the_budget_does_not_cover_is_handed_back() -> None:
    def slow(number: int) -> int:
        time.sleep(0.05)
        return number

    found, seconds, _ = run(slow, [(number,) for number in range(20)], budget_s=0.12)
    assert found == list(range(len(found))) and 1 <= len(found) <= 4
    assert seconds is not None and seconds >= 0.05
    found, _, _ = run(slow, [(1,), (2,)], budget_s=1e-9)
    assert found == [1], "one call is always run"


def test_a_function_that_cannot_be_loaded_is_the_answer_to_each_call() -> None:
    part = Part(b"cno_such_module\nfunction\n.", [pickles.dump_call((), {})] * 2)
    found, seconds, done = run(len, [], data=calls.pack([part]))
    assert done.returncode == 0 and seconds == 0.0
    assert [type(error) for error in found] == [ModuleNotFoundError] * 2


def test_what_the_node_lacks_comes_with_its_remedy() -> None:
    data = calls.pack([Part(b"cmymod.part\nfunction\n.", [pickles.dump_call((), {})])])
    (error,), _, _ = run(len, [], data=data)
    (remedy,) = error.__notes__
    assert "cloudpickle.register_pickle_by_value(mymod)" in remedy

    class Far:
        def __reduce__(self) -> tuple[object, ...]:
            return __import__, ("mymod",)

    (error,), _, _ = run(len, [(Far(),)])
    assert isinstance(error, ModuleNotFoundError) and error.__notes__ == [remedy]


def test_another_version_of_python_is_refused_in_words() -> None:
    data = bytearray(calls.pack([Part(pickles.dump_function(len), [])]))
    data[9] += 1
    found, _, done = run(len, [], data=bytes(data))
    assert done.returncode == 2 and not found
    assert b"the caller runs Python" in done.stderr


def test_the_process_starts_without_what_it_does_not_need() -> None:
    code = "import meshd.client.function_runner, sys; print({'msgspec', 'cloudpickle', 'ssl', 'traceback', 'meshd.client.client'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "set()\n", done.stderr
