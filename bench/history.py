"""What a long history costs: `python -m bench.history [--jobs N] [--json FILE]`.

A server's directory is filled with N finished jobs of one task: submitted, leased, reported and archived by the real
log, state machine, segments and index, every commit synced. Only the running of them is left out, and the mesh's clock is
set forward now and then, so that they lie hours apart. Then an agent is started on it, beside one on an empty directory.
Exits with 1 when a figure is over its bound.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import trio
from msgspec.structs import replace

from bench.mesh import SCRATCH, SETTLE_S, client_of, cpu_s, load, resident_bytes
from meshd import codec
from meshd.admission.founding import found_mesh
from meshd.admission.home import Counters, Home
from meshd.blobs.store import Store
from meshd.dev import DevMesh
from meshd.errors import Unavailable
from meshd.history.archive import Archive
from meshd.ids import new_job_id
from meshd.model import (
    AttemptKey,
    BackendOffer,
    BlobRef,
    EndReason,
    Inline,
    JobId,
    JobSpec,
    Member,
    NodeId,
    Offer,
    Outcome,
    Resources,
    Role,
    Run,
)
from meshd.net.identity_key import KeyPair
from meshd.net.memory import MemoryNetwork, MemoryTransport
from meshd.ports import Committed
from meshd.raft.clocks import CLOCKS
from meshd.raft.log import ServerLog
from meshd.raft.settings import RaftSettings
from meshd.raft.state.commands import (
    AnyAnswer,
    AnyCommand,
    Claim,
    ClockSet,
    Ended,
    Found,
    OpenSession,
    Reason,
    Rejected,
    Report,
    Submit,
    Submitted,
)
from meshd.raft.state.machine import Machine
from meshd.raft.surroundings import Clocks

MEMORY_MB_MAX = 100.0
READY_S_MAX = 5.0
PAGE_MS_MAX = 200.0
SUBMIT_RATIO_MAX = 1.1

AT_ONCE = 400
"""Jobs in one round: as many as one entry takes."""
AGO_MS = 6 * 3_600_000
FORWARD_EVERY = 10_000
SUBMITS = 200
PAGES = 10
EMPTY, FULL = "empty", "full"
EPOCH = 1


# --- filling ----------------------------------------------------------------------------------------------------------


class Filler:
    """Speaks for a worker that has done its jobs at once."""

    def __init__(self, me: NodeId, machine: Machine, log: ServerLog, jobs: int) -> None:
        self._me, self._machine, self._log, self._jobs = me, machine, log, jobs
        self._seq = 0
        self._made = 0

    async def run(self, member: Member, mesh: str) -> None:
        await self.propose(Found(mesh, member))
        offer = Offer((BackendOffer("process"),), Resources(cpu_milli=10**9, memory=1 << 50))
        await self.propose(OpenSession(EPOCH, (), 2 * AT_ONCE, offer))
        forward_ms = AGO_MS // (self._jobs // FORWARD_EVERY + 1)
        next_forward, began = FORWARD_EVERY, time.monotonic()
        while self._made < self._jobs:
            count = min(AT_ONCE, self._jobs - self._made)
            async with trio.open_nursery() as nursery:
                for _ in range(count):
                    nursery.start_soon(self._submit)
            leases = self._machine.leases_of(self._me, EPOCH)
            self._seq += 1
            await self.propose(Report(EPOCH, self._seq, tuple([Ended(key, _outcome(key)) for key in leases])))
            if self._made >= next_forward:
                next_forward += FORWARD_EVERY
                await self.propose(ClockSet(secrets.token_hex(32), self._machine.wall_ms + forward_ms))
            if self._made % 50_000 < AT_ONCE:
                print(
                    f"  {self._made} jobs, {self._made / (time.monotonic() - began):.0f}/s", file=sys.stderr, flush=True
                )
        await self.propose(Claim(EPOCH, self._seq + 1, 0, offer))

    async def _submit(self) -> None:
        number = self._made
        self._made += 1
        spec = JobSpec(
            backend=("process",),
            run=Run(args=("/usr/bin/thumbnail", f"--image={number}")),
            name=f"image-{number % 1000}",
            labels=(("project", f"p{number % 10}"), ("batch", str(number // 1000))),
        )
        command = Submit(_id(self._machine.wall_ms), spec, "somebody")
        while True:
            answer = await self.propose(command)
            if isinstance(answer, Submitted):
                return
            assert isinstance(answer, Rejected) and answer.reason is Reason.BUSY, answer
            await trio.sleep(0.1)  # finished jobs wait to be stored: as any client does

    async def propose(self, command: AnyCommand) -> AnyAnswer:
        result = await self._log.propose(self._me, codec.encode(command), timeout_s=60)
        if not isinstance(result, Committed):
            raise Unavailable(f"not committed: {result}")
        answer: AnyAnswer = codec.decode(result.answer, AnyAnswer)
        return answer


def _outcome(key: AttemptKey) -> Outcome:
    """One in a hundred fails."""
    return Outcome(EndReason.EXIT, exit_code=int(key.fence % 100 == 0), stdout=Inline(b"done\n"))


def _id(wall_ms: int) -> JobId:
    return new_job_id(wall_ms, os.urandom(10))


async def fill(path: Path, jobs: int) -> None:
    """A home as a server leaves it that has founded a mesh and finished so many jobs in it."""
    home = Home(path)
    try:
        key = KeyPair.load_or_create(home.identity_key)
        mesh_file = found_mesh(home, key, FULL, (Role.SERVER, Role.WORKER))
        began_s = CLOCKS.now_s()
        began_ms = CLOCKS.wall_ms() - AGO_MS - 3_600_000
        machine = Machine()
        archive: list[Archive] = []

        def applied(position: int) -> None:
            machine.take_events()
            if archive:
                archive[0].applied()

        transport = MemoryTransport(MemoryNetwork(), key.node_id, lambda *_: False, lambda peer: (), _Alone())
        log = ServerLog(
            directory=home.raft,
            mesh=mesh_file.mesh,
            me=key.node_id,
            machine=machine,
            transport=transport,
            servers=machine.server_ids,
            founding=True,
            settings=RaftSettings(),
            on_applied=applied,
            on_leadership=lambda leads: None,
            clocks=Clocks(CLOCKS.now_s, lambda: began_ms + int(1000 * (CLOCKS.now_s() - began_s)), lambda: False),
        )
        store = await Store.open(home.blobs)
        archive.append(Archive(key.node_id, machine, log, home.history_index))
        async with trio.open_nursery() as nursery:
            await nursery.start(log.serve)
            await nursery.start(archive[0].serve, store, _nobody)
            member = Member(key.node_id, FULL, (Role.SERVER, Role.WORKER))
            await Filler(key.node_id, machine, log, jobs).run(member, mesh_file.mesh)
            while machine.history.due() or machine.history.dropped < machine.history.last:  # noqa: ASYNC110 - as a person would
                await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
        home.write_mesh(replace(mesh_file, has_journal=True))
        home.write_counters(Counters(starts=1, epoch=EPOCH))
    finally:
        home.close()


class _Alone:
    def peer_up(self, peer: NodeId) -> None: ...
    def peer_down(self, peer: NodeId) -> None: ...


async def _nobody(ref: BlobRef) -> None:
    raise Unavailable("there is one server only")


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Figure:
    what: str
    empty: float | None
    full: float
    bound: str
    is_within: bool


def measure(jobs: int, kept: Path | None) -> list[Figure]:
    """`kept`: filled the first time, and used again after that."""
    SCRATCH.mkdir(exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="history-", dir=SCRATCH))
    mesh = DevMesh(directory)
    try:
        filled = directory / FULL if kept is None else kept
        if not filled.exists():
            filled.mkdir()
            began = time.monotonic()
            trio.run(fill, filled, jobs)
            print(f"filled in {time.monotonic() - began:.0f} s; {_size_mb(filled)}", file=sys.stderr)
        if kept is not None:
            shutil.copytree(kept, directory / FULL)
        mesh.start(EMPTY)
        mesh.start(FULL)
        time.sleep(SETTLE_S)
        for name in (EMPTY, FULL):
            mesh.kill(name)
        ready_s = {name: _timed(lambda name=name: mesh.start(name)) for name in (EMPTY, FULL)}  # type: ignore[misc]
        ready_cpu_s = {name: cpu_s(mesh.agents[name].pid) for name in (EMPTY, FULL)}
        time.sleep(SETTLE_S)
        pages = _pages_ms(mesh, jobs)
        submits = _submits_ms(mesh)
        memory = {name: resident_bytes(mesh.agents[name].pid) / 1e6 for name in (EMPTY, FULL)}
    finally:
        mesh.stop()
        shutil.rmtree(directory)
    above, ratio = memory[FULL] - memory[EMPTY], submits[FULL] / submits[EMPTY]
    return [
        Figure("memory, MB", memory[EMPTY], memory[FULL], f"<= {MEMORY_MB_MAX:g} above", above <= MEMORY_MB_MAX),
        Figure("start to ready, s", ready_s[EMPTY], ready_s[FULL], f"< {READY_S_MAX:g}", ready_s[FULL] < READY_S_MAX),
        Figure("… of CPU", ready_cpu_s[EMPTY], ready_cpu_s[FULL], "what it takes without others beside it", True),
        *(Figure(f"mesh ps {what}, ms", None, ms, f"< {PAGE_MS_MAX:g}", ms < PAGE_MS_MAX) for what, ms in pages.items()),
        Figure("submit, ms (median)", submits[EMPTY], submits[FULL], f"<= {SUBMIT_RATIO_MAX:g} x", ratio <= SUBMIT_RATIO_MAX),
    ]  # fmt: skip


def _pages_ms(mesh: DevMesh, jobs: int) -> dict[str, float]:
    """Medians of pages of fifty."""
    asked: dict[str, dict[str, object]] = {
        "--state failed": {"states": ("failed",)},
        "--name image-7": {"name": "image-7"},
        "-l project=p3": {"labels": {"project": "p3"}},
        "-l batch=0 --state failed": {"labels": {"batch": "0"}, "states": ("failed",)},
        "-l project=p3 --name image-4": {"labels": {"project": "p3"}, "name": "image-4"},
    }
    took: dict[str, float] = {}
    with client_of(mesh, FULL) as client:
        for what, options in asked.items():
            found = 0

            def page(options: dict[str, object] = options) -> None:
                nonlocal found
                found = len(list(client.jobs(limit=50, **options)))  # type: ignore[arg-type]

            took[what] = statistics.median(_timed(page) for _ in range(PAGES)) * 1000
            print(f"  {what}: {found} jobs", file=sys.stderr)
        assert client.summary().jobs >= jobs
    return took


def _submits_ms(mesh: DevMesh) -> dict[str, float]:
    """One at a time, in turn at both, of jobs that nobody can run."""
    document = {"run": {"args": ["true"]}, "needs": {"labels": "zone=nowhere"}}
    took: dict[str, list[float]] = {EMPTY: [], FULL: []}
    with client_of(mesh, EMPTY) as empty, client_of(mesh, FULL) as full:
        for _ in range(SUBMITS):
            for name, client in ((EMPTY, empty), (FULL, full)):
                took[name].append(_timed(lambda client=client: client.submit(document)))  # type: ignore[misc]
    return {name: statistics.median(each) * 1000 for name, each in took.items()}


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _size_mb(home: Path) -> str:
    sizes = {
        name: sum(path.stat().st_size for path in (home / name).rglob("*") if path.is_file()) >> 20
        for name in ("raft", "blobs", "history")
    }
    return ", ".join(f"{name} {size} MB" for name, size in sizes.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="filled once, and used again by later runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    figures = measure(options.jobs, options.keep)
    print(f"{options.jobs} finished jobs; {load()}")
    print(f"{'':<36} {'empty':>10} {'with them':>10}  bound")
    for figure in figures:
        empty = "" if figure.empty is None else f"{figure.empty:.1f}"
        print(
            f"{figure.what:<36} {empty:>10} {figure.full:>10.1f}  {figure.bound}{'' if figure.is_within else '  OVER'}"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=2))
    return 0 if all(figure.is_within for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
