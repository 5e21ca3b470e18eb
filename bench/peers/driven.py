"""A contender's driver as a process: asked by lines of JSON, bounded in time, and gone with all below it at the end."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bench.mesh import cpu_s, descendants, resident_bytes
from bench.peers.contenders import Contender
from bench.peers.setup import HOME, prepare

START_S = 180.0
STOP_S = 30.0
DRIVERS = Path(__file__).with_name("drivers")


class Failed(Exception):
    """It said so, or said nothing in time."""


class Missing(Exception):
    """It has no such thing."""


class Driven:
    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log
        self._rest = b""
        self.version = ""

    def ask(self, what: str, *, within_s: float, **more: Any) -> dict[str, Any]:
        """Raises Failed, Missing."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **more}).encode() + b"\n")
            self._process.stdin.flush()
            answer = json.loads(self._line(within_s))
        except (OSError, ValueError) as error:
            raise Failed(f"{what}: its driver ended; see {self._log}") from error
        if "error" in answer:
            raise Failed(f"{what}: {answer['error']}")
        if answer.get("missing"):
            raise Missing(what)
        found: dict[str, Any] = answer
        return found

    def cost(self) -> tuple[float, int]:
        """CPU seconds until now and resident bytes of all its processes, the program that uses it among them."""
        total_s, total_bytes = 0.0, 0
        for pid in [self._process.pid, *(child for child, _ in descendants(self._process.pid))]:
            with suppress(OSError):
                total_s += cpu_s(pid)
                total_bytes += resident_bytes(pid)
        return total_s, total_bytes

    def _line(self, within_s: float) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + within_s
        while b"\n" not in self._rest:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self._process.stdout], [], [], left_s)[0]:
                raise Failed(f"no answer within {within_s:.0f} s")
            data = os.read(self._process.stdout.fileno(), 1 << 20)
            if not data:
                raise ValueError("end of its answers")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line


@contextmanager
def driven(contender: Contender, cores: int) -> Generator[Driven, None, None]:
    """Started, warm and ready; gone when the block ends, whatever happened in it. Raises Failed."""
    python = prepare(contender.package)
    scratch = HOME / "work"
    scratch.mkdir(parents=True, exist_ok=True)
    log = HOME / f"{contender.package}.log"
    command = [str(python), str(DRIVERS / f"{contender.package}_driver.py"), str(scratch), str(cores)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MESH", "PYTHON"))}
    with log.open("wb") as said:
        process = subprocess.Popen(
            [*command, json.dumps(contender.options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, env=environment, start_new_session=True,
        )  # fmt: skip
    made = Driven(process, log)
    try:
        made.version = made.ask("start", within_s=START_S)["version"]
        yield made
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=STOP_S)
        return
    # The driver adopts what its contender leaves behind, so that nothing is out of sight until it goes itself.
    for _ in range(10):
        below = [pid for pid, _ in descendants(process.pid)]
        for pid in below:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if not below:
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
