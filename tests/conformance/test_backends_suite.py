"""The one suite, for each of our backends."""

from __future__ import annotations

import sys
from pathlib import Path

from meshd.testing.backend_suite import BackendSuite, Program
from tests.guests import guest

GUEST = Path(__file__).parents[1] / "guests" / "guest.py"


class TestWasm(BackendSuite):
    factory = "meshd.backends.wasm:WasmBackend"

    def program(self, *words: str) -> Program:
        return Program(words, guest())

    def missing(self) -> Program:
        return Program((), GUEST)


class TestProcess(BackendSuite):
    factory = "meshd.backends.process:ProcessBackend"

    def program(self, *words: str) -> Program:
        return Program((sys.executable, "-I", "-S", str(GUEST), *words))

    def missing(self) -> Program:
        return Program(("no-such-command",))


class TestMock(BackendSuite):
    factory = "meshd.backends.mock:MockBackend"

    def program(self, *words: str) -> Program:
        return Program(words)

    def missing(self) -> Program:
        return Program(("no-such-verb",))
