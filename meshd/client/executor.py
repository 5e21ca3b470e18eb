"""`MeshExecutor`: Python functions on a mesh, as `concurrent.futures` has them.

    with MeshExecutor() as mesh:                              # where `mesh` goes: MESH_NODE, or this machine's agent
        total = sum(mesh.map(slow_square, range(1000)))

A call travels in a task of a job: it is in the replicated queue once its job is agreed, a few
milliseconds after `submit`, and runs in a process of its own kind on a node, never in an agent.
One task carries one call, or several of the same function where they are short (`grouping`).

    submit, map ──▶ waiting ──▶ Courier: one array job for what came close together ──▶ mesh
    futures ◀────── Gatherer: what has ended, a page of tasks at a time ◀── Watcher: which jobs changed

If a node is lost its tasks run again elsewhere, so a call may run more than once; its future is
resolved once, by the attempt that the mesh took. What a call raises is raised by its future, with
the remote traceback as the cause. Results are unpickled here: see `pickles` for what that means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from itertools import count
from time import monotonic
from types import TracebackType
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary, finalize

from meshd.client import pickles
from meshd.client.board import Board, MeshFuture
from meshd.client.client import Client
from meshd.client.couriers import Courier, Gatherer, Watcher
from meshd.errors import InvalidRequest

P = ParamSpec("P")
T = TypeVar("T")

ADAPTIVE = 0


class MeshExecutor(Executor):
    def __init__(
        self,
        nodes: str | Sequence[str] = (),
        *,
        token: str = "",
        ca_pem: str = "",
        python: str = "",
        job: Mapping[str, Any] | None = None,
    ) -> None:
        """`nodes`, `token` and `ca_pem` as for `Client`. `python` is the interpreter on the nodes, by default the path
        of this one; meshd must be installed there, for the same version of Python.

        `job` is what else the jobs shall say, as in a job file: `{"needs": {"cpu": 0.5}, "retry": {"crash_limit": 3}}`.

        Raises what `Client.me` does: an address, token or mesh that is not there is told now, not by each future after
        two minutes of trying.
        """
        self._board = Board()

        def connect() -> Client:
            return Client(nodes, token=token, ca_pem=ca_pem)

        self._functions: WeakKeyDictionary[Callable[..., Any], bytes] = WeakKeyDictionary()
        self._groups = count(1)
        watcher = Watcher(self._board, connect())
        gatherer = Gatherer(self._board, connect(), watcher)
        self._threads = (watcher, gatherer, Courier(self._board, connect(), job or {}, python))
        with connect() as client:
            client.me()
        for thread in self._threads:
            thread.start()
        # Dropped without `shutdown`: what was submitted goes on, and then its threads and connections end.
        finalize(self, self._board.close)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Function and arguments are pickled now: what cannot be is raised here, what changes later is not seen."""
        call: MeshFuture[T] = self._call(self._pickled(fn), args, kwargs, ADAPTIVE)
        self._board.add([call])
        return call

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = ADAPTIVE,
    ) -> Results[T]:
        """Results in order. A `chunksize` says how many calls make a task; 0 leaves it to how long they take.

        Raises TimeoutError when the next result is not there `timeout` seconds after `map` was called. When the
        iterator ends early (it raises, it is closed, or it is dropped after the first result was asked for), the calls
        whose results were not taken are cancelled.
        """
        ends_s = None if timeout is None else monotonic() + timeout
        if chunksize < 0:
            raise InvalidRequest(f"chunksize {chunksize} is below 0")
        function = self._pickled(fn)
        calls: list[MeshFuture[T]] = []
        group = ADAPTIVE
        for number, args in enumerate(zip(*iterables, strict=False)):
            if chunksize and number % chunksize == 0:
                group = next(self._groups)
            calls.append(self._call(function, args, {}, group))
        self._board.add(calls)
        return Results(calls, ends_s)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Takes nothing new. What was submitted goes on, unless it is cancelled; with `wait`, until it has ended."""
        self._board.close()
        if cancel_futures:
            for call in self._board.unresolved():
                call.cancel()
        if wait:
            for thread in self._threads:
                thread.join()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown(wait=True)

    def _call(self, function: bytes, args: tuple[Any, ...], kwargs: Mapping[str, Any], group: int) -> MeshFuture[T]:
        return MeshFuture(self._board, function, pickles.dump_call(args, kwargs), group)

    def _pickled(self, function: Callable[..., Any]) -> bytes:
        """Once for each function object, as long as it lives: pickling one by value takes longer than most calls of it."""
        try:
            found = self._functions.get(function)
            if found is None:
                found = self._functions[function] = pickles.dump_function(function)
        except TypeError:  # nothing that can be hashed, or referred to weakly
            return pickles.dump_function(function)
        return found


class Results(Iterator[T]):
    """Of a map, in order. No generator: closing one that was never begun would cancel nothing."""

    def __init__(self, calls: list[MeshFuture[T]], ends_s: float | None) -> None:
        self._calls = calls[::-1]
        self._ends_s = ends_s
        self._is_begun = False

    def __next__(self) -> T:
        self._is_begun = True
        if not self._calls:
            raise StopIteration
        # Taken off before it is waited for: a result that was handed over is not kept here.
        call = self._calls.pop()
        try:
            return call.result(None if self._ends_s is None else self._ends_s - monotonic())
        except BaseException:
            call.cancel()
            self.close()
            raise

    def close(self) -> None:
        """Cancels the calls whose results were not taken."""
        while self._calls:
            self._calls.pop().cancel()

    def __del__(self) -> None:
        # A map that nobody looks at is for its effects, as it is written with every executor of `concurrent.futures`.
        if self._is_begun:
            self.close()
