"""Whatever a peer sends: the kept corpus of the fuzzer and mutations of it, through each decoder (docs/fuzzing.md)."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Iterator
from random import Random
from types import SimpleNamespace
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.mutate import mutated
from fuzz.registry import NAMES, Target, load
from fuzz.world import be_heard, be_quiet
from meshd import codec, units
from meshd import spec as specs
from meshd.admission import join as joining
from meshd.api.endpoint import Call
from meshd.api.http1 import Connection
from meshd.backends import spawners
from meshd.blobs import messages as blob_messages
from meshd.gossip import facts
from meshd.history import segment
from meshd.model import EndReason, Outcome
from meshd.net import frames as call_frames
from meshd.net.libp2p.stream import MuxedStream
from meshd.raft import following, remote, replica, wire
from meshd.raft.storage import replay, snapshot

INPUT_S_MAX = 2.0
"""Of CPU: inputs have a few KiB, and the loop should be held for milliseconds."""
GROWTH_MB_MAX = 300
MUTATIONS = 25
"""For each target in this test; `make fuzz` does millions."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    be_quiet()
    yield
    be_heard()


@pytest.mark.parametrize("name", NAMES)
def test_the_corpus_hurts_nobody(name: str) -> None:
    target = load(name)
    corpus = target.corpus()
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in corpus:
        began_s = time.process_time()
        target.fuzz(data)
        assert time.process_time() - began_s < INPUT_S_MAX, data
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024
    assert grown_mb < GROWTH_MB_MAX


@pytest.mark.parametrize("name", NAMES)
def test_what_is_near_to_the_corpus_hurts_nobody(name: str) -> None:
    target = load(name)
    corpus = target.corpus()

    @settings(
        max_examples=MUTATIONS, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck]
    )
    @given(st.sampled_from(corpus), st.randoms(use_true_random=False))
    def attack(data: bytes, random: Random) -> None:
        target.fuzz(mutated(data, random, is_framed=target.is_framed, others=corpus))

    attack()


# --- would it be noticed? -----------------------------------------------------------------------------------------------


def _unconverted() -> SimpleNamespace:
    """The codec, were its errors those of the library below it."""

    def decode(data: bytes, kind: Any, *, bytes_max: int = 0) -> Any:
        return msgspec.msgpack.decode(data, type=kind)

    return SimpleNamespace(**{**vars(codec), "decode": decode})


def _loses_count(self: MuxedStream) -> bool:
    """Closing a stream, with what nobody has read of it counted for ever."""
    self._is_closed = True
    self._received.clear()
    self._wake()
    return True


async def _refuse_nobody(self: Connection, status: int) -> None:
    raise ValueError(status)


def _trusting(*, reason: str, exit_code: int | None, message: str, run_ms: int) -> Outcome:
    return Outcome(EndReason(reason), exit_code, message, run_ms=run_ms)


def _one_value(command: bytes) -> bool:
    try:
        codec.decode(command, msgspec.Raw)
    except codec.InvalidRequest:
        return False
    return True


PLANTED: dict[str, tuple[object, str, object]] = {
    "wire": (wire, "name_of", lambda lineage: lineage[-1][:8]),
    "raft": (following, "_check_configurations", lambda peer, entries: None),
    "journal": (replay, "records_of", lambda name, offset, body: list(codec.unpack(body))),
    "snapshot": (snapshot, "codec", _unconverted()),
    "machine": (__import__("fuzz.targets.machine", fromlist=["x"]), "is_readable", _one_value),
    "gossip": (facts, "codec", _unconverted()),
    "calls": (call_frames, "codec", _unconverted()),
    "methods": (replica, "codec", _unconverted()),
    "replies": (remote, "codec", _unconverted()),
    "blob_stream": (blob_messages, "codec", _unconverted()),
    "join": (joining, "codec", _unconverted()),
    "muxer": (MuxedStream, "_close", _loses_count),
    "texts": (units, "_SIZE_WHOLE", re.compile(r"(\S+?)\s*([kmgtp]i?)?b?", re.IGNORECASE)),
    "http": (Connection, "_refuse", _refuse_nobody),
    "api": (Call, "task", lambda self: int(self.path("task"))),
    "spec": (specs, "_cpu", lambda value, path: round(float(value) * 1000)),
    "runner": (spawners, "outcome_of", _trusting),
    "history": (segment, "codec", _unconverted()),
}
"""What each decoder would be with a mistake that is easily made."""


@pytest.mark.parametrize("name", NAMES)
def test_each_target_sees_a_mistake(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = load(name)
    owner, attribute, mistake = PLANTED[name]
    monkeypatch.setattr(owner, attribute, mistake)
    with pytest.raises(BaseException):  # noqa: B017, PT011
        _attack(target, 400)


def _attack(target: Target, mutations: int) -> None:
    corpus = target.corpus()
    for data in corpus:
        target.fuzz(data)
    for seed in range(mutations):
        random = Random(seed)
        target.fuzz(mutated(random.choice(corpus), random, is_framed=target.is_framed, others=corpus))


# --- depth without recursion --------------------------------------------------------------------------------------------

leaves = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=40)
    | st.binary(max_size=300) | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=40))
)  # fmt: skip
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=3), inner, max_size=20)
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(trees)
def test_nesting_is_how_deep_a_message_is(tree: object) -> None:
    assert codec.nesting(msgpack.packb(tree)) == depth(tree)


def depth(tree: object) -> int:
    """Of containers with something in them."""
    inner = tree if isinstance(tree, list) else tree.values() if isinstance(tree, dict) else ()
    return 1 + max(map(depth, inner)) if inner else 0
