"""Read by an agent's interpreter at its start: keeps when each sync of a file began and ended, for bench/profile."""

import atexit
import os
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

_moments = array("d")
"""Beginning, end, beginning, … by the monotonic clock, which is one for all processes of the machine."""


def _timed(sync: Callable[[Any], None]) -> Callable[[Any], None]:
    def timed(descriptor: Any) -> None:
        began_s = time.monotonic()
        try:
            sync(descriptor)
        finally:
            _moments.extend((began_s, time.monotonic()))

    return timed


os.fsync, os.fdatasync = _timed(os.fsync), _timed(os.fdatasync)
atexit.register(lambda: Path(os.environ["PROFILE_SYNCS"], str(os.getpid())).write_bytes(_moments.tobytes()))
