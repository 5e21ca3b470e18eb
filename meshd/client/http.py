"""Requests to whichever node answers: plain blocking `http.client`, over several addresses with failover.

A request that another node may have done already is sent again only where that is safe:
submissions carry their id, blobs are their content, the rest changes nothing or ends the same.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import IO, TYPE_CHECKING, TypeVar
from weakref import WeakSet

from meshd.client.address import Address
from meshd.errors import Busy, InvalidRequest, MeshError, NotAllowed, Unavailable, UnknownOutcome, from_code

if TYPE_CHECKING:
    import ssl

CONNECT_S = 5.0
ANSWER_S = 25.0
"""A node that is stopped or gone says nothing; one that is well has an answer of the mesh within 20 s."""
STREAM_S = 45.0
"""Without a byte: the API shows life every 15 s."""
PATIENCE_S = 20.0
"""While nodes answer that the mesh is unavailable: a new leader takes far less."""
PAUSE_S = 0.25
ERROR_BYTES_MAX = 64 << 10
BODY_BYTES_MAX = 256 << 20
"""Of an answer that is read as a whole: pages are bounded by the API; this is against a broken node."""

LOOK_FIRST = "look whether it was done before you repeat it"

T = TypeVar("T")
TlsFactory = Callable[[Address], "ssl.SSLContext"]
Body = bytes | IO[bytes] | Iterable[bytes] | None


class Answer:
    """An answer whose body is still to be read. Close it, or read it to the end."""

    def __init__(self, response: http.client.HTTPResponse, connection: http.client.HTTPConnection) -> None:
        self._response = response
        self._connection = connection
        self.size = int(response.headers.get("content-length") or -1)

    def read(self) -> bytes:
        """Raises Unavailable when it breaks off before its end."""
        try:
            data = _read(self._response, BODY_BYTES_MAX + 1)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise Unavailable(f"the node broke off: {error or type(error).__name__}") from error
        if len(data) > BODY_BYTES_MAX:
            raise Unavailable(f"an answer of over {BODY_BYTES_MAX} bytes")
        return data

    def chunks(self) -> Iterator[bytes]:
        """Raises Unavailable when the stream breaks off before its end."""
        try:
            while chunk := self._response.read1(1 << 18):
                yield chunk
            if self._response.length:
                raise Unavailable(f"the node broke off with {self._response.length} bytes to come")
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"the node broke off: {error or type(error).__name__}") from error
        finally:
            self.close()

    def lines(self) -> Iterator[bytes]:
        """As they arrive, without their newlines."""
        rest = b""
        for chunk in self.chunks():
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines

    def close(self) -> None:
        self._connection.close()


class Requester:
    """Knows some nodes; the one that answered last is asked first."""

    def __init__(self, addresses: Iterable[Address], token: str, tls: TlsFactory) -> None:
        self._addresses = list(addresses)
        self._token = token
        self._tls = tls
        self._kept: dict[Address, http.client.HTTPConnection] = {}
        self._streams: WeakSet[socket.socket] = WeakSet()
        self.is_closed = False

    @property
    def addresses(self) -> list[Address]:
        return list(self._addresses)

    def close(self) -> None:
        """Also from another thread: a stream that is being read ends there at once, as one that broke off."""
        self.is_closed = True
        for stream in list(self._streams):
            with suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
        for connection in self._kept.values():
            connection.close()
        self._kept.clear()

    def json(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        timeout_s: float = ANSWER_S,
        is_resendable: bool = True,
    ) -> bytes:
        """The JSON answered. Raises what the API said, Unavailable when no node answers, UnknownOutcome."""
        try:
            data = json.dumps(body).encode() if body is not None else b"" if method == "POST" else None
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"this cannot be written as JSON: {error}") from error
        headers = {"content-type": "application/json"} if body is not None else {}

        def ask(address: Address) -> bytes:
            answer, connection = self._send(address, method, path, data, headers, timeout_s, is_resendable)
            try:
                found = answer.read()
            except Unavailable as error:
                if is_resendable:
                    raise
                raise UnknownOutcome(f"{address}: {error.message}", hint=LOOK_FIRST) from error
            if connection.sock is not None:
                self._kept[address] = connection
            return found

        return self._somewhere(ask, is_resendable=is_resendable)

    def stream(
        self,
        method: str,
        path: str,
        body: Callable[[], Body] = lambda: None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = STREAM_S,
    ) -> Answer:
        """The answer, its body unread. `body` makes the request's anew for every node that is tried."""

        def ask(address: Address) -> Answer:
            answer, connection = self._send(address, method, path, body(), dict(headers or {}), timeout_s, True)
            if connection.sock is not None:
                self._streams.add(connection.sock)
                if self.is_closed:
                    answer.close()
            return answer

        return self._somewhere(ask, is_resendable=True)

    def _somewhere(self, ask: Callable[[Address], T], *, is_resendable: bool) -> T:
        """Each node in turn, and again while one of them says that the mesh will be back."""
        gives_up_s = time.monotonic() + PATIENCE_S
        while True:
            failures: list[tuple[Address, MeshError]] = []
            is_anyone_there = False
            for address in list(self._addresses):
                try:
                    found = ask(address)
                except Unavailable as error:
                    if isinstance(error, UnknownOutcome) and not is_resendable:
                        raise
                    failures.append((address, error))
                    is_anyone_there |= not isinstance(error, Unreachable)
                else:
                    self._addresses.remove(address)
                    self._addresses.insert(0, address)
                    return found
            # What is at its bound, as a full disk, is not so for a moment: the user shall hear of it.
            is_busy = all(isinstance(error, Busy | Unreachable) for _, error in failures)
            if not is_anyone_there or is_busy or time.monotonic() > gives_up_s:
                raise _summary(failures)
            time.sleep(PAUSE_S)

    def _send(
        self,
        address: Address,
        method: str,
        path: str,
        body: Body,
        headers: dict[str, str],
        timeout_s: float,
        is_resendable: bool,
    ) -> tuple[Answer, http.client.HTTPConnection]:
        if self._token:
            headers["authorization"] = f"Bearer {self._token}"
        kept = self._kept.pop(address, None)
        if kept is not None:
            # The node may have closed it meanwhile; then a new one is as good.
            if is_resendable and isinstance(body, bytes | None):
                with suppress(OSError, http.client.HTTPException):
                    return self._exchange(kept, method, path, body, headers, timeout_s)
            kept.close()
        connection = self._connect(address)
        try:
            return self._exchange(connection, method, path, body, headers, timeout_s)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            why = str(error) or type(error).__name__
            if is_resendable:
                raise Unavailable(f"{address} did not answer: {why}") from error
            raise UnknownOutcome(f"{address} did not answer: {why}", hint=LOOK_FIRST) from error

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: Body,
        headers: dict[str, str],
        timeout_s: float,
    ) -> tuple[Answer, http.client.HTTPConnection]:
        assert connection.sock is not None
        connection.sock.settimeout(timeout_s)
        # A node that refuses an upload answers before it has read it all: the answer says why, the pipe does not.
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.request(
                method,
                path,
                body,
                headers,
                encode_chunked=not isinstance(body, bytes | None) and "content-length" not in headers,
            )
        response = connection.getresponse()
        if response.status >= 400:
            data = _read(response, ERROR_BYTES_MAX)
            connection.close()
            raise _error_of(response.status, data)
        return Answer(response, connection), connection

    def _connect(self, address: Address) -> http.client.HTTPConnection:
        try:
            connection = self._open(address)
            connection.connect()
        except FileNotFoundError as error:
            raise Unreachable(f"no agent on this machine ({address})", hint="start one with `meshd up`, or use --node HOST:PORT") from error  # fmt: skip
        except PermissionError as error:
            raise NotAllowed(f"the agent's socket {address.path} belongs to another user", hint="use sudo, or --node HOST:PORT with a token") from error  # fmt: skip
        except BlockingIOError as error:
            raise Unavailable(f"{address} has more callers than it can take just now") from error
        except (OSError, ValueError) as error:  # a name that no resolver takes is a ValueError
            if type(error).__name__ == "SSLCertVerificationError":
                raise NotAllowed(
                    f"{address} is not a node of this mesh", hint="its certificate is signed by somebody else"
                ) from error
            hint = (
                "is its agent running? Is this the API's port (`meshd up --api`)?"
                if address.host
                else "the agent is not running: `meshd up`"
            )
            raise Unreachable(
                f"cannot reach {address}: {getattr(error, 'strerror', None) or error}", hint=hint
            ) from error
        return connection

    def _open(self, address: Address) -> http.client.HTTPConnection:
        if address.path:
            return _UnixConnection(address.path)
        return _TlsConnection(address, self._tls(address))


class Unreachable(Unavailable):
    """Nobody listens there: waiting does not help."""


class _TlsConnection(http.client.HTTPConnection):
    def __init__(self, address: Address, context: ssl.SSLContext) -> None:
        super().__init__(address.host, address.port, timeout=CONNECT_S)
        self._context = context

    def connect(self) -> None:
        super().connect()
        # The name that every node's certificate has: any node of this mesh will do.
        self.sock = self._context.wrap_socket(self.sock, server_hostname="meshd")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=CONNECT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CONNECT_S)
        try:
            self.sock.connect(self._path)
        except OSError:
            self.sock.close()
            raise


def _read(response: http.client.HTTPResponse, bytes_max: int) -> bytes:
    """All of it, or its first bytes where it has more. Raises HTTPException when it is cut, which `read` takes for an end."""
    data = response.read(bytes_max)
    if response.length and len(data) < bytes_max:
        raise http.client.HTTPException(f"{response.length} bytes of its answer were to come")
    return data


def _error_of(status: int, data: bytes) -> MeshError:
    try:
        error = json.loads(data)["error"]
        return from_code(str(error["code"]), str(error["message"]), str(error.get("hint", "")))
    except (ValueError, KeyError, TypeError):
        return MeshError(f"the node answered {status} {http.client.responses.get(status, '')}".rstrip())


def _summary(failures: list[tuple[Address, MeshError]]) -> MeshError:
    busy = [error for _, error in failures if isinstance(error, Busy)]
    if len(failures) == 1 or busy:
        return busy[0] if busy else failures[0][1]
    tried = "; ".join(f"{address}: {error.message}" for address, error in failures)
    return Unavailable(f"no node answers: {tried}"[:2000], hint=failures[0][1].hint)
