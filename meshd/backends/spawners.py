"""The spawner as the agent sees it: what it was given, what it has answered, and what becomes of the rest when it dies.

Of each lane the first command without an end is the one that ran when a spawner dies; those
behind it never began (spawner.py sees to it), and run in the next one.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
import structlog
import trio
from msgspec import Struct

from meshd.backends.child import HEARD_S, Child, Gathering, Link
from meshd.backends.limits import file_bytes_max
from meshd.backends.outcomes import finished_with_output, outcome_of
from meshd.backends.spawner import kill_strays
from meshd.errors import TooLarge
from meshd.model import EndReason, Outcome
from meshd.ports import Execution, Finished, Plan, Planned

log = structlog.get_logger()

LATE_S = 15.0
"""How long after a deadline and the grace the spawner may take to say that it is over; it sweeps for 5 s at most."""

REPLY_S = 5.0
"""For what the spawner answers from memory; starting a command keeps it for milliseconds."""

GATHER_S = 0.01
"""Of its answers, at most: some ten of commands that do nothing."""

FRAMES_MAX = 256
OUTPUT_BYTES_MAX = 64 << 10
"""Of one piece of a running command's output."""


class End(Struct, array_like=True):
    id: int
    reason: str
    exit_code: int | None
    message: str
    run_ms: int
    stdout: str | None
    stderr: str | None
    left: str
    """A directory to remove."""


class Answer(Struct):
    """As spawner.py describes it."""

    ended: list[End] = []
    call: int = 0
    ids: list[int] = []
    data: str | None = None


class Waiter:
    """Who waits for the end of a single command."""

    def __init__(self, spawned: int) -> None:
        self.id = spawned
        self.outcome: Outcome | None = None
        self._ended = trio.Event()

    def resolve(self, outcome: Outcome) -> None:
        if self.outcome is None:
            self.outcome = outcome
            self._ended.set()

    async def wait(self, patience_s: float) -> Outcome | None:
        """None when it has not ended by then."""
        for each_s in (patience_s, HEARD_S):
            with trio.move_on_after(each_s):
                await self._ended.wait()
                break
        return self.outcome


class Lane:
    """Commands of one plan, one after the other."""

    def __init__(self, number: int, plan: Plan, ended: Callable[[Sequence[Finished]], None]) -> None:
        self.number = number
        self.plan = plan
        self.ended = ended
        self.given: dict[int, Planned] = {}
        """To the spawner, and without an end, in order."""
        self.heard_s = math.inf
        """When one of them last ended, or the first was given."""
        self.tell: Callable[[float | None], None] | None = None


class Owner(Protocol):
    """Must not wait."""

    def remove(self, directory: str) -> None:
        """A command left something in it, or its spawner is gone."""
        ...

    def run_elsewhere(self, lane: Lane, attempts: Sequence[Planned]) -> None:
        """They had not begun when their spawner died."""
        ...


class Spawner:
    """The spawner process, and who waits for what in it."""

    def __init__(self, child: Child, link: Link, token: str, scratch: str, nursery: trio.Nursery, owner: Owner) -> None:
        """`scratch` is its own: it is removed with all that its commands left when it is gone."""
        self.child = child
        self._token = token
        self._scratch = scratch
        self.buried = trio.Event()
        """Nothing of it is left, and what it had is told of or placed elsewhere."""
        self.used_at_s = trio.current_time()
        self.waiting: dict[int, Waiter] = {}
        self.lanes: dict[int, Lane] = {}
        self._link = link
        self._nursery = nursery
        self._owner = owner
        self._is_ending = False
        self._burying = trio.Lock()
        self._ids = 0
        self._lane_of: dict[int, Lane] = {}
        self._stopped: set[int] = set()
        self._calls: dict[int, tuple[trio.Event, list[Answer]]] = {}

    @classmethod
    async def start(
        cls, token: str, term_grace_s: float, scratch: str, lock: int | None, nursery: trio.Nursery, owner: Owner,
    ) -> Spawner:  # fmt: skip
        """Raises OSError. Its reader runs in `nursery`."""
        ours, theirs = socket.socketpair()
        try:
            child = await Child.start("meshd.backends.spawner", [token, str(term_grace_s), scratch], [theirs], lock)
        except BaseException:
            ours.close()
            raise
        spawner = cls(child, Link(ours), token, scratch, nursery, owner)
        nursery.start_soon(spawner.read)
        log.info("process.spawner_started", pid=child.pid)
        return spawner

    @property
    def is_ending(self) -> bool:
        """What it is given now would be taken for lost with it."""
        return self._is_ending or not self.child.is_running

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.lanes

    # --- one command -------------------------------------------------------------------------------------------------

    async def run(self, execution: Execution, term_grace_s: float) -> Outcome:
        """When cancelled, nothing of the attempt is left."""
        self._ids += 1
        waiter = self.waiting[self._ids] = Waiter(self._ids)
        leash = execution.leash

        def tell(deadline_s: float | None) -> None:
            self._post({"do": "leash", "id": waiter.id, "leash_s": deadline_s})

        leash.watchers.add(tell)
        try:
            self._post(_request(waiter.id, execution, leash.deadline_s))
            run_s = execution.limits.run_s
            if await waiter.wait(math.inf if run_s is None else run_s + term_grace_s + LATE_S) is None:
                await self.end(is_now=True)
            assert waiter.outcome is not None, "everything has ended with the spawner"
            return waiter.outcome
        except trio.Cancelled:
            self._post({"do": "cancel", "id": waiter.id})
            with trio.CancelScope(shield=True):
                if await waiter.wait(term_grace_s + LATE_S) is None:
                    await self.end(is_now=True)
            raise
        finally:
            leash.watchers.discard(tell)
            self.waiting.pop(waiter.id, None)
            self.used_at_s = trio.current_time()

    # --- lanes -------------------------------------------------------------------------------------------------------

    def give(
        self, number: int, plan: Plan, attempts: Sequence[Planned], ended: Callable[[Sequence[Finished]], None]
    ) -> list[Planned]:
        """In as many messages as it takes. Returns those that are too large for one by themselves: they are not given."""
        first = self._ids + 1
        tasks = [(at, key.task, key.attempt, key.fence, item) for at, (key, item) in enumerate(attempts, start=first)]
        try:
            self._post({"do": "start", "lane": number, "plan": _describe_plan(plan), "tasks": tasks})
        except TooLarge:
            if len(attempts) == 1:
                return list(attempts)
            middle = len(attempts) // 2
            too_large = self.give(number, plan, attempts[:middle], ended)
            return too_large + self.give(number, plan, attempts[middle:], ended)
        lane = self.lanes.get(number)
        if lane is None:
            lane = self.lanes[number] = Lane(number, plan, ended)
            lane.heard_s = trio.current_time()

            def tell(deadline_s: float | None) -> None:
                self._post({"do": "leash", "lane": number, "leash_s": deadline_s})

            lane.tell = tell
            plan.leash.watchers.add(tell)
        self._ids += len(attempts)
        for at, attempt in enumerate(attempts, start=first):
            lane.given[at] = attempt
            self._lane_of[at] = lane
        return []

    def find(self, fence: int) -> int | None:
        """The id of a command in a lane."""
        for lane in self.lanes.values():
            for number, attempt in lane.given.items():
                if attempt.key.fence == fence:
                    return number
        return None

    def stop(self, number: int, term_grace_s: float) -> None:
        """It ends soon, or takes its spawner with it."""
        self._stopped.add(number)
        self._post({"do": "cancel", "id": number})
        self._nursery.start_soon(self._see_it_end, number, term_grace_s)

    async def _see_it_end(self, number: int, term_grace_s: float) -> None:
        for patience_s in (term_grace_s + LATE_S, HEARD_S):
            await trio.sleep(patience_s)
        if number in self._lane_of:
            await self.end(is_now=True)

    async def give_back(self, numbers: Sequence[int]) -> list[Planned]:
        """Those of them that have not begun. Waits for as long as the spawner lives: only it knows which."""
        answer = await self._ask({"do": "back", "ids": list(numbers)}, math.inf)
        if answer is None:
            return []  # they run in the next one
        lanes = [(number, lane) for number in answer.ids if (lane := self._lane_of.pop(number, None)) is not None]
        back = [lane.given.pop(number) for number, lane in lanes]
        for lane in {id(lane): lane for _, lane in lanes}.values():
            self._forget_if_over(lane)
        return back

    async def read_output(self, number: int, stream: str, offset: int, bytes_max: int) -> bytes | None:
        length = min(bytes_max, OUTPUT_BYTES_MAX)
        answer = await self._ask(
            {"do": "output", "id": number, "stream": stream, "offset": offset, "max": length}, REPLY_S
        )
        return None if answer is None or answer.data is None else _bytes(answer.data)

    async def _ask(self, request: dict[str, Any], patience_s: float) -> Answer | None:
        """None when no answer came in time, or never will."""
        self._ids += 1
        call = self._ids
        event, answers = self._calls[call] = trio.Event(), []
        try:
            self._post({**request, "call": call})
            for each_s in (patience_s, HEARD_S):
                with trio.move_on_after(each_s):
                    await event.wait()
                    break
            return answers[0] if answers else None
        finally:
            del self._calls[call]

    def silent_since(self, before_s: float) -> bool:
        """Whether a lane with a run limit has had more time than that since then."""
        return any(
            lane.plan.limits.run_s is not None and lane.heard_s + lane.plan.limits.run_s <= before_s
            for lane in self.lanes.values()
        )

    # --- its end -----------------------------------------------------------------------------------------------------

    async def end(self, *, is_now: bool = False) -> None:
        """Gone, with all that it started, when this returns. `is_now`: it did not answer in time."""
        self._is_ending = True
        with trio.CancelScope(shield=True):
            if not is_now:
                self._link.finish()
                with trio.move_on_after(LATE_S):
                    await self.child.wait()
            await self._bury("did not answer in time and was killed" if is_now else None)

    async def read(self) -> None:
        gathering = Gathering(GATHER_S)
        while frames := await self._link.receive_some(FRAMES_MAX):
            heard = self._hear(frames)
            # All lanes share its answers.
            left = min((len(lane.given) for lane in self.lanes.values()), default=0) * len(self.lanes)
            if pause_s := gathering.pause_s(heard, left, trio.current_time()):
                await trio.sleep(pause_s)
        # It has died, or cleans up and exits.
        self._is_ending = True
        with trio.CancelScope(shield=True):
            with trio.move_on_after(LATE_S):
                await self.child.wait()
            await self._bury()

    async def _bury(self, why: str | None = None) -> None:
        async with self._burying:
            if self.buried.is_set():
                return  # and there may be a successor, whose commands carry the same mark
            self.child.kill()
            await self.child.wait()
            if not self.child.has_exited_well:
                await trio.to_thread.run_sync(kill_strays, self._token)
            # What ended well must not be taken for lost, and what comes behind it not for what never began.
            self._hear(self._link.receive_rest())
            self._link.close()
            self._fail_all(why or self.child.describe_end())
            self._owner.remove(self._scratch)
            self.child.close()

    def _fail_all(self, why: str) -> None:
        self.buried.set()
        lost = Outcome(EndReason.BACKEND, message=f"the spawner {why}"[:2048])
        told: list[tuple[Lane, list[Finished]]] = []
        for waiter in self.waiting.values():
            waiter.resolve(lost)
        for event, _ in self._calls.values():
            event.set()
        cancelled = Outcome(EndReason.CANCELLED, message="cancelled")
        for lane in list(self.lanes.values()):
            finished: list[Finished] = []
            left: list[Planned] = []
            for place, (number, attempt) in enumerate(lane.given.items()):
                if number in self._stopped:
                    finished.append(Finished(attempt.key, cancelled))
                elif place == 0:
                    finished.append(Finished(attempt.key, lost))
                else:
                    left.append(attempt)
            lane.given.clear()
            self._forget_if_over(lane)
            if left:
                self._owner.run_elsewhere(lane, left)
            told.append((lane, finished))
        self._lane_of.clear()
        # Last: whoever hears of an end may give more to a lane, which comes behind what it has.
        for lane, finished in told:
            if finished:
                lane.ended(finished)

    # --- what it says ------------------------------------------------------------------------------------------------

    def _hear(self, frames: Sequence[bytes]) -> int:
        """How many ends they tell of. After nonsense nothing more is heard: a command may have taken it over."""
        try:
            return sum(self._understand(frame) for frame in frames)
        except ValueError as error:
            log.warning("process.spawner_broken", pid=self.child.pid, why=str(error))
            self.child.kill()
            self._link.close()
            return 0

    def _understand(self, frame: bytes) -> int:
        """How many ends it tells of. Raises ValueError."""
        try:
            answer = msgspec.json.decode(frame, type=Answer)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ValueError(f"no answer: {error}") from error
        finished: dict[int, tuple[Lane, list[Finished]]] = {}
        try:
            for end in answer.ended:
                self._ended(end, finished)
        finally:
            for lane, ended in finished.values():
                lane.ended(ended)
                self._forget_if_over(lane)
        if answer.call in self._calls:
            event, answers = self._calls[answer.call]
            answers.append(answer)
            event.set()
        return len(answer.ended)

    def _ended(self, end: End, finished: dict[int, tuple[Lane, list[Finished]]]) -> None:
        outcome = outcome_of(reason=end.reason, exit_code=end.exit_code, message=end.message, run_ms=end.run_ms)
        lane = self._lane_of.get(end.id)
        if lane is None:
            if (waiter := self.waiting.get(end.id)) is not None:
                waiter.resolve(outcome)
            return
        stdout, stderr = (None if text is None else _bytes(text) for text in (end.stdout, end.stderr))
        key = lane.given[end.id].key
        plan = lane.plan
        told = finished_with_output(
            key, outcome, stdout, stderr, spill=str(plan.spill), inline_bytes_max=plan.limits.inline_bytes_max
        )
        del lane.given[end.id], self._lane_of[end.id]
        self._stopped.discard(end.id)
        lane.heard_s = self.used_at_s = trio.current_time()
        finished.setdefault(lane.number, (lane, []))[1].append(told)
        if end.left:
            self._owner.remove(end.left)

    def _forget_if_over(self, lane: Lane) -> None:
        if not lane.given and self.lanes.get(lane.number) is lane:
            del self.lanes[lane.number]
            if lane.tell is not None:
                lane.plan.leash.watchers.discard(lane.tell)

    def _post(self, request: dict[str, Any]) -> None:
        """Raises TooLarge."""
        self._link.post(msgspec.json.encode(request))
        if self._link.is_pending:
            self._nursery.start_soon(self._link.flush)


def _bytes(text: str) -> bytes:
    """Raises ValueError."""
    return text.encode("latin-1")


def _request(spawned: int, execution: Execution, leash_s: float | None) -> dict[str, Any]:
    return {
        "do": "run",
        "id": spawned,
        **_limits(execution, leash_s),
        "workdir": str(execution.workdir.absolute()),
        "stdin": str(execution.stdin.absolute()) if execution.stdin is not None else None,
        "stdout": str(execution.stdout.absolute()),
        "stderr": str(execution.stderr.absolute()),
    }


def _describe_plan(plan: Plan) -> dict[str, Any]:
    return {
        **_limits(plan, plan.leash.deadline_s),
        "spill": str(plan.spill.absolute()),
        "inline_bytes_max": plan.limits.inline_bytes_max,
    }


def _limits(source: Execution | Plan, leash_s: float | None) -> dict[str, Any]:
    return {
        "args": source.args,
        "env": source.env,
        "run_s": source.limits.run_s,
        "memory": source.limits.memory,
        "output_bytes_max": source.limits.output_bytes_max,
        "file_bytes_max": file_bytes_max(source),
        "leash_s": leash_s,
    }
