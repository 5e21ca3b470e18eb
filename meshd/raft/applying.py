"""Committed entries go into the state machine, in order and each once, whatever it or a caller raises."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

from pysyncobj import syncobj

from meshd.raft.messages import REPLICATED
from meshd.raft.pysyncobj_state import RaftState


class ApplyFailed(Exception):
    """`apply` raised: a bug in the state machine. The entry stands; its answers are unknown."""


class Applying:
    def __init__(
        self, raft: RaftState, digest: Callable[[], str], on_bug: Callable[[int, BaseException], None]
    ) -> None:
        self._raft = raft
        self._digest = digest
        self._on_bug = on_bug

    def go_on(self) -> None:
        """For one slice of time; PySyncObj finds the replicated method that a command names."""
        raft = self._raft
        until = raft.now() + raft.settings.apply_slice_s
        while raft.applied < raft.commit:
            command, index, term = raft.log[raft.applied + 1 - raft.first]
            waiting = raft.waiting.pop(index, [])
            result = self._apply_one(index, command)
            raft.applied = index
            raft.checkpoints.applied(index, self._digest)
            for waiting_term, callback in waiting:
                failure = syncobj.FAIL_REASON.SUCCESS if waiting_term == term else syncobj.FAIL_REASON.DISCARDED
                self._resolve(callback, result, failure)
            if raft.now() >= until:
                break

    def _apply_one(self, index: int, command: bytes) -> Any:
        if command[:1] != REPLICATED:
            return None  # no-ops; configurations count from when they are appended
        try:
            return self._raft._SyncObj__doApplyCommand(command)
        except Exception as error:  # the same on every replica: going on is what keeps them equal
            self._on_bug(index, error)
            return ApplyFailed(repr(error))

    def nobody_will_know(self, index: float = inf) -> None:
        """Whoever waits for an entry up to this one learns that its outcome was not seen here."""
        waiting = self._raft.waiting
        for entry in [entry for entry in waiting if entry <= index]:
            for _, callback in waiting.pop(entry):
                self._resolve(callback, None, syncobj.FAIL_REASON.UNKNOWN_OUTCOME)

    def _resolve(self, callback: Callable[[Any, int], None], result: Any, failure: int) -> None:
        try:
            callback(result, failure)
        except Exception as error:  # a caller's fault must not touch what is applied
            self._on_bug(self._raft.applied, error)
