"""All figures, one bench after the other: `make bench`. Takes four to six minutes.

    python bench/run.py [NAME …]

Each is a command of its own with more options: `python -m bench.NAME --help`, or its first lines. Exits with 1 when
one of them fails, which those with bounds also do when they are over them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

BENCHES: dict[str, tuple[str, ...]] = {
    "idle": ("--seconds", "20"),
    "latency": ("--jobs", "100"),
    "raft": ("--seconds", "2"),
    "stalls": ("--jobs", "20000", "--seconds", "3"),
    "transitions": (),
    "sync": (),
    "rpc": (),
    "backends": ("2",),
    "blobs": ("128",),
}
"""By name, with the options that make a shorter run of it."""


def main() -> int:
    wanted = sys.argv[1:] or list(BENCHES)
    if unknown := [name for name in wanted if name not in BENCHES]:
        print(f"no bench {', '.join(unknown)}; there are {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    failed = []
    for name in wanted:
        print(f"\n== {name}: {_sentence(name)}\n", flush=True)
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-m", f"bench.{name}", *BENCHES[name]], cwd=ROOT)
        print(f"\n   {time.monotonic() - began:.0f} s, load average {os.getloadavg()[0]:.1f}", flush=True)
        if done.returncode:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _sentence(name: str) -> str:
    """The first of its docstring, as far as its command line."""
    first = (ROOT / "bench" / f"{name}.py").read_text().splitlines()[0]
    return first.strip('"').partition(":")[0].rstrip(".")


if __name__ == "__main__":
    sys.exit(main())
