"""Which backends this machine has: whatever is installed under the entry points `meshd.backends`.

A plug-in that cannot be loaded is a backend that does not work, with the reason; it never stops the agent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points

import structlog
import trio

from meshd.config import BACKENDS
from meshd.model import BackendProbe, EndReason, Outcome
from meshd.ports import Backend, BackendSettings, Execution

PROBE_S_MAX = 30.0
"""Longer than any backend of ours gives itself; for plug-ins that give themselves no end."""

log = structlog.get_logger()


class BrokenBackend:
    """Stands in for a plug-in that could not be loaded."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self._reason = reason

    async def probe(self) -> BackendProbe:
        return BackendProbe(self.name, works=False, reason=self._reason)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await trio.sleep_forever()

    async def run(self, execution: Execution) -> Outcome:
        return Outcome(EndReason.BACKEND, message=self._reason)


def load(
    settings: BackendSettings,
    *,
    more: Mapping[str, Callable[[BackendSettings], Backend]] | None = None,
    installed: Iterable[EntryPoint] | None = None,
) -> dict[str, Backend]:
    """All backends by name, each built with a directory of its own below `settings.directory`.

    `more` are built besides the installed ones (the mock, for drills), and win over one of the same name.
    """
    found = entry_points(group=BACKENDS) if installed is None else installed
    factories: dict[str, Callable[[], Callable[[BackendSettings], Backend]]] = {
        point.name: point.load for point in sorted(found, key=lambda point: point.name)
    }
    for name, factory in (more or {}).items():
        factories[name] = lambda factory=factory: factory  # type: ignore[misc]
    return {name: _build(name, load_factory, settings) for name, load_factory in factories.items()}


async def probe_all(backends: Mapping[str, Backend]) -> dict[str, BackendProbe]:
    """What works here. All at once, none waits for another; never raises."""
    probes: dict[str, BackendProbe] = {}

    async def probe(name: str, backend: Backend) -> None:
        probes[name] = await _probe(name, backend)

    async with trio.open_nursery() as nursery:
        for name, backend in backends.items():
            nursery.start_soon(probe, name, backend)
    return {name: probes[name] for name in backends}


def _build(
    name: str, load_factory: Callable[[], Callable[[BackendSettings], Backend]], settings: BackendSettings
) -> Backend:
    try:
        directory = settings.directory / name
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return load_factory()(replace(settings, directory=directory))
    # Somebody else's code: whatever it raises costs this backend, not the node.
    except Exception as error:
        log.warning("backend.broken", backend=name, why=repr(error))
        return BrokenBackend(name, f"the plug-in cannot be loaded: {_say(error)}")


async def _probe(name: str, backend: Backend) -> BackendProbe:
    try:
        with trio.move_on_after(PROBE_S_MAX):
            return await backend.probe()
        reason = f"its probe did not end within {PROBE_S_MAX:.0f} s"
    # As above; a probe promises not to raise.
    except Exception as error:
        log.warning("backend.probe_raised", backend=name, why=repr(error))
        reason = f"its probe failed: {_say(error)}"
    return BackendProbe(name, works=False, reason=reason)


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
