"""How calls travel: the pack that the tasks of a job read as their input, and the records that each task leaves.

    pack    magic, Python's version, number of tasks │ where each task's part begins │ functions │ parts
    part    where its function is, budget, number of calls │ length of each │ each call, pickled
    record  kind, length │ payload

Bytes only: what is in them is pickled and unpickled by `meshd.client.pickles`. The standard library only, and little
of it: a task's process begins with this module.
"""

from __future__ import annotations

import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import IO

MAGIC = b"meshcall"

BEGIN = b"b"
"""Its function is loaded: what comes to an end after this is the doing of a call."""
RESULT = b"r"
"""What the next call returned, pickled."""
ERROR = b"e"
"""What the next call raised, as `pickles.dump_error` makes it."""
END = b"."
"""No more calls are run here. The payload is the seconds that the calls took."""

_head = struct.Struct("<8sBBxxI")
_where = struct.Struct("<Q")
_part = struct.Struct("<QIdI")
_length = struct.Struct("<I")
_record = struct.Struct("<cI")
_seconds = struct.Struct("<d")


class Part:
    """One task's share of a pack: calls of one function, in order."""

    __slots__ = ("budget_s", "calls", "function")

    def __init__(self, function: bytes, calls: Sequence[bytes], budget_s: float = 0.0) -> None:
        """With a budget, no call is begun after so many seconds; the others are handed back. 0 is no limit."""
        self.function = function
        self.calls = calls
        self.budget_s = budget_s


class Mismatch(Exception):
    """The pack was made by another version of Python, whose pickled functions this one cannot run."""


def pack(parts: Sequence[Part]) -> bytes:
    """Each function is in it once, however many tasks call it."""
    functions: dict[bytes, int] = {}
    chunks = [_head.pack(MAGIC, *sys.version_info[:2], len(parts)), b""]
    at = _head.size + _where.size * len(parts)
    for part in parts:
        if part.function not in functions:
            functions[part.function] = at
            chunks.append(part.function)
            at += len(part.function)
    begins: list[int] = []
    for part in parts:
        begins.append(at)
        lengths = [len(call) for call in part.calls]
        head = _part.pack(functions[part.function], len(part.function), part.budget_s, len(lengths))
        chunks += [head, struct.pack(f"<{len(lengths)}I", *lengths), *part.calls]
        at += len(head) + _length.size * len(lengths) + sum(lengths)
    chunks[1] = b"".join(map(_where.pack, begins))
    return b"".join(chunks)


def read_part(file: IO[bytes], task: int) -> Part:
    """A task's own part; the rest of the pack is not read. Raises Mismatch, ValueError for what is no pack."""
    magic, major, minor, count = _head.unpack(_exactly(file, _head.size))
    if magic != MAGIC or task >= count:
        raise ValueError(f"this input has no calls for task {task}")
    if (major, minor) != sys.version_info[:2]:
        here = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise Mismatch(f"the caller runs Python {major}.{minor}, this node's {sys.executable} is {here}")
    file.seek(_head.size + _where.size * task)
    file.seek(_where.unpack(_exactly(file, _where.size))[0])
    function_at, function_size, budget_s, calls = _part.unpack(_exactly(file, _part.size))
    lengths = struct.unpack(f"<{calls}I", _exactly(file, _length.size * calls))
    found = [_exactly(file, length) for length in lengths]
    file.seek(function_at)
    return Part(_exactly(file, function_size), found, budget_s)


def record(kind: bytes, payload: bytes) -> bytes:
    return _record.pack(kind, len(payload)) + payload


def end_record(seconds: float) -> bytes:
    return record(END, _seconds.pack(seconds))


def read_records(data: bytes) -> tuple[list[tuple[bytes, bytes]], float | None]:
    """How each call that was run ended, in order; and their seconds, None when the process did not come to its end.

    What a process that died had half written is left out.
    """
    found: list[tuple[bytes, bytes]] = []
    at = 0
    while at + _record.size <= len(data):
        kind, length = _record.unpack_from(data, at)
        at += _record.size
        if at + length > len(data):
            break
        payload = data[at : at + length]
        at += length
        if kind == END:
            return found, _seconds.unpack(payload)[0]
        found.append((kind, payload))
    return found, None


def _exactly(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise ValueError("this input of calls is cut short")
    return data
