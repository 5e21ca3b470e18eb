"""One request to one node: no failover, no patience, so that every answer and every silence is on record.

`meshd.client` would ask another node by itself; here that is the load's choice, because the
history must say which node was asked and what it said.
"""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any

ANSWER_S = 3.0
"""A client that waits no longer resends more, and what is resent is what could be doubled."""


class Silence(Exception):
    """No answer: it may have been done."""


class Answered(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status} {message}")
        self.status = status

    @property
    def is_temporary(self) -> bool:
        return self.status in (429, 500, 502, 503, 504)


class NodeApi:
    """Keeps its connection; for one thread."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._connection: _UnixConnection | None = None

    def get(self, path: str, *, timeout_s: float = ANSWER_S) -> Any:
        return self.ask("GET", path, timeout_s=timeout_s)

    def ask(self, method: str, path: str, body: object = None, *, timeout_s: float = ANSWER_S) -> Any:
        """The JSON answered. Raises Silence and Answered."""
        connection = self._connection or _UnixConnection(self._path)
        self._connection = None
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.timeout = timeout_s
            if connection.sock is not None:
                connection.sock.settimeout(timeout_s)
            connection.request(method, path, data, {"content-type": "application/json"} if data else {})
            response = connection.getresponse()
            found = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise Silence(f"{type(error).__name__}: {error}") from error
        self._connection = connection
        if response.status >= 400:
            raise Answered(response.status, found[:300].decode(errors="replace"))
        return json.loads(found)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._socket_path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._socket_path)
