"""Which files of a directory do these patterns name? Without ever leaving it.

`report.json` must exist. `out/` and `out` take a directory with all that is in it.
`*`, `?` and `[…]` match within one name, not a leading dot; `**` any number of
directories. A pattern with none of them that names nothing is an error, the others
may find nothing.

Blocking code, for a thread. Directories are opened one inside the other and links are
not followed, so that nothing a job leaves, or still does, leads elsewhere.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase

from meshd.errors import InvalidRequest, TooLarge

FILES_MAX = 100_000
"""In one tree: its list is then some 15 MB. More belong into an archive."""

SCANNED_MAX = 1_000_000
"""Directory entries looked at; a few seconds of work. A job can make more in a minute."""

DEPTH_MAX = 128
"""Directories inside one another; each is open while it is searched."""

PATH_BYTES_MAX = 4096
NAME_BYTES_MAX = 255
"""What Linux takes."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, order=True)
class Found:
    path: str
    size: int
    executable: bool


def check_path(path: str) -> str:
    """A relative POSIX path that stays where it is put. Raises InvalidRequest."""
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"path {path!a} is not UTF-8") from None
    parts = path.split("/")
    if not path or "\0" in path or len(encoded) > PATH_BYTES_MAX:
        raise InvalidRequest(f"path {path[:100]!r} is empty, too long or has a NUL in it")
    if any(part in ("", ".", "..") or len(part.encode()) > NAME_BYTES_MAX for part in parts):
        raise InvalidRequest(
            f"path {path[:100]!r} is absolute, has `..`, `.` or nothing between slashes, or a long name"
        )
    if len(parts) > DEPTH_MAX:
        raise InvalidRequest(f"path {path[:100]!r}… is more than {DEPTH_MAX} directories deep")
    return path


def find(root: int, patterns: Sequence[str], *, bytes_max: int) -> list[Found]:
    """Sorted by path, each once. Raises InvalidRequest for what is missing or is no file, TooLarge."""
    search = _Search(bytes_max)
    missing: list[str] = []
    for pattern in patterns:
        parts = _parse(pattern)
        with _named("."):
            search.match(root, (), parts, must_be_directory=pattern.endswith("/"))
        if not search.has_matched and not any(_is_glob(part) for part in parts):
            missing.append(pattern)
        search.has_matched = False
    if missing:
        raise InvalidRequest(f"not there after the job had ended: {', '.join(missing[:10])}")
    return sorted(search.found.values())


def open_file(root: int, path: str) -> tuple[int, os.stat_result]:
    """A descriptor to read a regular file below an open directory. Raises InvalidRequest."""
    *directories, name = path.split("/")
    with _named(path), open_directory(root, directories) as directory:
        # Non-blocking: opening a FIFO nobody writes to would hold the thread for ever.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise InvalidRequest(f"{path!r} is no regular file")
        return descriptor, status


@contextmanager
def open_directory(root: int, parts: Iterable[str], *, create: bool = False) -> Generator[int, None, None]:
    """A directory below an open one, reached without following links."""
    current = os.dup(root)
    try:
        for part in parts:
            if create:
                with suppress(FileExistsError):  # opening it says whether that is a directory
                    os.mkdir(part, 0o700, dir_fd=current)
            inner = os.open(part, _DIRECTORY, dir_fd=current)
            os.close(current)
            current = inner
        yield current
    finally:
        os.close(current)


class _Search:
    def __init__(self, bytes_max: int) -> None:
        self.found: dict[str, Found] = {}
        self.has_matched = False
        self._bytes_max = bytes_max
        self._bytes = 0
        self._scanned = 0

    def match(self, directory: int, above: tuple[str, ...], parts: tuple[str, ...], *, must_be_directory: bool) -> None:
        """Find what `parts` name in `directory`, which is at `above`."""
        if not parts:
            self._take_all(directory, above)
            return
        head, rest = parts[0], parts[1:]
        if head == "**":
            self.match(directory, above, rest, must_be_directory=must_be_directory)
            if rest:
                for name, is_directory in self._scan(directory, above):
                    if is_directory and not name.startswith("."):
                        with self._inside(directory, above, name) as inner:
                            self.match(inner, (*above, name), parts, must_be_directory=must_be_directory)
            return
        if not _is_glob(head):
            self._step(directory, above, head, rest, must_be_directory=must_be_directory, is_named=True)
            return
        for name, is_directory in self._scan(directory, above):
            is_hidden = name.startswith(".") and not head.startswith(".")
            if is_hidden or not fnmatchcase(name, head) or (not is_directory and (rest or must_be_directory)):
                continue
            self._step(directory, above, name, rest, must_be_directory=must_be_directory, is_named=False)

    def _step(
        self,
        directory: int,
        above: tuple[str, ...],
        name: str,
        rest: tuple[str, ...],
        *,
        must_be_directory: bool,
        is_named: bool,
    ) -> None:
        path = "/".join((*above, name))
        try:
            with _named(path):
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except InvalidRequest as error:
            if is_named and isinstance(error.__cause__, FileNotFoundError):
                return  # `find` says which are missing
            raise
        if stat.S_ISDIR(status.st_mode):
            with self._inside(directory, above, name) as inner:
                self.match(inner, (*above, name), rest, must_be_directory=must_be_directory)
        elif rest or must_be_directory:
            raise InvalidRequest(f"{path!r} is {_kind(status)}, not a directory")
        else:
            self._take(path, status)

    def _take_all(self, directory: int, above: tuple[str, ...]) -> None:
        self.has_matched = True
        for name, is_directory in self._scan(directory, above):
            if is_directory:
                with self._inside(directory, above, name) as inner:
                    self._take_all(inner, (*above, name))
            else:
                path = "/".join((*above, name))
                with _named(path):
                    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                self._take(path, status)

    def _take(self, path: str, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise InvalidRequest(f"{path!r} is {_kind(status)}: only regular files are kept", hint="copy what it means")
        self.has_matched = True
        if path in self.found:
            return
        self.found[check_path(path)] = Found(path, status.st_size, bool(status.st_mode & 0o100))
        self._bytes += status.st_size
        if len(self.found) > FILES_MAX:
            raise TooLarge(f"over {FILES_MAX} files", hint="pack them into an archive")
        if self._bytes > self._bytes_max:
            raise TooLarge(f"with {path!r} it is over {self._bytes_max} bytes")

    def _scan(self, directory: int, above: tuple[str, ...]) -> list[tuple[str, bool]]:
        entries: list[tuple[str, bool]] = []
        with _named("/".join(above) or "."), os.scandir(directory) as scanned:
            for entry in scanned:
                self._scanned += 1
                if self._scanned > SCANNED_MAX:
                    raise TooLarge(f"over {SCANNED_MAX} files and directories to look through")
                entries.append((entry.name, entry.is_dir(follow_symlinks=False)))
        return sorted(entries)

    @contextmanager
    def _inside(self, directory: int, above: tuple[str, ...], name: str) -> Generator[int, None, None]:
        path = "/".join((*above, name))
        if len(above) >= DEPTH_MAX:
            raise InvalidRequest(f"{path[:100]!r}… is more than {DEPTH_MAX} directories deep")
        with _named(path):
            inner = os.open(name, _DIRECTORY, dir_fd=directory)
        try:
            yield inner
        finally:
            os.close(inner)


def _parse(pattern: str) -> tuple[str, ...]:
    parts = tuple(part for part in pattern.rstrip("/").split("/") if part != ".")
    if pattern.startswith("/"):
        raise InvalidRequest(f"output {pattern!r} is not relative to the working directory")
    if parts:
        check_path("/".join(parts))
    return parts


def _is_glob(part: str) -> bool:
    return any(sign in part for sign in "*?[")


def _kind(status: os.stat_result) -> str:
    mode = status.st_mode
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFREG: "a file"}
    return kinds.get(stat.S_IFMT(mode), "a device")


@contextmanager
def _named(path: str) -> Generator[None, None, None]:
    """What the operating system says about a file of a job is the job's doing."""
    try:
        yield
    except OSError as error:
        raise InvalidRequest(f"{path[:200]!r} cannot be read: {error.strerror or error}") from error
