"""Calls over one stream: what reaches whom, what a caller may conclude, and what a bad peer cannot do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from meshd.errors import (
    Busy,
    Conflict,
    MeshError,
    NotAllowed,
    PeerFault,
    TooLarge,
    Unavailable,
    UnknownOutcome,
)
from meshd.model import NodeId
from meshd.net import rpc as of_rpc
from meshd.net.frames import BODY_BYTES_MAX, Answer, FrameReader, Request, error_of, framed, parse
from meshd.net.memory import MemoryNetwork, MemoryTransport
from meshd.net.rpc import (
    ANSWERS_BYTES_MAX,
    CALLS_MAX,
    FRAMES_PER_TURN,
    OURS_BYTES_MAX,
    PROTOCOL,
    REQUESTS_BYTES_MAX,
    Admit,
    Greeting,
    StreamRpc,
    admit_anyone,
)
from meshd.ports import Stream

A, B = NodeId("a"), NodeId("b")


@dataclass
class Seen:
    """What a node was told about its peers."""

    events: list[str] = field(default_factory=list)

    def peer_up(self, peer: NodeId) -> None:
        self.events.append(f"up {peer}")

    def peer_down(self, peer: NodeId) -> None:
        self.events.append(f"down {peer}")


@dataclass
class Node:
    transport: MemoryTransport
    rpc: StreamRpc
    seen: Seen


class Mesh:
    """Nodes with an `echo` method, on one memory network."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.network = MemoryNetwork()
        self.nursery = nursery

    async def node(
        self, name: NodeId, *, greeting: Greeting = lambda: b"", admit: Admit = admit_anyone, answers: bool = True
    ) -> Node:
        seen = Seen()
        transport = self.network.transport(name, lambda _peer, _protocol: True, lambda p: [f"/memory/{p}"], seen)
        await self.nursery.start(transport.serve)
        rpc = StreamRpc(transport, greeting=greeting, admit=admit)
        if answers:
            rpc.register("echo", echo)
            await self.nursery.start(rpc.serve)
        return Node(transport, rpc, seen)


async def echo(_peer: NodeId, body: bytes) -> bytes:
    return body


@asynccontextmanager
async def mesh() -> AsyncIterator[Mesh]:
    async with trio.open_nursery() as nursery:
        yield Mesh(nursery)
        nursery.cancel_scope.cancel()


async def test_an_answer_reaches_its_caller(autojump_clock: MockClock) -> None:
    async with mesh() as m:
        a, b = await m.node(A), await m.node(B)
        assert await a.rpc.call(B, "echo", b"hello", timeout_s=5) == b"hello"
        assert await b.rpc.call(A, "echo", b"back", timeout_s=5) == b"back"


async def test_ten_thousand_calls_share_one_stream_and_few_writes(autojump_clock: MockClock) -> None:
    async with mesh() as m:
        a, _ = await m.node(A), await m.node(B)
        answers: dict[int, bytes] = {}

        async def ask(first: int) -> None:
            for i in range(first, 10_000, 500):
                answers[i] = await a.rpc.call(B, "echo", b"%d" % i, timeout_s=60)

        async with trio.open_nursery() as callers:
            for first in range(500):
                callers.start_soon(ask, first)
        assert answers == {i: b"%d" % i for i in range(10_000)}


async def test_the_peers_error_keeps_its_class_message_and_hint(autojump_clock: MockClock) -> None:
    async def refuse(_peer: NodeId, _body: bytes) -> bytes:
        raise Conflict("someone was first", hint="look again")

    async with mesh() as m:
        a, b = await m.node(A), await m.node(B)
        b.rpc.register("refuse", refuse)
        with pytest.raises(Conflict) as caught:
            await a.rpc.call(B, "refuse", b"", timeout_s=5)
        assert (caught.value.message, caught.value.hint) == ("someone was first", "look again")


async def test_a_bug_in_a_method_is_the_peers_fault_and_harms_no_other_call(autojump_clock: MockClock) -> None:
    async def trip(_peer: NodeId, _body: bytes) -> bytes:
        raise KeyError("bug")

    async with mesh() as m:
        a, b = await m.node(A), await m.node(B)
        b.rpc.register("trip", trip)
        with pytest.raises(PeerFault):
            await a.rpc.call(B, "trip", b"", timeout_s=5)
        assert await a.rpc.call(B, "echo", b"still here", timeout_s=5) == b"still here"
        assert b.rpc.counters() == {"methods_failed": 1}


async def test_a_node_that_has_no_such_method_is_one_to_pass_by_not_one_that_knows_of_nothing(
    autojump_clock: MockClock,
) -> None:
    # Torture, seed 23 of five nodes: a read that met a voter as it started was told that an acknowledged job is not there.
    async with mesh() as m:
        a, _ = await m.node(A), await m.node(B)
        with pytest.raises(Unavailable) as caught:
            await a.rpc.call(B, "no.such", b"", timeout_s=5)
        assert not isinstance(caught.value, UnknownOutcome)


async def test_a_call_that_was_never_sent_is_unavailable_not_unknown(autojump_clock: MockClock) -> None:
    async with mesh() as m:
        a, _ = await m.node(A), await m.node(B)
        m.network.cut(A, B)
        with pytest.raises(Unavailable) as caught:
            await a.rpc.call(B, "echo", b"", timeout_s=3)
        assert not isinstance(caught.value, UnknownOutcome)


async def test_a_call_that_nobody_answered_in_time_is_unknown_and_its_method_is_stopped(
    autojump_clock: MockClock,
) -> None:
    stopped_at: list[float] = []

    async def dawdle(_peer: NodeId, _body: bytes) -> bytes:
        try:
            await trio.sleep(60)
        finally:
            stopped_at.append(trio.current_time())
        return b""

    async with mesh() as m:
        a, b = await m.node(A), await m.node(B)
        b.rpc.register("dawdle", dawdle)
        began_at = trio.current_time()
        with pytest.raises(UnknownOutcome):
            await a.rpc.call(B, "dawdle", b"", timeout_s=3)
        await trio.sleep(0.1)
        assert [round(at - began_at) for at in stopped_at] == [3]


async def test_a_call_under_way_when_the_peer_is_lost_is_unknown(autojump_clock: MockClock) -> None:
    async def die(_peer: NodeId, _body: bytes) -> bytes:
        m.network.lose(B)
        await trio.sleep_forever()
        return b""

    async with mesh() as m:
        a, b = await m.node(A), await m.node(B)
        b.rpc.register("die", die)
        with pytest.raises(UnknownOutcome):
            await a.rpc.call(B, "die", b"", timeout_s=3)
        assert await a.rpc.call(B, "echo", b"again", timeout_s=3) == b"again"


async def test_one_call_too_many_in_flight_is_busy(autojump_clock: MockClock) -> None:
    async def dawdle(_peer: NodeId, _body: bytes) -> bytes:
        await trio.sleep(5)
        return b""

    async with mesh() as m:
        a, b = await m.node(A), await m.node(B)
        b.rpc.register("dawdle", dawdle)
        async with trio.open_nursery() as callers:
            for _ in range(CALLS_MAX):
                callers.start_soon(lambda: a.rpc.call(B, "dawdle", b"", timeout_s=10))
            await trio.sleep(1)
            with pytest.raises(Busy):
                await a.rpc.call(B, "echo", b"", timeout_s=10)
        assert await a.rpc.call(B, "echo", b"free again", timeout_s=10) == b"free again"


async def test_a_body_over_the_limit_is_refused_before_it_is_sent(autojump_clock: MockClock) -> None:
    async with mesh() as m:
        a, _ = await m.node(A), await m.node(B)
        largest = bytes(BODY_BYTES_MAX)
        assert await a.rpc.call(B, "echo", largest, timeout_s=5) == largest
        with pytest.raises(TooLarge):
            await a.rpc.call(B, "echo", largest + b"x", timeout_s=5)


async def test_a_stopped_peer_is_dropped_within_ten_seconds_by_both_sides(autojump_clock: MockClock) -> None:
    async with mesh() as m:
        a, b = await m.node(A), await m.node(B)
        await a.rpc.call(B, "echo", b"", timeout_s=5)  # one stream, from a to b
        m.network.cut(A, B)
        cut_at = trio.current_time()
        while not (a.seen.events[-1] == "down b" and b.seen.events[-1] == "down a"):
            await trio.sleep(0.1)
        assert trio.current_time() - cut_at <= 10.2
        m.network.heal(A, B)
        assert await a.rpc.call(B, "echo", b"back", timeout_s=5) == b"back"


async def test_an_idle_stream_lives_on_and_knows_its_round_trip(autojump_clock: MockClock) -> None:
    async with mesh() as m:
        a, _ = await m.node(A), await m.node(B)
        assert a.rpc.connected_rtt_ms(B) is None
        await a.rpc.call(B, "echo", b"", timeout_s=5)
        await trio.sleep(600)
        assert a.seen.events == ["up b"]
        assert a.rpc.connected_rtt_ms(B) is not None


async def test_who_is_not_admitted_hears_why_and_is_never_answered(autojump_clock: MockClock) -> None:
    async def members_only(_peer: NodeId, greeting: bytes) -> None:
        if greeting != b"certificate":
            raise NotAllowed("no certificate", hint="meshd up --join INVITE")

    async with mesh() as m:
        a = await m.node(A, greeting=lambda: b"forged")
        b = await m.node(B, greeting=lambda: b"certificate", admit=members_only)
        with pytest.raises(NotAllowed, match="no certificate"):
            await a.rpc.call(B, "echo", b"", timeout_s=5)
        with pytest.raises(NotAllowed, match="no certificate"):
            await b.rpc.call(A, "echo", b"", timeout_s=5)  # nor does b say anything to one that it does not know


async def test_an_admission_that_trips_harms_only_its_stream(autojump_clock: MockClock) -> None:
    async def trip(_peer: NodeId, _greeting: bytes) -> None:
        raise ValueError("bug")

    async with mesh() as m:
        a, b = await m.node(A, admit=trip), await m.node(B)
        with pytest.raises(PeerFault):
            await a.rpc.call(B, "echo", b"", timeout_s=5)
        with pytest.raises(Unavailable):
            await b.rpc.call(A, "echo", b"", timeout_s=5)


async def test_a_closed_stream_is_opened_and_greeted_anew(autojump_clock: MockClock) -> None:
    greeted: list[bytes] = []
    words = iter([b"one", b"two"])

    async def note(_peer: NodeId, greeting: bytes) -> None:
        greeted.append(greeting)

    async with mesh() as m:
        a, _ = await m.node(A, greeting=lambda: next(words)), await m.node(B, admit=note)
        await a.rpc.call(B, "echo", b"", timeout_s=5)
        a.rpc.close(B)
        await a.rpc.call(B, "echo", b"", timeout_s=5)
        assert greeted == [b"one", b"two"]


HELLO = b"\x00\x00\x00\x05\x93\x00\xc3\xc4\x00"
"""An empty greeting, as it is on the wire."""


async def _read_to_end(stream: Stream) -> None:
    while await stream.read(65536):
        pass


async def _speak(attacker: Node, data: bytes, *, linger_s: float = 1) -> None:
    """Raw bytes on an RPC stream to b; the stream then ends or breaks."""
    try:
        stream = await attacker.transport.open_stream(B, PROTOCOL, timeout_s=5)
        await stream.write(data)
        with trio.move_on_after(linger_s):
            await _read_to_end(stream)
        await stream.aclose()
    except MeshError:
        pass


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xff\xff\xff\xff", id="length of 4 GiB"),
        pytest.param(HELLO + b"\xff\xff\xff\xff", id="length of 4 GiB after the greeting"),
        pytest.param(HELLO + b"\x00\x00\x00\x00", id="empty frame"),
        pytest.param(HELLO + b"\x00\x00\x00\x01\xc1", id="no msgpack"),
        pytest.param(HELLO + b"\x00\x00\x00\x02\x91\x01", id="too short a request"),
        pytest.param(HELLO + b"\x00\x00\x00\x05\x91\x91\x91\x91\x91", id="nested"),
    ],
)
async def test_malformed_frames_end_their_stream_and_nothing_else(data: bytes, autojump_clock: MockClock) -> None:
    async with mesh() as m:
        good, bad, b = await m.node(A), await m.node(NodeId("bad"), answers=False), await m.node(B)
        assert await good.rpc.call(B, "echo", b"1", timeout_s=5) == b"1"
        await _speak(bad, data)
        assert b.rpc.counters() == {"frames_malformed": 1}
        assert await good.rpc.call(B, "echo", b"2", timeout_s=5) == b"2"


async def test_a_greeting_is_refused_by_its_length_before_its_bytes_are_kept(autojump_clock: MockClock) -> None:
    async with mesh() as m:
        bad, b = await m.node(NodeId("bad"), answers=False), await m.node(B)

        async def greet(stream: Stream) -> None:
            await stream.write((1 << 20).to_bytes(4, "big"))
            await _read_to_end(stream)

        began_at = trio.current_time()
        with pytest.raises(Unavailable):
            await greet(await bad.transport.open_stream(B, PROTOCOL, timeout_s=5))
        bad.transport.handle(PROTOCOL, greet)  # nor is the one that answers let say more
        with pytest.raises(PeerFault):
            await b.rpc.call(NodeId("bad"), "echo", b"", timeout_s=5)
        assert trio.current_time() - began_at < 1
        assert b.rpc.counters() == {"frames_malformed": 2}


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_never_stop_the_node(data: bytes, is_greeted: bool) -> None:
    async def run() -> None:
        async with mesh() as m:
            bad, b = await m.node(NodeId("bad"), answers=False), await m.node(B)
            await _speak(bad, (HELLO if is_greeted else b"") + data)
            a = await m.node(A)
            assert await a.rpc.call(B, "echo", b"alive", timeout_s=5) == b"alive"
            assert b.rpc.counters().get("methods_failed", 0) == 0

    trio.run(run, clock=MockClock(autojump_threshold=0))


async def test_a_peer_that_stalls_within_a_frame_or_a_greeting_is_let_go(autojump_clock: MockClock) -> None:
    async with mesh() as m:
        bad, b = await m.node(NodeId("bad"), answers=False), await m.node(B)
        silent = await bad.transport.open_stream(B, PROTOCOL, timeout_s=5)
        await silent.write(b"\x00")
        with trio.fail_after(15):
            assert await silent.read(100) == b""
        halfway = await bad.transport.open_stream(B, PROTOCOL, timeout_s=5)
        await halfway.write(HELLO + b"\x00\x00\x10\x00 and then nothing")
        with trio.fail_after(15), pytest.raises(Unavailable):
            await _read_to_end(halfway)
        assert b.rpc.counters()["peers_silent"] == 1


async def test_a_peer_that_never_greets_is_dropped(autojump_clock: MockClock) -> None:
    """Its connection would stay, and every call to it would wait for a greeting again."""
    async with mesh() as m:
        bad, b = await m.node(NodeId("bad"), answers=False), await m.node(B)

        async def never(_stream: Stream) -> None:
            await trio.sleep_forever()

        bad.transport.handle(PROTOCOL, never)
        with trio.fail_after(15), pytest.raises(Unavailable, match="did not greet"):
            await b.rpc.call(NodeId("bad"), "echo", b"", timeout_s=14)
        assert bad.seen.events == ["up b", "down b"]


async def test_many_small_frames_in_one_read_leave_the_others_their_turns(autojump_clock: MockClock) -> None:
    async with mesh() as m:
        bad, _ = await m.node(NodeId("bad"), answers=False), await m.node(B)
        stream = await bad.transport.open_stream(B, PROTOCOL, timeout_s=5)
        await stream.write(HELLO)
        frames, turns = 8000, 0

        async def take_turns() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        m.nursery.start_soon(take_turns)
        await stream.write(framed(Request(9, "", 100, b"")) * frames)
        answers = FrameReader(stream)
        for _ in range(1 + frames):  # the greeting first
            assert await answers.next() is not None
        assert turns > frames / FRAMES_PER_TURN


async def test_a_peer_that_asks_on_and_leaves_its_answers_unread_is_cut_off(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its calls would fill this node's memory with answers."""
    monkeypatch.setattr(of_rpc, "OUTBOX_BYTES_MAX", 64 << 10)
    async with mesh() as m:
        bad, b = await m.node(NodeId("bad"), answers=False), await m.node(B)
        stream = await bad.transport.open_stream(B, PROTOCOL, timeout_s=5)
        await stream.write(HELLO)

        async def ask_on() -> None:
            while True:
                await stream.write(framed(Request(9, "no.such", 100, b"")) * 1000)

        with trio.fail_after(10), pytest.raises(Unavailable):
            await ask_on()
        assert b.rpc.counters()["frames_malformed"] == 1


async def test_what_a_peers_large_requests_hold_at_a_time_has_a_bound(autojump_clock: MockClock) -> None:
    """Counted alone, a peer's 1024 calls of 4 MiB would take this node 4 GiB."""
    held = 0

    async def hold(_peer: NodeId, body: bytes) -> bytes:
        nonlocal held
        held += len(body)
        await trio.sleep_forever()
        return b""

    async with mesh() as m:
        bad, b = await m.node(NodeId("bad"), answers=False), await m.node(B)
        b.rpc.register("hold", hold)
        stream = await bad.transport.open_stream(B, PROTOCOL, timeout_s=5)
        await stream.write(HELLO)
        for _ in range(200):
            await stream.write(framed(Request(1, "hold", 60_000, bytes(1 << 20))))
        await stream.write(framed(Request(2, "echo", 1000, b"small")))
        frames = FrameReader(stream)
        assert await frames.next() is not None  # the greeting
        refused: list[MeshError] = []
        while (answer := parse(await frames.next() or b"", Answer)).id == 1:
            refused.append(error_of(answer.body))
        assert answer.body == b"small"  # calls that are not large still pass
        assert {type(error) for error in refused} == {Busy}
        assert 0 < held <= REQUESTS_BYTES_MAX
        assert len(refused) == 200 - (held >> 20)


async def test_a_member_with_many_of_the_largest_calls_waits_its_turn_and_is_never_refused(
    autojump_clock: MockClock,
) -> None:
    async def dawdle(_peer: NodeId, body: bytes) -> bytes:
        await trio.sleep(1)
        return b"%d" % len(body)

    async with mesh() as m:
        a, b = await m.node(A), await m.node(B)
        b.rpc.register("dawdle", dawdle)
        answers: list[bytes] = []

        async def ask() -> None:
            answers.append(await a.rpc.call(B, "dawdle", bytes(BODY_BYTES_MAX), timeout_s=30))

        async with trio.open_nursery() as callers:
            for _ in range(40):
                callers.start_soon(ask)
            await trio.sleep(0.1)
            assert await a.rpc.call(B, "echo", b"small", timeout_s=0.5) == b"small"  # not behind the large ones
        assert answers == [b"%d" % BODY_BYTES_MAX] * 40


async def test_a_large_call_that_found_no_room_in_time_was_never_sent(autojump_clock: MockClock) -> None:
    async def dawdle(_peer: NodeId, _body: bytes) -> bytes:
        await trio.sleep_forever()
        return b""

    async with mesh() as m:
        a, b = await m.node(A), await m.node(B)
        b.rpc.register("dawdle", dawdle)

        async def fill() -> None:
            with pytest.raises(UnknownOutcome):
                await a.rpc.call(B, "dawdle", bytes(BODY_BYTES_MAX), timeout_s=5)

        async with trio.open_nursery() as callers:
            for _ in range(OURS_BYTES_MAX // BODY_BYTES_MAX):
                callers.start_soon(fill)
            await trio.sleep(0.1)
            with pytest.raises(Unavailable) as caught:
                await a.rpc.call(B, "echo", bytes(BODY_BYTES_MAX), timeout_s=1)
            assert not isinstance(caught.value, UnknownOutcome)
        assert await a.rpc.call(B, "echo", bytes(BODY_BYTES_MAX), timeout_s=1) == bytes(BODY_BYTES_MAX)


async def test_answers_that_a_peer_leaves_unread_have_a_bound_and_no_call_is_begun_behind_them(
    autojump_clock: MockClock,
) -> None:
    ready, begun = trio.Event(), 0

    async def give(_peer: NodeId, _body: bytes) -> bytes:
        nonlocal begun
        begun += 1
        await ready.wait()
        return bytes(BODY_BYTES_MAX)

    async with mesh() as m:
        bad, b = await m.node(NodeId("bad"), answers=False), await m.node(B)
        b.rpc.register("give", give)
        stream = await bad.transport.open_stream(B, PROTOCOL, timeout_s=5)
        await stream.write(HELLO + framed(Request(1, "give", 60_000, b"")) * 40)
        await trio.sleep(1)
        assert begun == 40  # nothing is unread yet
        ready.set()
        await trio.sleep(1)
        await stream.write(framed(Request(2, "give", 60_000, b"")) * 40)
        await trio.sleep(1)
        assert begun == 40
        frames = FrameReader(stream)
        assert await frames.next() is not None  # the greeting
        first = [parse(await frames.next() or b"", Answer) for _ in range(40)]
        given = [answer for answer in first if answer.is_ok]
        # What is in the writer's hands and in the pipe is no longer in the outbox.
        assert 0 < sum(len(answer.body) for answer in given) <= ANSWERS_BYTES_MAX + 2 * BODY_BYTES_MAX
        assert {type(error_of(answer.body)) for answer in first if not answer.is_ok} == {UnknownOutcome}
        await trio.sleep(1)
        assert begun == 80  # there is room again


async def test_calls_without_a_running_rpc_are_unavailable(autojump_clock: MockClock) -> None:
    async with mesh() as m:
        a = await m.node(A, answers=False)
        with pytest.raises(Unavailable):
            await a.rpc.call(B, "echo", b"", timeout_s=5)


async def test_stopping_fails_the_calls_that_wait(autojump_clock: MockClock) -> None:
    async def dawdle(_peer: NodeId, _body: bytes) -> bytes:
        await trio.sleep_forever()
        return b""

    async with mesh() as m:
        b = await m.node(B)
        b.rpc.register("dawdle", dawdle)
        a = await m.node(A, answers=False)

        async def ask() -> None:
            with pytest.raises(UnknownOutcome, match="stopping"):
                await a.rpc.call(B, "dawdle", b"", timeout_s=60)

        async with trio.open_nursery() as outer, trio.open_nursery() as running:
            await running.start(a.rpc.serve)
            outer.start_soon(ask)
            await trio.sleep(1)
            running.cancel_scope.cancel()
