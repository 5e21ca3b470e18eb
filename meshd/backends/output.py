"""The files that take a job's stdout and stderr, and their limit. For the helpers: imports nothing but os.

Files, not pipes: nobody has to copy, a slow disk stops only the job that writes to it, and a
follower reads along. The price is that a flood is seen by measuring: it may pass the limit by
what is written between two looks, and is then cut back to the limit exactly. RLIMIT_FSIZE
would be exact, but it would bound the job's own output files too.

Where only the end of an attempt is told of, they have no name (`Capture`): that costs 3 µs
each, and a file of 100 bytes 5 µs, while making and removing a directory for them was seen to
take 3 ms on ext4. Only output that is too large to travel is given a name.
"""

from __future__ import annotations

import os
from contextlib import suppress

CHECK_S = 0.05
"""How often a running job's output is measured: at 2 GB/s it can be 100 MB over its limit before it is cut back."""

COPY_BYTES = 1 << 20


class Output:
    def __init__(self, stdout: str | int, stderr: str | int, bytes_max: int) -> None:
        """Paths or descriptors. `bytes_max` is for each of the two."""
        self._files = (("stdout", stdout), ("stderr", stderr))
        self._bytes_max = bytes_max

    def flooded(self) -> str | None:
        """What to say when one is over the limit."""
        for name, file in self._files:
            if _size(file) > self._bytes_max:
                return f"{name} grew past its limit of {self._bytes_max} bytes"
        return None

    def cut(self) -> None:
        for _, file in self._files:
            if _size(file) > self._bytes_max:
                os.truncate(file, self._bytes_max)


class Capture:
    """Two files without a name, on the disk of `directory`. Raises OSError."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self.stdout = _unnamed(directory)
        try:
            self.stderr = _unnamed(directory)
        except OSError:
            os.close(self.stdout)
            raise

    def take(self, name: str, inline_bytes_max: int) -> tuple[bytes | None, bytes | None]:
        """What was written to each; None: more than that, now in the file `directory/name.stdout` or `.stderr`."""
        return (
            self._take("stdout", self.stdout, name, inline_bytes_max),
            self._take("stderr", self.stderr, name, inline_bytes_max),
        )

    def renew(self) -> bool:
        """Empty again; whether one of the files is another now.

        To cut a file that was written to makes ext4 flush it, which takes milliseconds.
        """
        was_used = False
        if _size(self.stdout):
            file, self.stdout = self.stdout, _unnamed(self._directory)
            os.close(file)
            was_used = True
        if _size(self.stderr):
            file, self.stderr = self.stderr, _unnamed(self._directory)
            os.close(file)
            was_used = True
        return was_used

    def _take(self, stream: str, file: int, name: str, inline_bytes_max: int) -> bytes | None:
        size = _size(file)
        if size <= inline_bytes_max:
            return os.pread(file, size, 0) if size else b""
        _give_name(file, os.path.join(self._directory, f"{name}.{stream}"))
        return None

    def settle(self) -> None:
        """After somebody has opened them anew with O_TRUNC, as wasmtime does: before anything is written.

        ext4 flushes a file that was truncated when it is next closed, so that a writer that does not sync loses
        less. Removing it while that goes on takes 4 ms. Closed once while it is empty, it is a file like others.
        """
        for file in (self.stdout, self.stderr):
            os.close(os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC))

    def close(self) -> None:
        os.close(self.stdout)
        os.close(self.stderr)


def _unnamed(directory: str) -> int:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError:
        if not os.path.isdir(directory):
            raise
    # A file system without O_TMPFILE.
    path = os.path.join(directory, f".{os.getpid()}.output")
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.unlink(path)
    return file


def _give_name(file: int, path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
    try:
        os.link(f"/proc/self/fd/{file}", path, follow_symlinks=True)
    except OSError:
        # What was unlinked cannot be linked again.
        offset = 0
        with open(path, "xb") as copy:
            while data := os.pread(file, COPY_BYTES, offset):
                copy.write(data)
                offset += len(data)


def _size(file: str | int) -> int:
    try:
        return os.stat(file).st_size
    except OSError:
        return 0  # the caller took its directory away: nothing to measure
