"""Where the API listens: the local socket, which trusts this machine's owner, and optionally TLS on TCP, for tokens.

The socket lies in the agent's private directory, mode 0600; besides, the kernel says who
connected. Whoever is neither the agent's user nor root has to show a token there, too.
"""

from __future__ import annotations

import math
import os
import pwd
import socket
import ssl
import struct
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from meshd.api.app import create_app
from meshd.api.face import Face
from meshd.api.http1 import HEAD_S, App, Connection
from meshd.errors import StartRefused

log = structlog.get_logger()

CONNECTIONS_MAX = 512
"""At a time and listener. Beyond it new ones wait in the kernel's queue, where they cost the agent nothing."""
BACKLOG = 1024
"""A burst of clients; past it the kernel tells them to try again, which the client does."""
STOP_S = 3.0
"""What answers that are under way at the stop may still take; streams without end are cut then."""


@dataclass(frozen=True, slots=True)
class Listening:
    socket_path: Path
    tcp_port: int | None
    """The real one, also where 0 was asked for."""


async def serve(
    face: Face,
    *,
    socket_path: Path,
    tcp: tuple[str, int] | None = None,
    tls: ssl.SSLContext | None = None,
    task_status: trio.TaskStatus[Listening] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; then what is being answered has `STOP_S` to end.

    Raises StartRefused when an address cannot be had. TCP is served with TLS only.
    """
    assert tcp is None or tls is not None, "the API is never served in the clear"
    server = _Server(create_app(face))
    local = _listen_unix(socket_path)
    remote: socket.socket | None = None
    try:
        remote = _listen_tcp(tcp) if tcp is not None else None
        async with trio.open_nursery() as nursery:
            try:
                nursery.start_soon(server.accept, local, None, nursery)
                if remote is not None:
                    nursery.start_soon(server.accept, remote, tls, nursery)
                task_status.started(Listening(socket_path, remote.getsockname()[1] if remote is not None else None))
                await trio.sleep_forever()
            finally:
                server.stop()
    finally:
        _close(local, remote, socket_path)


class _Server:
    """Accepts, and owns what is open. A connection is shielded, so that a stop gives it `STOP_S` instead of cutting it."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._connections: set[Connection] = set()
        self._scopes: set[trio.CancelScope] = set()
        self._deadline = math.inf

    def stop(self) -> None:
        """Who waits between two requests is let go at once."""
        self._deadline = trio.current_time() + STOP_S
        for scope in self._scopes:
            scope.deadline = self._deadline
        for connection in self._connections:
            connection.stop()

    async def accept(self, listener: socket.socket, tls: ssl.SSLContext | None, nursery: trio.Nursery) -> None:
        listening = trio.socket.from_stdlib_socket(listener)
        room = trio.Semaphore(CONNECTIONS_MAX)
        while True:
            await room.acquire()
            try:
                accepted, address = await listening.accept()
            except OSError as error:
                # Out of descriptors, or a client that left at once: neither ends the service.
                room.release()
                log.warning("api.accept_failed", error=str(error))
                await trio.sleep(0.05)
                continue
            nursery.start_soon(self._serve, accepted, address, tls, room)

    async def _serve(
        self, accepted: trio.socket.SocketType, address: object, tls: ssl.SSLContext | None, room: trio.Semaphore
    ) -> None:
        with trio.CancelScope(shield=True, deadline=self._deadline) as scope:
            self._scopes.add(scope)
            try:
                await self._serve_connection(accepted, address, tls)
            except OSError as error:
                log.info("api.connection_lost", error=str(error))
            finally:
                accepted.close()
                self._scopes.discard(scope)
                room.release()

    async def _serve_connection(
        self, accepted: trio.socket.SocketType, address: object, tls: ssl.SSLContext | None
    ) -> None:
        is_local = accepted.family == socket.AF_UNIX
        scope = {
            "scheme": "http" if tls is None else "https",
            "client": (str(address[0]), int(address[1])) if isinstance(address, tuple) else None,
            "server": None,
            "extensions": {"meshd.user": _trusted_user(accepted) if is_local else ""},
        }
        stream = trio.SocketStream(accepted)
        if tls is None:
            connection = Connection(self._app, stream, scope)
        else:
            secured = trio.SSLStream(stream, tls, server_side=True, https_compatible=True)
            try:
                with trio.fail_after(HEAD_S):
                    await secured.do_handshake()
            except (trio.TooSlowError, trio.BrokenResourceError):
                return
            connection = Connection(self._app, secured, scope)
        self._connections.add(connection)
        try:
            await connection.serve()
        finally:
            self._connections.discard(connection)


def _trusted_user(accepted: trio.socket.SocketType) -> str:
    """The name of the local user who connected, if it is the agent's own or root; else nothing."""
    size = struct.calcsize("3i")
    _pid, uid, _gid = struct.unpack("3i", accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    if uid not in (os.geteuid(), 0):
        return ""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid-{uid}"


def _listen_unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    beside = path.with_name(f".{path.name}")
    try:
        # Bound beside, made private, then renamed: at no moment can another user connect, and a socket that
        # a killed agent left behind is replaced. The data directory's lock keeps two agents from doing so.
        beside.unlink(missing_ok=True)
        listener.bind(str(beside))
        beside.chmod(0o600)
        listener.listen(BACKLOG)
        beside.rename(path)
    except OSError as error:
        listener.close()
        hint = "choose a shorter --data-dir" if len(os.fsencode(beside)) > 100 else "is the directory writable?"
        raise StartRefused(f"cannot open the API socket {path}: {error}", hint=hint) from error
    listener.setblocking(False)
    return listener


def _close(local: socket.socket, remote: socket.socket | None, path: Path) -> None:
    local.close()
    if remote is not None:
        remote.close()
    path.unlink(missing_ok=True)


def _listen_tcp(address: tuple[str, int]) -> socket.socket:
    host, port = address
    try:
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=BACKLOG
        )
    except OSError as error:
        hint = f"is another agent using port {port}? `--api HOST:PORT` chooses another"
        raise StartRefused(f"cannot serve the API on {host}:{port}: {error.strerror or error}", hint=hint) from error
    listener.setblocking(False)
    return listener
