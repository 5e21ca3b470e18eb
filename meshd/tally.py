"""What was refused and dropped of all that peers sent, as a line in the log now and then.

Whoever is flooded with nonsense is told so once in a while, with how much of what: a line for each
piece would let any peer fill the disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import structlog
import trio

EVERY_S = 5.0

LINES_PER_WINDOW = 20
WINDOW_S = 10.0
CAUSED_BY_PEERS = frozenset(
    {
        "connection.failed",
        "join.refused",
        "peer.refused",
        "peer.silent",
        "rpc.malformed",
        "rpc.method_failed",
        "rpc.stream_failed",
        "stream.failed",
    }
)
"""Events that a peer can cause as often as it likes."""

TOLD = {
    "answers_dropped": "large answers to peers that do not read",
    "calls_refused": "calls beyond what one peer may have in flight",
    "chunks_forged": "gossip with a wrong signature",
    "chunks_malformed": "gossip that says nothing",
    "chunks_over_limit": "more facts than a node may have",
    "connections_failed": "connections that broke a rule",
    "forged": "claims about a node's life without its proof",
    "frames_malformed": "frames that are none",
    "handlers_failed": "streams that broke a rule",
    "handshakes_failed": "connections that never became one",
    "malformed": "gossip that is no message",
    "methods_failed": "calls that met a defect of ours",
    "peers_refused": "greetings not accepted",
    "streams_refused": "streams not allowed",
    "strangers_closed": "strangers shown out",
}
"""Counters worth a line when they have risen."""

log = structlog.get_logger()


class Tally:
    """`sources` are read every few seconds; what has risen since is told."""

    def __init__(self, sources: Sequence[Callable[[], Mapping[str, int]]]) -> None:
        self._sources = sources
        self._told: Counter[str] = Counter()

    def risen(self) -> dict[str, int]:
        """How much of each has come since this was last asked."""
        counts = Counter[str]()
        for source in self._sources:
            counts.update({name: count for name, count in source().items() if name in TOLD})
        risen = counts - self._told
        self._told = counts
        return dict(sorted(risen.items()))

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        task_status.started()
        while True:
            if risen := self.risen():
                log.warning("peers.misbehaved", **risen)
            await trio.sleep(EVERY_S)


class Throttle:
    """A structlog processor: of each event that peers cause, so many lines in a window; the next one says how many were left out."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._windows: dict[str, tuple[float, int]] = {}

    def __call__(self, _logger: object, _method: str, fields: structlog.types.EventDict) -> structlog.types.EventDict:
        event = fields.get("event", "")
        if event not in CAUSED_BY_PEERS:
            return fields
        now_s = self._now_s()
        began_s, lines = self._windows.get(event, (now_s, 0))
        if now_s - began_s >= WINDOW_S:
            if lines > LINES_PER_WINDOW:
                fields["left_out"] = lines - LINES_PER_WINDOW
            began_s, lines = now_s, 0
        self._windows[event] = (began_s, lines + 1)
        if lines >= LINES_PER_WINDOW:
            raise structlog.DropEvent
        return fields
