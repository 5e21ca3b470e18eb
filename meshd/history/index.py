"""The finished jobs of all segments in one SQLite file: found by id, prefix, name and label, in pages, newest first.

It holds nothing that the segments do not: lost, damaged or of another version it is made anew. Everything
here blocks and belongs in a thread; one connection writes, another reads, so that a question does not
wait for a segment that is being taken in. Jobs of segments outside of the asked bounds are not there:
one that is indexed before the core has dropped it is not seen twice.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from heapq import merge
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

from meshd.errors import Corrupt, Unavailable
from meshd.history.segment import Entry, entries, read_entry
from meshd.model import FINAL_STATES, JobId, TaskState
from meshd.raft.state.jobs import Job
from meshd.raft.state.queries import PAGE_BYTES, PREFIX_CHARS_MIN, page_limit, several_jobs
from meshd.views import ListJobs

VERSION = 1
SCAN_MAX = 10_000
"""Jobs looked at for one page, about 50 ms: it may be short, or empty, and still have a `next`."""
CACHE_KIB = 4096

_PASSING = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR}
)

_STATES = {state: number for number, state in enumerate(TaskState)}

_TABLES = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY, id BLOB NOT NULL UNIQUE, state INTEGER NOT NULL, name TEXT,
    segment INTEGER NOT NULL, frame BLOB NOT NULL
);
CREATE INDEX by_state ON jobs (state, id);
CREATE INDEX by_name ON jobs (name, state, id) WHERE name IS NOT NULL;
CREATE INDEX by_segment ON jobs (segment);
CREATE TABLE labels (label TEXT NOT NULL, state INTEGER NOT NULL, id BLOB NOT NULL, PRIMARY KEY (label, state, id))
    WITHOUT ROWID;
CREATE TABLE segments (number INTEGER PRIMARY KEY, hash TEXT NOT NULL);
"""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Bounds:
    """Segments of the history as of one moment."""

    oldest: int
    newest: int

    def __contains__(self, segment: int) -> bool:
        return self.oldest <= segment <= self.newest


@dataclass(frozen=True, slots=True)
class Archived:
    """A finished job, without its rows, and where these are."""

    segment: int
    entry: Entry
    job: Job


@dataclass(frozen=True, slots=True)
class Content:
    """A segment as rows of the tables."""

    segment: int
    jobs: list[tuple[object, ...]]
    labels: list[tuple[object, ...]]


def content_of(segment: int, data: bytes) -> Content:
    """Raises Corrupt when this is no such segment."""
    jobs: list[tuple[object, ...]] = []
    labels: list[tuple[object, ...]] = []
    for frame, entry in entries(segment, data):
        record = entry.record
        job, state = key_of(record.id), _STATES[record.job().state]
        jobs.append((record.number, job, state, record.spec.name or None, segment, frame))
        labels.extend((_label(*label), state, job) for label in record.spec.labels)
    return Content(segment, jobs, labels)


class Index:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None

    def open(self) -> dict[int, str]:
        """The hashes of the segments that are in it, by number. Raises Corrupt: `remove` it then and open again."""

        def opened() -> dict[int, str]:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._writer = _connect(self._path)
            version = self._writer.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                with self._writer:
                    self._writer.executescript(f"BEGIN; {_TABLES} PRAGMA user_version={VERSION}; COMMIT;")
            elif version != VERSION:
                raise Corrupt(f"the index of the history is of version {version}")
            self._reader = _connect(self._path)
            return dict(self._writer.execute("SELECT number, hash FROM segments").fetchall())

        return _told(opened)

    def close(self) -> None:
        for connection in (self._writer, self._reader):
            if connection is not None:
                connection.close()
        self._writer = self._reader = None

    def remove(self) -> None:
        """It cannot be read, or is of another version."""

        def remove() -> None:
            with suppress(sqlite3.Error):
                self.close()
            for suffix in ("", "-wal", "-shm"):
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)

        _told(remove)

    # --- writing

    def add(self, name: str, content: Content) -> None:
        """All jobs of the segment with this hash, in one transaction. Raises Corrupt, Unavailable."""

        def add() -> None:
            connection = self._connection(self._writer)
            with connection:
                connection.executemany("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?, ?, ?)", content.jobs)
                connection.executemany("INSERT OR REPLACE INTO labels VALUES (?, ?, ?)", content.labels)
                connection.execute("INSERT OR REPLACE INTO segments VALUES (?, ?)", (content.segment, name))

        _told(add)

    def discard(self, segment: int) -> None:
        """Raises Corrupt."""

        def discard() -> None:
            connection = self._connection(self._writer)
            with connection:
                # Labels are few where there are any: found by the jobs that have them.
                for state, job, frame in connection.execute(
                    "SELECT state, id, frame FROM jobs WHERE segment = ?", (segment,)
                ).fetchall():
                    for label in read_entry(frame).record.spec.labels:
                        connection.execute(
                            "DELETE FROM labels WHERE label = ? AND state = ? AND id = ?", (_label(*label), state, job)
                        )
                connection.execute("DELETE FROM jobs WHERE segment = ?", (segment,))
                connection.execute("DELETE FROM segments WHERE number = ?", (segment,))

        _told(discard)

    # --- reading

    def find(self, selector: str, bounds: Bounds) -> Archived | None:
        """By id, `last`, name or unique prefix, as jobs of the core are found. Raises Conflict, Corrupt."""

        def find() -> Archived | None:
            reader = self._connection(self._reader)
            if len(selector) == 36 and (key := _key_or_none(selector)) is not None:
                found = _first(reader.execute(f"{_SELECT} WHERE id = ?", (key,)), bounds)
                if found is not None:
                    return found
            if selector == "last":
                return _first(reader.execute(f"{_SELECT} ORDER BY number DESC"), bounds)
            named = [_first(_named(reader, selector, state), bounds) for state in FINAL_STATES]
            if found_named := [job for job in named if job is not None]:
                return max(found_named, key=lambda each: each.job.number)
            return self._by_prefix(reader, selector, bounds)

        return _told(find)

    def _by_prefix(self, reader: sqlite3.Connection, selector: str, bounds: Bounds) -> Archived | None:
        digits = selector.replace("-", "")[:32]
        low, high = _key_or_none(digits.ljust(32, "0")), _key_or_none(digits.ljust(32, "f"))
        if len(selector) < PREFIX_CHARS_MIN or low is None or high is None or not _id_of(low).startswith(selector):
            return None
        found: list[Archived] = []
        with closing(reader.execute(f"{_SELECT} WHERE id BETWEEN ? AND ? ORDER BY id", (low, high))) as rows:
            for segment, frame in rows:
                if segment in bounds:
                    found.append(_archived(segment, frame))
                    if len(found) > 1:
                        raise several_jobs(selector)
        return found[0] if found else None

    def page(self, query: ListJobs, bounds: Bounds) -> tuple[list[Job], JobId | None]:
        """Newest first; all that match are here down to the job named second, None: down to the oldest. Raises Corrupt."""

        def page() -> tuple[list[Job], JobId | None]:
            limit = page_limit(query.limit)
            reader = self._connection(self._reader)
            states = [state for state in FINAL_STATES if not query.states or state in query.states]
            cursors = [_matching(reader, query, state) for state in states]
            found: list[Job] = []
            size = 0
            last: bytes | None = None
            rows = merge(*cursors, key=lambda row: row[0], reverse=True)
            try:
                for looked, (key, segment, frame, matches) in enumerate(rows):
                    if len(found) >= limit or looked >= SCAN_MAX or size >= PAGE_BYTES:
                        return found, None if last is None else _id_of(last)
                    last = key
                    if matches and segment in bounds:
                        found.append(_archived(segment, frame).job)
                        size += len(frame)
            finally:
                for cursor in cursors:
                    cursor.close()
            return found, None

        return _told(page)

    def _connection(self, connection: sqlite3.Connection | None) -> sqlite3.Connection:
        if connection is None:
            raise Unavailable("the index of the history is being made anew at this node", hint="try again")
        return connection


_SELECT = "SELECT segment, frame FROM jobs"
_NEWEST = b"\xff" * 17
"""Above every id."""


def _matching(reader: sqlite3.Connection, query: ListJobs, state: TaskState) -> sqlite3.Cursor:
    """(id, segment, frame, whether all matches) in order: an index over one wish gives it, so that nothing is sorted.

    Whether the others match is looked up, not searched for: so the caller can stop after as many as it likes.
    """
    number, before = _STATES[state], _NEWEST if query.before is None else _bound_of(query.before)
    labels = [_label(*label) for label in query.labels]
    if query.name or not labels:
        rest, sought = labels, [query.name] if query.name else []
        source = "jobs INDEXED BY by_name WHERE name = ? AND" if query.name else "jobs INDEXED BY by_state WHERE"
        source += " jobs.state = ? AND jobs.id < ? ORDER BY jobs.id DESC"
    else:
        rest, sought = labels[1:], labels[:1]
        source = (
            "labels CROSS JOIN jobs ON jobs.id = labels.id WHERE label = ? AND labels.state = ? AND labels.id < ?"
            " ORDER BY labels.id DESC"
        )
    has_label = "EXISTS (SELECT 1 FROM labels AS l WHERE l.label = ? AND l.state = jobs.state AND l.id = jobs.id)"
    matches = " AND ".join(["1", *(has_label for _ in rest)])
    select = f"SELECT jobs.id, segment, frame, {matches} FROM {source}"  # noqa: S608 - of constants
    return reader.execute(select, (*rest, *sought, number, before))


def _named(reader: sqlite3.Connection, name: str, state: TaskState) -> sqlite3.Cursor:
    return reader.execute(
        "SELECT segment, frame FROM jobs INDEXED BY by_name WHERE name = ? AND state = ? ORDER BY id DESC",
        (name, _STATES[state]),
    )


def _first(rows: sqlite3.Cursor, bounds: Bounds) -> Archived | None:
    with closing(rows):
        return next((_archived(segment, frame) for segment, frame in rows if segment in bounds), None)


def _archived(segment: int, frame: bytes) -> Archived:
    entry = read_entry(frame)
    return Archived(segment, entry, entry.record.job())


def key_of(job: str) -> bytes:
    return bytes.fromhex(job.replace("-", ""))


def _key_or_none(job: str) -> bytes | None:
    try:
        return key_of(job)
    except ValueError:
        return None


def _bound_of(job: str) -> bytes:
    """Ids below this text, which may be anything, are below these bytes."""
    digits = takewhile("0123456789abcdef".__contains__, job.replace("-", ""))
    return bytes.fromhex("".join(digits)[:32].ljust(32, "0"))


def _id_of(key: bytes) -> JobId:
    text = key.hex()
    return JobId("-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])))


def _label(key: str, value: str) -> str:
    return f"{key}={value}"


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, check_same_thread=False, isolation_level="DEFERRED")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")  # what a loss of power takes is indexed again
    connection.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
    return connection


def _told(work: Callable[[], T]) -> T:
    """Corrupt is cured by making the index anew; Unavailable, as on a full disk, by waiting."""
    try:
        return work()
    except (sqlite3.Error, UnicodeDecodeError) as error:
        if getattr(error, "sqlite_errorcode", None) in _PASSING:
            raise Unavailable(f"the index of the history: {error}", hint="is the disk full?") from error
        raise Corrupt(f"the index of the history: {error}") from error
    except OSError as error:
        raise Unavailable(f"the index of the history: {error}", hint="is the disk full?") from error
