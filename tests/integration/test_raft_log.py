"""Servers of one log on real time, real disks and a network in memory."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from blake3 import blake3

from meshd import codec
from meshd.errors import Corrupt, InvalidRequest, StartRefused, TooLarge, Unavailable
from meshd.model import NodeId
from meshd.net.memory import MemoryNetwork, MemoryTransport
from meshd.ports import Committed, NotCommitted, ProposeResult, Unknown
from meshd.raft.acquaintances import Seen, unpack_acquaintances
from meshd.raft.agreement import Diverged
from meshd.raft.log import ServerLog
from meshd.raft.messages import voter_id
from meshd.raft.settings import RaftSettings
from meshd.raft.state.commands import Batch
from meshd.raft.wire import PROTOCOL

QUICK = RaftSettings(election_min_s=0.3, election_max_s=0.6, heartbeat_s=0.06)
PATIENCE_S = 15.0


class Machine:
    def __init__(self) -> None:
        self.wall_ms = 0
        self.elapsed_ms = 0
        self.entries = 0
        self.seen: list[str] = []
        self.timer_ms: int | None = None

    def apply(self, index: int, batch: bytes) -> list[bytes]:
        entry = codec.decode(batch, Batch)
        self.wall_ms = entry.wall_ms
        self.elapsed_ms += entry.elapsed_ms
        self.entries += 1
        for command in entry.commands:
            self.seen.append(f"{command.origin}:{codec.unpack(bytes(command.body))}")
        return [codec.encode(len(self.seen)) for _ in entry.commands]

    def digest(self) -> str:
        return blake3(codec.encode((self.seen, self.wall_ms))).hexdigest()

    def capture(self) -> Callable[[], bytes]:
        seen, wall_ms = tuple(self.seen), self.wall_ms
        return lambda: codec.encode((seen, wall_ms))

    def unpack(self, data: bytes) -> Callable[[], None]:
        seen, wall_ms = codec.decode(data, tuple[list[str], int], bytes_max=64 << 20)
        return lambda: self.__dict__.update(seen=seen, wall_ms=wall_ms)

    def next_timer_ms(self) -> int | None:
        return self.timer_ms


class Silent:
    def peer_up(self, peer: NodeId) -> None: ...
    def peer_down(self, peer: NodeId) -> None: ...


class Mesh:
    def __init__(self, directory: Path, nursery: trio.Nursery, settings: RaftSettings) -> None:
        self.network = MemoryNetwork()
        self.directory = directory
        self.settings = settings
        self.servers: list[NodeId] = []
        self.draining: list[NodeId] = []
        self.logs: dict[NodeId, ServerLog] = {}
        self.machines: dict[NodeId, Machine] = {}
        self.transports: dict[NodeId, MemoryTransport] = {}
        self.leaderships: list[tuple[NodeId, bool]] = []
        self.diverged: list[NodeId] = []
        self.refused: dict[NodeId, str] = {}
        self._nursery = nursery
        self._scopes: dict[NodeId, trio.CancelScope] = {}
        self._done: dict[NodeId, trio.Event] = {}

    async def start(self, *names: str) -> None:
        for name in names:
            node = NodeId(name)
            if node not in self.servers:
                self.servers.append(node)
            await self._nursery.start(self._run, node)

    async def _run(self, node: NodeId, *, task_status: trio.TaskStatus[None]) -> None:
        transport = self.network.transport(node, lambda *_: True, lambda peer: [f"/memory/{peer}"], Silent())
        self._done[node] = trio.Event()
        with trio.CancelScope() as self._scopes[node]:
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(transport.serve)
                    log = self.log(node, transport)
                    self.transports[node] = transport
                    await nursery.start(log.serve)
                    self.logs[node] = log
                    task_status.started()
            except* Diverged:
                self.diverged.append(node)
            except* StartRefused:
                self.refused[node] = log.why_refused
        self._done[node].set()

    def log(self, node: NodeId, transport: MemoryTransport) -> ServerLog:
        self.machines[node] = Machine()
        is_first = node == self.servers[0] and not (self.directory / node).exists()
        return ServerLog(
            directory=self.directory / node,
            mesh="m",
            me=node,
            machine=self.machines[node],
            transport=transport,
            servers=lambda: self.servers,
            draining=lambda: self.draining,
            founding=is_first,
            settings=self.settings,
            on_applied=lambda index: None,
            on_leadership=lambda leads: self.leaderships.append((node, leads)),
        )

    async def stop(self, *nodes: NodeId) -> None:
        for node in nodes:
            self._scopes[node].cancel()
            await self._done[node].wait()
            del self.logs[node]

    def leader(self) -> NodeId | None:
        return next((node for node, log in self.logs.items() if log.leads()), None)

    async def propose(self, node: str, value: str) -> ProposeResult:
        return await self.logs[NodeId(node)].propose(NodeId(node), codec.encode(value), timeout_s=PATIENCE_S)

    async def formed(self, voters: int) -> NodeId:
        await until(
            lambda: (
                self.leader() is not None
                and sum(log.is_voter for log in self.logs.values()) == voters
                and len(self.logs[self.leader()].voters) == voters  # type: ignore[index]
            ),
            f"{voters} voters",
        )
        leader = self.leader()
        assert leader is not None
        return leader


async def until(condition: Callable[[], bool], what: str) -> None:
    with trio.move_on_after(PATIENCE_S):
        while not condition():
            await trio.sleep(0.01)
        return
    raise AssertionError(f"not within {PATIENCE_S} s: {what}")


@asynccontextmanager
async def meshed(directory: Path, *names: str, settings: RaftSettings = QUICK) -> AsyncIterator[Mesh]:
    async with trio.open_nursery() as nursery:
        mesh = Mesh(directory, nursery, settings)
        await mesh.start(*names)
        yield mesh
        nursery.cancel_scope.cancel()


async def test_three_fresh_servers_form_and_any_of_them_takes_a_command(tmp_path: Path) -> None:
    async with meshed(tmp_path, "a", "b", "c") as mesh:
        with trio.fail_after(3):
            leader = await mesh.formed(3)
        for name in mesh.servers:
            result = await mesh.propose(name, f"from {name}")
            assert isinstance(result, Committed)
        seen = ["a:from a", "b:from b", "c:from c"]
        for name in mesh.servers:
            position = await mesh.logs[name].barrier(timeout_s=PATIENCE_S)
            assert (mesh.machines[name].seen, mesh.logs[name].position) == (seen, position)
        status = mesh.logs[leader].status()
        assert (status.failures_survived, status.leader, len(status.voters)) == (1, leader, 3)
        codec.decode(codec.encode(status), type(status))


async def test_a_second_server_follows_and_does_not_vote(tmp_path: Path) -> None:
    async with meshed(tmp_path, "a", "b") as mesh:
        await mesh.formed(1)
        assert isinstance(await mesh.propose("a", "one"), Committed)
        await until(lambda: mesh.machines[NodeId("b")].seen == ["a:one"], "b follows")
        assert isinstance(await mesh.propose("b", "two"), Committed)
        assert await mesh.logs[NodeId("b")].barrier(timeout_s=PATIENCE_S) == mesh.logs[NodeId("b")].position
        assert (mesh.logs[NodeId("b")].is_voter, mesh.logs[NodeId("a")].status().failures_survived) == (False, 0)


async def test_when_the_leader_is_lost_the_others_go_on_with_everything(tmp_path: Path) -> None:
    async with meshed(tmp_path, "a", "b", "c") as mesh:
        leader = await mesh.formed(3)
        assert isinstance(await mesh.propose(leader, "before"), Committed)
        await mesh.stop(leader)
        survivors = list(mesh.logs)
        for name in survivors:
            assert isinstance(await mesh.propose(name, f"after {name}"), Committed)
        await mesh.start(leader)
        await mesh.logs[leader].barrier(timeout_s=PATIENCE_S)
        expected = [f"{leader}:before", *(f"{name}:after {name}" for name in survivors)]
        assert mesh.machines[leader].seen == expected
        assert mesh.leaderships[0] == ("a", True)


async def test_everything_is_there_after_all_have_stopped(tmp_path: Path) -> None:
    async with meshed(tmp_path, "a", "b", "c") as mesh:
        await mesh.formed(3)
        for number in range(20):
            assert isinstance(await mesh.propose("abc"[number % 3], str(number)), Committed)
        await mesh.stop(*list(mesh.logs))
        await mesh.start("c", "b", "a")
        await mesh.formed(3)
        for name in mesh.servers:
            await mesh.logs[name].barrier(timeout_s=PATIENCE_S)
            assert [line.partition(":")[2] for line in mesh.machines[name].seen] == [str(n) for n in range(20)]


async def test_a_leader_cut_off_neither_reads_nor_commits(tmp_path: Path) -> None:
    async with meshed(tmp_path, "a", "b", "c") as mesh:
        leader = await mesh.formed(3)
        others = [name for name in mesh.servers if name != leader]
        for other in others:
            mesh.network.cut(leader, other)
        await until(lambda: mesh.leader() in others, "another leads")
        assert not mesh.logs[leader].leads()
        with pytest.raises(Unavailable):
            await mesh.logs[leader].barrier(timeout_s=0.2)
        body = codec.encode("lost")
        assert not isinstance(await mesh.logs[leader].propose(leader, body, timeout_s=0.2), Committed)
        for other in others:
            mesh.network.heal(leader, other)
        assert isinstance(await mesh.propose(leader, "healed"), Committed)


async def test_a_command_that_may_be_in_the_log_when_its_time_is_over_is_unknown(tmp_path: Path) -> None:
    async with meshed(tmp_path, "a", "b", "c") as mesh:
        leader = await mesh.formed(3)
        log = mesh.logs[leader]
        assert isinstance(await mesh.propose(leader, "first"), Committed)
        last = log.status().last
        await mesh.stop(*(node for node in mesh.servers if node != leader))
        result = await log.propose(leader, codec.encode("second"), timeout_s=0.3)
        # Written and not committed: the next leader may have it or not.
        assert log.status().last > last
        assert isinstance(result, Unknown), result


async def test_who_did_not_found_waits_for_a_leader_and_says_so(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        mesh = Mesh(tmp_path, nursery, QUICK)
        mesh.servers.append(NodeId("a"))
        await mesh.start("b")
        log = mesh.logs[NodeId("b")]
        assert await log.propose(NodeId("b"), codec.encode("x"), timeout_s=0.1) == NotCommitted("no server leads")
        assert (log.leader, log.is_voter, log.voters, log.leads()) == (None, False, (), False)
        nursery.cancel_scope.cancel()


async def test_a_server_far_behind_gets_a_snapshot(tmp_path: Path) -> None:
    settings = RaftSettings(
        election_min_s=0.3, election_max_s=0.6, heartbeat_s=0.06, snapshot_entries=20, retain_entries=2
    )
    async with meshed(tmp_path, "a", "b", "c", settings=settings) as mesh:
        leader = await mesh.formed(3)
        away = next(name for name in mesh.servers if name != leader)
        await mesh.stop(away)
        for number in range(60):
            assert isinstance(await mesh.propose(leader, f"{number} {'x' * 20_000}"), Committed)
        await until(lambda: mesh.logs[leader].status().first > 40, "the log is trimmed")
        await mesh.start(away)
        await until(lambda: mesh.machines[away].seen == mesh.machines[leader].seen, "the one that was away has it all")
        assert mesh.machines[away].entries < 60, "by a snapshot, not by entries"
        await mesh.stop(away)
        await mesh.start(away)
        await mesh.logs[away].barrier(timeout_s=PATIENCE_S)
        assert len(mesh.machines[away].seen) == 60


async def test_states_that_differ_show_in_the_status_and_the_one_that_is_alone_stops(tmp_path: Path) -> None:
    settings = RaftSettings(
        election_min_s=0.3, election_max_s=0.6, heartbeat_s=0.06, checkpoint_entries=4, snapshot_entries=5
    )
    async with meshed(tmp_path, "a", "b", "c", settings=settings) as mesh:
        leader = await mesh.formed(3)
        wrong, away = (name for name in mesh.servers if name != leader)
        for number in range(6):
            assert isinstance(await mesh.propose(leader, str(number)), Committed)
        await until(lambda: list((tmp_path / wrong).glob("snapshot-*")) != [], "it has a snapshot")
        await mesh.stop(away)
        mesh.machines[wrong].seen.append("by mistake")
        for number in range(8):
            await mesh.logs[leader].propose(leader, codec.encode(number), timeout_s=0.2)
        log = mesh.logs[leader]
        assert log.status().disputed and not log.leads()
        refused = await log.propose(leader, codec.encode("x"), timeout_s=0.2)
        assert refused == NotCommitted("the voters' states differ and none has a majority; see `mesh cluster status`")
        await mesh.start(away)
        await until(lambda: mesh.diverged == [wrong], "the minority stops")
        assert {path.name[-6:] for path in (tmp_path / wrong).glob("snapshot-*")} == {".bad-1"}
        del mesh.logs[wrong]
        assert isinstance(await mesh.propose(away, "later"), Committed)
        await mesh.start(wrong)
        await until(lambda: mesh.machines[wrong].seen == mesh.machines[away].seen, "it is equal again")


async def test_leadership_is_handed_over(tmp_path: Path) -> None:
    async with meshed(tmp_path, "a", "b", "c") as mesh:
        leader = await mesh.formed(3)
        await mesh.logs[leader].hand_over()
        await until(lambda: mesh.leader() not in (None, leader), "another leads")
        assert isinstance(await mesh.propose(leader, "after"), Committed)


async def test_a_sole_voter_cannot_hand_over(tmp_path: Path) -> None:
    async with meshed(tmp_path, "a") as mesh:
        await mesh.formed(1)
        with pytest.raises(Unavailable, match="no other voter"):
            await mesh.logs[NodeId("a")].hand_over()


async def test_a_draining_leader_gives_its_seat_to_a_fourth_server(tmp_path: Path) -> None:
    async with meshed(tmp_path, "a", "b", "c", "d") as mesh:
        leader = await mesh.formed(3)
        mesh.draining.append(leader)
        await until(lambda: not mesh.logs[leader].is_voter, "the draining server does not vote")
        others = [name for name in mesh.servers if name != leader]
        await until(lambda: all(mesh.logs[name].is_voter for name in others), "the others do")


async def test_a_removed_server_loses_its_vote(tmp_path: Path) -> None:
    async with meshed(tmp_path, "a", "b", "c", "d") as mesh:
        leader = await mesh.formed(3)
        gone = next(name for name in mesh.logs[leader].voters if name != leader)
        mesh.servers.remove(gone)
        await until(
            lambda: gone not in mesh.logs[leader].voters and len(mesh.logs[leader].voters) == 3,
            "replaced by the fourth",
        )


async def test_nonsense_is_refused_before_it_reaches_the_log(tmp_path: Path) -> None:
    async with meshed(tmp_path, "a") as mesh:
        await mesh.formed(1)
        log = mesh.logs[NodeId("a")]
        for body in (b"", b"\xc1", codec.encode(1) + codec.encode(2), b"\x92\x01"):
            with pytest.raises(InvalidRequest):
                await log.propose(NodeId("a"), body, timeout_s=1)
        with pytest.raises(TooLarge):
            await log.propose(NodeId("a"), codec.encode(bytes(codec.COMMAND_BYTES_MAX)), timeout_s=1)
        assert isinstance(await mesh.propose("a", "sense"), Committed)


async def test_random_bytes_on_the_stream_harm_nobody(tmp_path: Path) -> None:
    async with meshed(tmp_path, "a", "b", "c") as mesh:
        leader = await mesh.formed(3)
        stranger = mesh.network.transport(NodeId("x"), lambda *_: True, lambda peer: [f"/memory/{peer}"], Silent())
        async with trio.open_nursery() as nursery:
            await nursery.start(stranger.serve)
            for data in (b"\xff" * 64, b"\x05\x00\x00\x00hello", bytes(4), b""):
                stream = await stranger.open_stream(leader, PROTOCOL, timeout_s=1)
                await stream.write(data)
                await stream.aclose()
            nursery.cancel_scope.cancel()
        assert isinstance(await mesh.propose("b", "still here"), Committed)


async def test_many_commands_share_entries_and_each_gets_its_own_answer(tmp_path: Path) -> None:
    async with meshed(tmp_path, "a", "b", "c") as mesh:
        leader = await mesh.formed(3)
        answers: dict[int, ProposeResult] = {}

        async def one(number: int) -> None:
            answers[number] = await mesh.propose(mesh.servers[number % 3], str(number))

        before = mesh.machines[leader].entries
        async with trio.open_nursery() as nursery:
            for number in range(600):
                nursery.start_soon(one, number)
        assert sorted(line.partition(":")[2] for line in mesh.machines[leader].seen) == sorted(map(str, range(600)))
        assert all(isinstance(answer, Committed) for answer in answers.values())
        assert mesh.machines[leader].entries - before < 60


async def test_ticks_are_written_only_while_something_timed_is_pending(tmp_path: Path) -> None:
    async with meshed(tmp_path, "a") as mesh:
        await mesh.formed(1)
        machine = mesh.machines[NodeId("a")]
        await mesh.propose("a", "first")
        before = machine.entries
        await trio.sleep(0.3)
        assert machine.entries == before
        elapsed_ms = machine.elapsed_ms
        machine.timer_ms = 50
        await mesh.propose("a", "arm")
        await until(lambda: machine.entries >= before + 4, "ticks")
        machine.timer_ms = None
        assert machine.elapsed_ms - elapsed_ms >= 300, "the time in which nothing was written counts"


async def test_a_second_founding_is_refused(tmp_path: Path) -> None:
    async with meshed(tmp_path, "a") as mesh:
        await mesh.formed(1)
        await mesh.stop(NodeId("a"))
        transport = mesh.network.transport(NodeId("a"), lambda *_: True, lambda peer: [], Silent())
        log = mesh.log(NodeId("a"), transport)
        log._is_founding = True
        with pytest.raises(StartRefused, match="founded in an empty directory"):
            await log.serve()


async def test_a_damaged_journal_stops_the_start_and_names_the_place(tmp_path: Path) -> None:
    async with meshed(tmp_path, "a") as mesh:
        await mesh.formed(1)
        for number in range(5):
            await mesh.propose("a", str(number))
        await mesh.stop(NodeId("a"))
        path = sorted((tmp_path / "a").glob("journal-*"))[-1]
        with path.open("r+b") as file:
            file.seek(4096 + 25)
            file.write(b"\xff\xff\xff")
        transport = mesh.network.transport(NodeId("a"), lambda *_: True, lambda peer: [], Silent())
        with pytest.raises(Corrupt, match=rf"{path.name} at byte 4096.*meshd recover"):
            await mesh.log(NodeId("a"), transport).serve()


async def test_a_disk_that_fails_stops_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with meshed(tmp_path, "a") as mesh:
        await mesh.formed(1)
        await mesh.stop(NodeId("a"))

        def fail(descriptor: int) -> None:
            raise OSError(5, "Input/output error")

        transport = mesh.network.transport(NodeId("a"), lambda *_: True, lambda peer: [], Silent())
        log = mesh.log(NodeId("a"), transport)

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            with pytest.raises(Corrupt, match="Input/output error"):
                await log.serve(task_status=task_status)

        async with trio.open_nursery() as nursery:
            await nursery.start(run)
            await until(log.leads, "it leads")
            monkeypatch.setattr("os.fdatasync", fail)
            assert isinstance(await log.propose(NodeId("a"), codec.encode("x"), timeout_s=9), Unknown)
            assert isinstance(await log.propose(NodeId("a"), codec.encode("x"), timeout_s=0.1), NotCommitted)


async def test_an_older_copy_of_a_directory_is_refused_by_whoever_remembers_also_after_all_have_restarted(
    tmp_path: Path,
) -> None:
    async with meshed(tmp_path / "mesh", "a", "b", "c") as mesh:
        leader = await mesh.formed(3)
        victim = next(node for node in mesh.logs if node != leader)
        await mesh.stop(victim)
        shutil.copytree(tmp_path / "mesh" / victim, tmp_path / "backup")
        await mesh.start(victim)
        await mesh.formed(3)
        row = next(row for row in mesh.logs[victim].status().servers if row.node == victim)
        copy = Seen(voter_id(victim, row.incarnation), 2, "another", 99)

        def is_written_down(node: str) -> bool:
            path = tmp_path / "mesh" / node / "acquaintances"
            return path.exists() and bool(unpack_acquaintances(path.read_bytes()).why_older(copy))

        await until(lambda: all(is_written_down(node) for node in mesh.logs if node != victim), "written down")
        await mesh.stop(*mesh.logs)

        shutil.rmtree(tmp_path / "mesh" / victim)
        shutil.copytree(tmp_path / "backup", tmp_path / "mesh" / victim)
        await mesh.start(*sorted({"a", "b", "c"} - {victim}))
        await mesh.start(victim)
        await until(lambda: victim in mesh.refused, "the copy is refused")
        assert "its start 2 was another one" in mesh.refused[victim]
        assert isinstance(await mesh.propose(next(iter({"a", "b", "c"} - {victim})), "goes on"), Committed)
