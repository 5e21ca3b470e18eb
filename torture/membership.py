"""Voters that come and go: a node is drained and taken back, or removed for good and replaced by a new one.

What an operator does by hand, and is told to repeat while the mesh cannot decide.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from meshd.client import Client
from meshd.errors import Conflict, MeshError, NotFound, Unavailable
from torture.disks import data_dir
from torture.processes import Engine, Processes

PATIENCE_S = 60.0
"""For one decision, other nodes being killed meanwhile by nobody."""
HAND_OVER_MS = 1000
"""A drained node's jobs are handed over after this."""

WATCH_S = 10.0
"""Whoever watches a drain sees within this that it is over; until then it may ask for it once more."""
JOINS_MAX = 10
"""It may be killed while it joins."""


class Undecided(Exception):
    """The mesh did not take an operator's decision in time."""


class Membership:
    def __init__(self, nodes: Sequence[str], home: Path, engine: Engine) -> None:
        self._nodes = list(nodes)
        self._home = home
        self._engine = engine
        self._draining = ""
        self._watch = threading.Thread()
        self._gone = 0

    def drain(self, node: str) -> None:
        """Begins it; the mark is in the replicated state, so that it goes on whatever becomes of who asked."""
        self._draining = node

        def watch() -> None:
            with suppress(MeshError), self._client(node) as client:
                for _ in client.drain(node, deadline_ms=HAND_OVER_MS):
                    if self._draining != node:
                        return

        self._watch = threading.Thread(target=watch, daemon=True)
        self._watch.start()

    def take_back(self) -> None:
        """Raises Undecided."""
        node, self._draining = self._draining, ""
        if node:
            self._decide(node, f"{node} takes work again", lambda client: client.undrain(node))
            # A client that lost its node goes on at another, and asks for the drain again: seen to leave two of three drained.
            self._watch.join(WATCH_S)
            self._decide(node, f"{node} takes work again", lambda client: client.undrain(node))

    def replace(self, node: str, processes: Processes) -> None:
        """Kill it, remove it, and start another under its name and address. Raises Undecided."""
        processes.kill([node])

        def remove(client: Client) -> None:
            # A resend finds it gone.
            with suppress(NotFound):
                client.remove_node(node)

        self._decide(node, f"{node} is removed", remove)
        self._gone += 1
        home = data_dir(self._home, node)
        home.rename(home.with_name(f"{home.name}-removed{self._gone}"))

        def invite(client: Client) -> None:
            self._engine.invites[node] = client.invite(uses=JOINS_MAX)

        self._decide(node, "an invite is made", invite)
        processes.start(node, self._engine.command(node))

    def _decide(self, about: str, what: str, ask: Callable[[Client], None]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                with self._client(about) as client:
                    return ask(client)
            except (Unavailable, Conflict) as error:
                if time.monotonic() > deadline:
                    raise Undecided(f"not within {PATIENCE_S:.0f} s: {what}: {error}") from error
                time.sleep(0.2)
            except MeshError as error:
                raise Undecided(f"{what}: refused: {error}") from error

    def _client(self, about: str) -> Client:
        """Of all nodes but the one that it is about."""
        return Client([f"unix:{self._engine.socket(node)}" for node in self._nodes if node != about])
