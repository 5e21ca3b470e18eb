"""The items of an array: how many lines a list has, and what a task is given.

A submission counts the lines of a list and a node splits them, at different times and places:
both are here, so that what is counted is what is split. Only `\\n` ends a line, or `\\r\\n`; a
last line may be without. Text that merely looks like an end (form feed, U+2028) is an item's own.
"""

from __future__ import annotations

from array import array

from meshd.errors import InvalidRequest, TooLarge
from meshd.model import ItemsBlob, ItemsFiles, ItemsInline, ItemsRange, JobSpec, Run

LIST_BYTES_MAX = 64 << 20
"""Of what the tasks of an array share: every node that runs one of them has it in memory."""

LISTS_BYTES_KEPT = 2 * LIST_BYTES_MAX
"""So much of several lists, with what was used last."""

ITEM_BYTES_MAX = (128 << 10) - len("MESHD_ITEM=\0")
"""No kernel passes a longer string (MAX_ARG_STRLEN). The same for wasm: whether an item is good is no matter of the backend."""

STRINGS_BYTES_MAX = 2 << 20
"""Of arguments and environment together: what execve takes with the usual stack of 8 MiB."""


class LineCount:
    """As the bytes of a list come."""

    def __init__(self) -> None:
        self._newlines = 0
        self._last = b"\n"

    def add(self, data: bytes) -> None:
        self._newlines += data.count(b"\n")
        self._last = data[-1:] or self._last

    @property
    def lines(self) -> int:
        return self._newlines + (self._last != b"\n")


class Lines:
    """The lines of a list in its own bytes: a string for each would take several times as much.

    Where each one ends is looked for at the start, some 0.1 s for a million: not in a loop.
    """

    def __init__(self, data: bytes = b"") -> None:
        self._data = data
        self._ends = array("L")
        end = data.find(b"\n")
        while end >= 0:
            self._ends.append(end)
            end = data.find(b"\n", end + 1)
        if data and not data.endswith(b"\n"):
            self._ends.append(len(data))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> str:
        start, end = self._ends[number - 1] + 1 if number else 0, self._ends[number]
        line = self._data[start:end]
        return (line.removesuffix(b"\r") if end < len(self._data) else line).decode(errors="replace")

    @property
    def size(self) -> int:
        """In memory, bytes."""
        return len(self._data) + len(self._ends) * self._ends.itemsize


def item_of(task: int, spec: JobSpec, lines: Lines) -> str:
    """`lines` of an `ItemsBlob`. Raises InvalidRequest."""
    match spec.array.items:
        case None | ItemsFiles():
            item = str(task)
        case ItemsRange(start, step):
            item = str(start + task * step)
        case ItemsInline(items):
            if task >= len(items):
                raise InvalidRequest(f"the job has {len(items)} items, task {task} has none")
            item = items[task]
        case ItemsBlob():
            if task >= len(lines):
                raise InvalidRequest(f"the list of items has {len(lines)} lines, task {task} has none")
            item = lines[task]
    if "\0" in item:
        raise InvalidRequest("environment variable MESHD_ITEM contains a NUL character")
    if (size := len(item.encode())) > ITEM_BYTES_MAX:
        raise TooLarge(
            f"the item of task {task} has {size} bytes, over the limit of {ITEM_BYTES_MAX} for a variable",
            hint="put what is long into files: array.files, inputs",
        )
    return item


class Strings:
    """Arguments and environment of a job, measured before they are made: `{item}` may stand in them thousands of times."""

    def __init__(self, run: Run) -> None:
        given = [*run.args, *(f"{name}={value}" for name, value in run.env), "MESHD_ITEM="]
        places = sum(argument.count("{item}") for argument in run.args)
        self._places = places + 1
        self._fixed = sum(len(each.encode()) + 1 for each in given) - places * len("{item}")

    def bytes_with(self, item: str) -> int:
        """Each with its NUL."""
        return self._fixed + self._places * len(item.encode())

    def check(self, item: str) -> None:
        """Raises TooLarge."""
        if (size := self.bytes_with(item)) > STRINGS_BYTES_MAX:
            raise TooLarge(
                f"arguments and environment would take {size} bytes with this item, over the limit of {STRINGS_BYTES_MAX}",
                hint="pass what is long by stdin or inputs",
            )
