"""A runner as the agent sees it: what it was given, what it has answered, and what becomes of the rest when it dies.

A runner works for one lane at a time, whose tasks it is given all at once. It answers each as
it ends and in order, so when it dies the first one without an answer is the one that ran; those
behind it never began, and run elsewhere. Whoever holds a runner learns what it says by `Hearing`.
"""

from __future__ import annotations

import math
import socket
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import trio

from meshd import codec
from meshd.backends.child import HEARD_S, Child, Gathering, Link
from meshd.backends.limits import file_bytes_max
from meshd.backends.outcomes import finished_with_output, outcome_of
from meshd.backends.wasm_messages import (
    BACK,
    ENDED,
    OUTPUT,
    OUTPUT_BYTES_MAX,
    PLAN,
    REPLY_BYTES_MAX,
    RUN,
    Ended,
    Files,
)
from meshd.backends.wasm_messages import Plan as WirePlan
from meshd.errors import InvalidRequest, TooLarge
from meshd.model import EndReason, Outcome
from meshd.ports import Execution, Finished, Leash, Plan, Planned

CANCEL_S = 0.8
"""A runner ends any guest within 0.25 s; together with the kill this keeps a cancel under a second."""

REPLY_S = 1.0
"""For what a runner's watch thread answers from memory."""

FRAMES_MAX = 1024
"""Answers taken at a time: some 5 ms of the loop."""

GATHER_S = 0.003
"""Of a runner's answers, at most: some fifty of guests that do nothing."""

RUN_MS_MAX = 1 << 50
"""Longer than anything runs."""


class RunnerLost(Exception):
    """The runner died or broke the protocol; the message says how."""


class Lane:
    """Attempts of one plan, one after the other, wherever they run."""

    def __init__(self, plan: WirePlan, leash: Leash, ended: Callable[[Sequence[Finished]], None]) -> None:
        """`plan` without its number and deadline: each runner has its own."""
        self.plan = plan
        self.leash = leash
        self.ended = ended
        self.waiting: deque[Planned] = deque()
        """Not given to any runner."""
        self.runner: Runner | None = None
        self.is_hiring = False

    def numbered(self, number: int) -> WirePlan:
        return self.plan._replace(id=number, leash_s=self.leash.deadline_s)


def lane_for(source: Plan | Execution, ended: Callable[[Sequence[Finished]], None]) -> Lane:
    """An `Execution` brings its own files."""
    files = None
    if isinstance(source, Execution):
        stdin = str(source.stdin) if source.stdin is not None else None
        files = Files(str(source.workdir), stdin, str(source.stdout), str(source.stderr))
    limits = source.limits
    plan = WirePlan(
        id=0,
        module=str(source.module),
        module_hash=source.module_hash,
        args=source.args,
        env=source.env,
        files=files,
        spill=str(source.spill) if isinstance(source, Plan) else "",
        run_s=limits.run_s,
        memory=limits.memory,
        fuel=limits.fuel,
        output_bytes_max=limits.output_bytes_max,
        inline_bytes_max=limits.inline_bytes_max,
        file_bytes_max=file_bytes_max(source),
        leash_s=None,
    )
    return Lane(plan, source.leash, ended)


class Runner:
    """One runner process."""

    def __init__(self, child: Child, link: Link, orders: socket.socket, scratch: Path) -> None:
        orders.setblocking(False)
        self.child = child
        self.scratch = scratch
        self.modules: set[str] = set()
        """What it has loaded, more or less: a hint for choosing, nothing more."""
        self.idle_since_s = math.inf
        self.heard_s = math.inf
        """When it last said something while it had something to do."""
        self.lane: Lane | None = None
        self.given: dict[int, Planned] = {}
        """Without an answer, in order: the first one runs."""
        self.cancelled: set[int] = set()
        self._link = link
        self._orders = orders
        self.gathering = Gathering(GATHER_S)
        self._plans = 0
        self._ids = 0
        self._calls: dict[int, tuple[trio.Event, list[Any]]] = {}
        self._call_ids = 0
        self._has_said_last = False
        self._is_killed = False
        self._lost: RunnerLost | None = None

    @classmethod
    async def start(cls, cache: Path, version: str, scratch: Path, lock: int | None) -> Runner:
        """Raises OSError."""
        ours, theirs = socket.socketpair()
        orders, orders_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            child = await Child.start(
                "meshd.backends.wasm_runner", [str(cache), version, str(scratch)], [theirs, orders_theirs], lock
            )
        except BaseException:
            ours.close()
            orders.close()
            raise
        return cls(child, Link(ours), orders, scratch)

    # --- giving ------------------------------------------------------------------------------------------------------

    def work_for(self, lane: Lane) -> None:
        """From now on, until `leave`. Raises TooLarge."""
        self._link.post(codec.pack((PLAN, *lane.numbered(self._plans + 1))))
        self._plans += 1
        self.lane, lane.runner = lane, self
        self.modules.add(lane.plan.module_hash)
        lane.leash.watchers.add(self._tell_leash)

    def leave(self) -> None:
        assert self.lane is not None and not self.given
        self.lane.leash.watchers.discard(self._tell_leash)
        self.lane.runner = None
        self.lane = None
        self.heard_s = math.inf

    def give(self, attempts: Sequence[Planned]) -> list[Planned]:
        """In as many messages as it takes. Returns those that are too large for one by themselves: they are not given."""
        first = self._ids + 1
        tasks = [
            (number, key.task, key.attempt, key.fence, item) for number, (key, item) in enumerate(attempts, start=first)
        ]
        try:
            self._link.post(codec.pack((RUN, tasks)))
        except TooLarge:
            if len(attempts) == 1:
                return list(attempts)
            middle = len(attempts) // 2
            return self.give(attempts[:middle]) + self.give(attempts[middle:])
        self._ids += len(attempts)
        if not self.given:
            self.heard_s = trio.current_time()
        self.given.update(enumerate(attempts, start=first))
        return []

    @property
    def is_flushed(self) -> bool:
        return not self._link.is_pending

    async def flush(self) -> None:
        await self._link.flush()

    def cancel(self, number: int) -> None:
        self.cancelled.add(number)
        self._order("cancel", number)

    async def give_back(self, numbers: Sequence[int]) -> list[Planned]:
        """Those of these, which follow each other, that have not begun. Without an answer nobody knows, and it is killed."""
        answer = await self._ask("back", numbers[0], numbers[-1])
        if not isinstance(answer, tuple):
            self.kill()
            return []
        return [self.given.pop(number) for number in answer if number in self.given]

    async def read_output(self, number: int, stream: str, offset: int, bytes_max: int) -> bytes | None:
        answer = await self._ask("output", number, stream, offset, min(bytes_max, OUTPUT_BYTES_MAX))
        return answer if isinstance(answer, bytes) else None

    async def _ask(self, verb: str, *arguments: object) -> Any:
        """The answer; None when none came in time."""
        self._call_ids += 1
        call = self._call_ids
        event, answers = self._calls[call] = trio.Event(), []
        try:
            self._order(verb, call, *arguments)
            for patience_s in (REPLY_S, HEARD_S):
                with trio.move_on_after(patience_s):
                    await event.wait()
            return answers[0] if answers else None
        finally:
            del self._calls[call]

    def _tell_leash(self, deadline_s: float | None) -> None:
        self._order("leash", self._plans, deadline_s)

    def _order(self, *order: object) -> None:
        try:
            self._orders.send(codec.pack(order))
        except OSError:
            # It is gone, or reads nothing any more. What cannot be told to stop must not run on.
            self.kill()

    # --- hearing -----------------------------------------------------------------------------------------------------

    async def hear(self) -> list[Finished]:
        """What has ended by now. Raises RunnerLost when nothing will come any more."""
        if self._lost is None:
            frames = await self._link.receive_some(FRAMES_MAX)
            self.heard_s = trio.current_time()
            if finished := self._understand(frames):
                return finished
            if not frames:
                raise RunnerLost(self.child.describe_end())
        if self._lost is not None:
            raise self._lost
        return []

    async def hear_replies(self) -> list[Finished]:
        """The same, of what its watch thread says. Raises RunnerLost."""
        try:
            await trio.lowlevel.wait_readable(self._orders.fileno())
        except (trio.ClosedResourceError, OSError) as error:
            raise RunnerLost("its socket is closed") from error
        replies, is_open = self._replies()
        finished = self._understand(replies)
        if not is_open and not finished:
            raise RunnerLost(self.child.describe_end())
        return finished

    def _replies(self) -> tuple[list[bytes], bool]:
        """Those that wait in the socket, and whether more may come."""
        replies: list[bytes] = []
        while True:
            try:
                reply = self._orders.recv(REPLY_BYTES_MAX)
            except BlockingIOError:
                return replies, True
            except OSError:
                reply = b""
            if not reply:
                return replies, False
            replies.append(reply)

    def die(self, why: str) -> tuple[list[Finished], list[Planned]]:
        """What has ended with this runner, which is dead, and what never began and is to run elsewhere."""
        finished = self._understand(self._replies()[0])
        left: list[Planned] = []
        for place, (number, attempt) in enumerate(self.given.items()):
            if number in self.cancelled:
                finished.append(Finished(attempt.key, Outcome(EndReason.CANCELLED, message="cancelled")))
            elif place == 0 and not self._has_said_last:
                lost = Outcome(EndReason.BACKEND, message=f"the runner {why}"[:2048])
                finished.append(Finished(attempt.key, lost))
            else:
                left.append(attempt)
        self.given.clear()
        return finished, left

    @property
    def is_usable(self) -> bool:
        return self.child.is_running and not self._is_killed

    def kill(self) -> None:
        self._is_killed = True
        self.child.kill()

    async def end(self) -> None:
        self.kill()
        with trio.CancelScope(shield=True):
            await self.child.wait()

    def close(self) -> None:
        self._link.close()
        if self._orders.fileno() != -1:
            trio.lowlevel.notify_closing(self._orders.fileno())
            self._orders.close()
        self.child.close()

    def _understand(self, frames: Sequence[bytes]) -> list[Finished]:
        """Up to what no runner of ours would say: a guest may have taken it over. Then it is lost."""
        finished: list[Finished] = []
        for frame in frames:
            try:
                kind, *rest = codec.unpack(frame)
                if kind == ENDED:
                    finished.append(self._ended(Ended(*rest)))
                    continue
                call, answer = rest
                if kind not in (BACK, OUTPUT):
                    raise ValueError(f"{kind!r} is no answer")
                if call in self._calls:
                    event, answers = self._calls[call]
                    answers.append(answer)
                    event.set()
            except (InvalidRequest, ValueError, TypeError) as error:
                self._lost = RunnerLost(f"answered nonsense: {error}"[:1000])
                self.kill()
                break
        return finished

    def _ended(self, ended: Ended) -> Finished:
        """Raises ValueError, TypeError."""
        attempt = self.given.get(ended.id)
        if attempt is None or self.lane is None:
            raise ValueError(f"task {ended.id!r}, which it does not have")
        if ended.reason == "exit" and ended.exit_code == 0 and not ended.message and type(ended.run_ms) is int:
            # Nearly all: `outcome_of` costs as much as everything else here.
            outcome = Outcome(EndReason.EXIT, 0, run_ms=min(max(0, ended.run_ms), RUN_MS_MAX))
        else:
            outcome = outcome_of(
                reason=ended.reason, exit_code=ended.exit_code, message=ended.message, run_ms=ended.run_ms
            )
        finished = Finished(attempt.key, outcome)
        plan = self.lane.plan
        if plan.files is None and (ended.stdout != b"" or ended.stderr != b""):
            finished = finished_with_output(
                attempt.key,
                outcome,
                ended.stdout,
                ended.stderr,
                spill=plan.spill,
                inline_bytes_max=plan.inline_bytes_max,
            )
        del self.given[ended.id]
        self.cancelled.discard(ended.id)
        if ended.is_last:
            self._has_said_last = True
            self.kill()
        return finished
