"""What one frame and its sync cost on this disk, by how its room was taken: `python -m bench.sync [DIRECTORY]`.

growing    the file gets longer with each frame
reserved   its room was taken with posix_fallocate, as the journal does (meshd/raft/storage/segments.py)
zeroed     … and zeros were written into it: what it would gain to write every byte twice
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

FRAME_BYTES = 900
BLOCK = 4096
FRAMES = 300
"""In each round of each kind; the kinds take turns, so that whatever else runs here is the same for all."""
ROUNDS = 7
KINDS = ("growing", "reserved", "zeroed")


def round_ms(path: Path, kind: str) -> list[float]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        if kind != "growing":
            os.posix_fallocate(descriptor, 0, FRAMES * BLOCK)
        if kind == "zeroed":
            os.pwrite(descriptor, bytes(FRAMES * BLOCK), 0)
        os.fsync(descriptor)
        taken = []
        for number in range(FRAMES):
            began = time.perf_counter()
            os.pwrite(descriptor, b"x" * FRAME_BYTES, number * BLOCK)
            os.fdatasync(descriptor)
            taken.append((time.perf_counter() - began) * 1000)
        return taken
    finally:
        os.close(descriptor)
        path.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?", default=Path(tempfile.gettempdir()), help="on the disk in question; %(default)s")  # fmt: skip
    directory = parser.parse_args().directory
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(ROUNDS):
        for kind in KINDS:
            taken[kind] += round_ms(directory / f"meshd-bench-sync-{os.getpid()}", kind)
    base = statistics.median(taken["growing"])
    print(f"{directory}, {FRAME_BYTES} bytes a frame, load {os.getloadavg()[0]:.1f}")
    print(f"{'':10} {'p50 ms':>8} {'p99 ms':>8} {'of growing':>11}")
    for kind, values in taken.items():
        p50, p99 = statistics.median(values), statistics.quantiles(values, n=100)[98]
        print(f"{kind:10} {p50:8.3f} {p99:8.3f} {p50 / base:11.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
