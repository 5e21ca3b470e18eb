"""Where the time of a task goes: `python -m bench.profile [BENCHMARK …] [--markdown] [--flame DIRECTORY]`.

wasm      an array of tasks that do nothing, as wasm, on one agent
process   the same as /bin/true
jobs      one wasm job after the other on three agents, each committed by two of them
wasm3     the array of wasm on three agents; not unless it is named

Each with what the same machine needs without a mesh. About a minute and a half, root (or the right to trace), and
py-spy from PyPI, in an environment of its own.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.mesh import load
from bench.profile.benchmarks import JobByJob, Profile, job_by_job, process_array, wasm_array
from bench.profile.flames import flame_graph
from bench.profile.floors import measure
from bench.profile.report import against_floors, by_layer, by_process, by_sync
from bench.profile.sampling import sampler

OTHERS_MAX = 0.15
"""Of all cores. Beyond it, most of what a thread waits for is other programs, and layers of small shares drown in it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="*", metavar="BENCHMARK", help="default: wasm process jobs")
    parser.add_argument("--wasm-tasks", type=int, default=100_000)
    parser.add_argument("--commands", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--markdown", action="store_true", help="tables as the page has them")
    parser.add_argument("--flame", type=Path, metavar="DIRECTORY", help="a flame graph of each process's samples, SVG")
    options = parser.parse_args()
    benchmarks: Mapping[str, tuple[str, Callable[[], Profile | JobByJob]]] = {
        "wasm": (f"{options.wasm_tasks:,} wasm tasks, one agent", lambda: wasm_array(options.wasm_tasks, 1)),
        "wasm3": (f"{options.wasm_tasks:,} wasm tasks, three agents", lambda: wasm_array(options.wasm_tasks, 3)),
        "process": (f"{options.commands:,} x /bin/true, one agent", lambda: process_array(options.commands)),
        "jobs": (f"{options.jobs:,} jobs, one at a time, three agents", lambda: job_by_job(options.jobs)),
    }
    wanted = options.benchmarks or ["wasm", "process", "jobs"]
    if unknown := [name for name in wanted if name not in benchmarks]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(benchmarks)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing that was started stays
    sampler()
    began, load_before = time.monotonic(), load()
    floors = measure()
    profiles: dict[str, Profile] = {}
    tables = []
    for name in wanted:
        title, run = benchmarks[name]
        print(f"{title} …", file=sys.stderr, flush=True)
        measured = run()
        if isinstance(measured, JobByJob):
            tables.append(by_sync(measured, floors.sync_p50_ms))
            measured = measured.profile
        profiles[title] = measured
        if options.flame:
            _draw(options.flame, name, measured)
    tables = [by_process(profiles), *(by_layer(*each) for each in profiles.items()), *tables]
    tables.append(against_floors(profiles, floors))
    print("\n\n".join(table.as_markdown() if options.markdown else table.as_text() for table in tables))
    print(f"\n{time.monotonic() - began:.0f} s; at the start {load_before}")
    for title, profile in profiles.items():
        if profile.used.others > OTHERS_MAX:
            print(f"{title}: {profile.used.others:.0%} of the cores were others'; layers are rough", file=sys.stderr)
    return 0


def _draw(directory: Path, name: str, profile: Profile) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for role, stacks in profile.sampled.items():
        if stacks:
            (directory / f"{name}-{role}.svg").write_text(flame_graph(f"{name}, {role}", stacks))


if __name__ == "__main__":
    sys.exit(main())
