"""A live stream of a node's events, over as many connections as it takes: at another node when this one is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from meshd.client.http import Requester
from meshd.errors import Unavailable, from_code

RECONNECTS_MAX = 20
"""In a row, without a byte in between, before a live stream is given up."""
PAUSE_S = 0.5


def live_events(
    requester: Requester, path: str, headers: Callable[[], dict[str, str]]
) -> Iterator[tuple[str, Any, str]]:
    """(kind, data, position) until an `end`, or until the requester is closed. `headers` are asked at each connection.

    An `error` event is raised; Unavailable when no node takes the stream up again.
    """
    failures = 0
    while True:
        try:
            answer = requester.stream("GET", path, headers={"accept": "text/event-stream", **headers()})
            for kind, data, position in parse_events(answer.lines()):
                failures = 0
                raise_if_error(kind, data)
                yield kind, data, position
                if kind == "end":
                    return
            raise Unavailable("the node ended the stream")
        except Unavailable:
            if requester.is_closed:
                return
            failures += 1
            if failures > RECONNECTS_MAX:
                raise
            time.sleep(PAUSE_S)


def parse_events(lines: Iterator[bytes]) -> Iterator[tuple[str, Any, str]]:
    """Server-sent events; the nodes write each one's data as one line."""
    kind, data, position = "", b"", ""
    for line in lines:
        if not line and data:
            yield kind, msgspec.json.decode(data), position
            kind, data = "", b""
        elif line.startswith(b"event: "):
            kind = line[7:].decode()
        elif line.startswith(b"data: "):
            data = line[6:]
        elif line.startswith(b"id: "):
            position = line[4:].decode()


def raise_if_error(kind: str, data: Any) -> None:
    if kind == "error":
        raise from_code(data["code"], data["message"], data["hint"])
