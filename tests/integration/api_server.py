"""The API over real sockets, with the pretended node behind it, for the tests of API, client and command line."""

from __future__ import annotations

import shutil
import ssl
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meshd.admission import tls
from meshd.api.server import serve
from meshd.testing.face import FakeFace


class Served:
    """A node's API in a thread of its own, so that blocking clients can be tested as they are used."""

    def __init__(self, directory: Path, *, is_remote: bool = False) -> None:
        self.directory = directory
        self.socket = directory / "api.sock"
        self.node = f"unix:{self.socket}"
        self.face: FakeFace
        self.port = 0
        self.ca_pem = ""
        self._is_remote = is_remote
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(30)
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        with suppress(trio.RunFinishedError):  # a test has stopped it already
            self.do(self._scope.cancel)
        self._thread.join(30)
        assert not self._thread.is_alive()

    def do(self, call: object, *args: object) -> object:
        """Run something in the server's loop, where its state lives."""
        return trio.from_thread.run_sync(call, *args, trio_token=self._token)  # type: ignore[arg-type]

    def _run(self) -> None:
        try:
            trio.run(self._serve)
        except BaseException as error:
            self._failure = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        context = None
        if self._is_remote:
            self.ca_pem, context = make_tls(self.directory)
        self.face = FakeFace(self.ca_pem.encode())
        with trio.CancelScope() as self._scope:
            async with trio.open_nursery() as nursery:
                tcp = ("127.0.0.1", 0) if context is not None else None
                listening = await nursery.start(
                    partial(serve, self.face, socket_path=self.socket, tcp=tcp, tls=context)
                )
                self.port = listening.tcp_port or 0
                self._ready.set()


def make_tls(directory: Path) -> tuple[str, ssl.SSLContext]:
    """A mesh's CA, and what a node of it serves with."""
    key = Ed25519PrivateKey.generate()
    ca_pem = tls.make_authority(key, "a-mesh")
    request = tls.read_request(tls.make_request(directory / "api.key", "a-node", ()))
    leaf = tls.issue_leaf(key, ca_pem, "a-node", request)
    (directory / "api.pem").write_text(leaf)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "api.pem", directory / "api.key")
    return ca_pem, context


@contextmanager
def short_directory() -> Iterator[Path]:
    """pytest's own paths can be too long for a unix socket."""
    directory = Path(tempfile.mkdtemp(prefix="mapi-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@contextmanager
def served(*, is_remote: bool = False) -> Iterator[Served]:
    with short_directory() as directory:
        server = Served(directory, is_remote=is_remote)
        server.start()
        try:
            yield server
        finally:
            server.stop()
