"""What running an attempt costs, through the Backend port: `python -m bench.backends [SECONDS]`.

No-op wasm and /bin/true, one after the other and some at once; and how long the first one takes. The rates
include making the working directory and files of each attempt; the latencies do not. Then in batches, as the agent
hands on what needs no files.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path

import structlog
import trio

from meshd.testing.backend_suite import Bench, Program, build
from tests.guests import guest

SCRATCH = Path(__file__).parents[1] / "build"
"""On a disk, as an agent's directory is."""

WASM = "meshd.backends.wasm:WasmBackend"
PROCESS = "meshd.backends.process:ProcessBackend"


async def measure(label: str, factory: str, program: Program, at_once: int, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        backend = build(factory, Path(scratch, "backend"))
        async with trio.open_nursery() as serving:
            await serving.start(backend.serve)
            bench = Bench(backend, Path(scratch))
            start = time.perf_counter()
            outcome = await bench.run(bench.attempt(program))
            first_ms = (time.perf_counter() - start) * 1000
            assert outcome.is_success, outcome

            took: list[float] = []
            start = time.perf_counter()
            end = start + seconds

            async def loop() -> None:
                while time.perf_counter() < end:
                    # Fresh files: writing again to a truncated one makes ext4 flush it, which takes milliseconds.
                    attempt = bench.attempt(program)
                    began = time.perf_counter()
                    outcome = await backend.run(attempt)
                    took.append(time.perf_counter() - began)
                    assert outcome.is_success, outcome

            async with trio.open_nursery() as nursery:
                for _ in range(at_once):
                    nursery.start_soon(loop)
            elapsed = time.perf_counter() - start
            serving.cancel_scope.cancel()
    took.sort()
    p50, p99 = statistics.median(took) * 1000, took[int(len(took) * 0.99)] * 1000
    print(
        f"{label:<22} {at_once:>7} {len(took) / elapsed:>10,.0f} {p50:>9.2f} {p99:>9.2f} {first_ms:>10.0f}", flush=True
    )


async def measure_batches(label: str, factory: str, program: Program, lanes: int, tasks: int) -> None:
    """As the agent hands them on: many at a time to each lane. `agent us`: its own CPU for one of them."""
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        backend = build(factory, Path(scratch, "backend"))
        async with trio.open_nursery() as serving:
            await serving.start(backend.serve)
            bench = Bench(backend, Path(scratch))
            await bench.start(program, ["0"] * lanes, lanes=lanes).wait(lanes)
            start, cpu_start = time.perf_counter(), time.process_time()
            batch = bench.start(program, ["0"] * tasks, lanes=lanes)
            await batch.wait(tasks, within_s=120)
            elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu_start
            assert all(end.outcome.is_success for end in batch.ends.values())
            serving.cancel_scope.cancel()
    print(f"{label:<22} {lanes:>7} {tasks / elapsed:>10,.0f} {cpu / tasks * 1e6:>20.1f} agent us", flush=True)


async def main(seconds: float) -> None:
    print(f"{'':<22} {'at once':>7} {'runs/s':>10} {'p50 ms':>9} {'p99 ms':>9} {'first ms':>10}")
    for at_once in (1, 2, 8):
        await measure("wasm, no-op", WASM, Program((), guest("noop")), at_once, seconds)
    await measure("wasm, prints a line", WASM, Program(("say", "hello\n", ""), guest()), 1, seconds)
    for at_once in (1, 2, 8):
        await measure("process, /bin/true", PROCESS, Program(("/bin/true",)), at_once, seconds)
    for lanes in (1, 2):
        await measure_batches("wasm, in batches", WASM, Program((), guest("noop")), lanes, int(4000 * seconds))
    for lanes in (2, 4):
        await measure_batches("process, in batches", PROCESS, Program(("/bin/true",)), lanes, int(300 * seconds))


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seconds", type=float, nargs="?", default=3.0, help="for each row; %(default)s")
    trio.run(main, parser.parse_args().seconds)
