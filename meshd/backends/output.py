"""The files that take a job's stdout and stderr, and their limit. For the helpers: imports nothing but os.

Files, not pipes: nobody has to copy, a slow disk stops only the job that writes to it, and a
follower reads along. The price is that a flood is seen by measuring: it may pass the limit by
what is written between two looks, and is then cut back to the limit exactly. RLIMIT_FSIZE
would be exact, but it would bound the job's own output files too.
"""

from __future__ import annotations

import os

CHECK_S = 0.05
"""How often a running job's output is measured: at 2 GB/s it can be 100 MB over its limit before it is cut back."""


class Output:
    def __init__(self, stdout: str, stderr: str, bytes_max: int) -> None:
        """`bytes_max` is for each of the two."""
        self._files = (("stdout", stdout), ("stderr", stderr))
        self._bytes_max = bytes_max

    def flooded(self) -> str | None:
        """What to say when one is over the limit."""
        for name, path in self._files:
            if _size(path) > self._bytes_max:
                return f"{name} grew past its limit of {self._bytes_max} bytes"
        return None

    def cut(self) -> None:
        for _, path in self._files:
            if _size(path) > self._bytes_max:
                os.truncate(path, self._bytes_max)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0  # the caller took its directory away: nothing to measure
