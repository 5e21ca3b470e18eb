"""A segment of the history, from a disk or another server, and what is answered from it.

May be raised: Corrupt. Whether a job that could be read is a right one is another matter, as in `snapshot`. Its bytes have the agreed hash before anybody reads them, but for a disk that rots afterwards.
The first byte of a frame: 0 a whole segment; 1 an entry, 2 a piece of rows, with the right head and checksum; 3 either as it is.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress

from fuzz.inputs import join, split
from fuzz.targets import machine as commands
from fuzz.targets.snapshot import _state_after
from meshd import codec
from meshd.errors import Corrupt, MeshError
from meshd.history.reading import explanation, pieces_of, tasks_page
from meshd.history.segment import Entry, entries, pack, read_entry, read_rows
from meshd.model import FINAL_STATES
from meshd.raft.state.machine import Machine
from meshd.raft.state.queries import choose_tasks, job_view
from meshd.raft.state.ranges import Ranges
from meshd.views import Explain, ListJobs, ListTasks

FRAMED = True
NUMBER = 7


def fuzz(data: bytes) -> None:
    for frame in split(data):
        kind, body = (frame[0] % 4 if frame else 0), frame[1:]
        with suppress(Corrupt):
            match kind:
                case 0:
                    for _, entry in entries(NUMBER, body):
                        _answer(entry)
                case 1:
                    _answer(read_entry(_framed(2, body)))
                case 2:
                    read_rows(_framed(1, body))
                case _:
                    _answer(read_entry(body))


def _framed(kind: int, body: bytes) -> bytes:
    return struct.pack("<BII", kind, len(body), zlib.crc32(body, kind)) + body


def _answer(entry: Entry) -> None:
    """As an archive does, but for the rows."""
    job = entry.record.job()
    codec.encode(job_view(job, 1))
    covered = Ranges.of(span for tasks in job.ended.values() for span in tasks)
    if len(covered) != job.spec.array.count or next(iter(covered))[0] != 0:
        return  # tasks that have ended twice, and others not at all
    codec.encode(job.state)
    query = ListTasks(job.id, limit=20)
    with suppress(MeshError):
        chosen, after = choose_tasks(job, query)
        pieces_of(entry.pieces, [task for task, _ in chosen])
        codec.encode(tasks_page(job, chosen, after, {}, 1))
        codec.encode(explanation(job, Explain(job.id, 0), None))


# --- seeds ------------------------------------------------------------------------------------------------------------


def seeds() -> Iterator[bytes]:
    """What the machine's own seeds lead to, as far as it has ended."""
    for data in commands.seeds():
        machine = Machine()
        machine.restore(_state_after(data))
        views = machine.answer(ListJobs(states=tuple(FINAL_STATES), limit=50)).jobs
        records = [job.recorded() for view in views if (job := machine.find(view.id)) is not None]
        if records:
            segment = b"".join(pack(NUMBER, records))
            yield join([b"\x00" + segment])
            for frame, _ in entries(NUMBER, segment):
                yield join([b"\x01" + frame[9:], b"\x03" + frame])
    yield join([b"\x00", b"\x01", b"\x02\x80", b"\x03\xff", b"\x00meshdhi1" + NUMBER.to_bytes(8, "little") + b"\x02"])
