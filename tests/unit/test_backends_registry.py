"""Plug-ins are other people's code: a bad one is a backend that does not work, never an agent that does not start."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import trio
from trio.testing import MockClock

from meshd.backends import registry
from meshd.backends.mock import MockBackend
from meshd.backends.process import ProcessBackend
from meshd.backends.registry import load, probe_all
from meshd.backends.wasm import WasmBackend
from meshd.model import BackendProbe, EndReason
from meshd.ports import BackendSettings
from meshd.testing.backend_suite import Program, prepare


class RaisingProbe(MockBackend):
    async def probe(self) -> BackendProbe:
        raise RuntimeError("no such device")


class EndlessProbe(MockBackend):
    async def probe(self) -> BackendProbe:
        await trio.sleep_forever()
        raise AssertionError


def refuse(settings: BackendSettings) -> MockBackend:
    raise RuntimeError("no licence")


def point(name: str, target: str) -> EntryPoint:
    return EntryPoint(name, target, registry.BACKENDS)


def test_the_installed_ones_are_ours(tmp_path: Path) -> None:
    points = [
        point("wasm", "meshd.backends.wasm:WasmBackend"),
        point("process", "meshd.backends.process:ProcessBackend"),
    ]
    backends = load(BackendSettings(tmp_path), installed=points)
    assert {name: type(backend) for name, backend in backends.items()} == {
        "process": ProcessBackend,
        "wasm": WasmBackend,
    }
    assert (tmp_path / "wasm").stat().st_mode & 0o777 == 0o700


def test_the_mock_comes_only_when_asked_for(tmp_path: Path) -> None:
    assert load(BackendSettings(tmp_path), installed=[]) == {}
    assert list(load(BackendSettings(tmp_path), installed=[], more={"mock": MockBackend})) == ["mock"]


async def test_a_plug_in_that_cannot_be_loaded_does_not_work_and_says_why(tmp_path: Path) -> None:
    points = [point("gone", "no.such.module:X"), point("bare", "meshd.backends.mock:Nothing")]
    backends = load(BackendSettings(tmp_path), installed=points, more={"dear": refuse, "mock": MockBackend})
    probes = await probe_all(backends)
    assert {name: probe.works for name, probe in probes.items()} == {
        "bare": False,
        "gone": False,
        "dear": False,
        "mock": True,
    }
    assert "no.such" in probes["gone"].reason or "No module named 'no'" in probes["gone"].reason
    assert "Nothing" in probes["bare"].reason
    assert "no licence" in probes["dear"].reason
    outcome = await backends["gone"].run(prepare(tmp_path / "attempt", Program(())))
    assert outcome.reason is EndReason.BACKEND


async def test_a_probe_that_raises_or_hangs_holds_up_nobody(tmp_path: Path, autojump_clock: MockClock) -> None:
    settings = BackendSettings(tmp_path)
    probes = await probe_all(
        {"mock": MockBackend(settings), "raising": RaisingProbe(settings), "endless": EndlessProbe(settings)}
    )
    assert [(name, probe.works) for name, probe in probes.items()] == [
        ("mock", True),
        ("raising", False),
        ("endless", False),
    ]
    assert "no such device" in probes["raising"].reason
    assert "30 s" in probes["endless"].reason


async def test_a_mock_of_a_long_job_takes_no_time(tmp_path: Path, autojump_clock: MockClock) -> None:
    attempt = prepare(tmp_path / "attempt", Program(("sleep", "3600")))
    outcome = await MockBackend(BackendSettings(tmp_path)).run(attempt)
    assert (outcome.is_success, outcome.run_ms) == (True, 3_600_000)
