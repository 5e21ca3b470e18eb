"""The Python client: a mesh as an object with plain, blocking methods.

    with Client() as mesh:                                # this machine's agent
        job = mesh.submit({"run": {"args": ["echo", "hello"]}})
        mesh.wait(job)
        print(mesh.output(job).decode())

Every method raises the MeshErrors of `meshd.errors`, as the node named them; Unavailable
when none of the known nodes answers. Submissions carry an id made here, so they are sent
again, also to another node, until one answers. Not for several threads at a time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from meshd.client.address import Address, local_address, parse_address
from meshd.client.context import find_mesh, split_nodes
from meshd.client.files import PIECE_BYTES, files_below, tar_of, untar, upload_references
from meshd.client.http import ANSWER_S, Body, Requester
from meshd.client.live import live_events, parse_events, raise_if_error
from meshd.errors import InvalidRequest, MeshError, Unplaceable, WaitTimeout
from meshd.ids import new_job_id
from meshd.model import BlobRef, Inline, JobId, Role, TaskState, Tree, TreeRef
from meshd.views import (
    BlobList,
    BlobView,
    ClockMove,
    ClusterStatus,
    DrainView,
    EventView,
    Explanation,
    InvitesView,
    JobPage,
    JobView,
    LogView,
    MembersView,
    MemberView,
    Summary,
    TaskPage,
    TaskView,
    TokensView,
)

if TYPE_CHECKING:
    import ssl

T = TypeVar("T")
POLL_S = 30.0
COPY_S = 30.0
"""What a job names is on two disks before it is submitted."""
NEVER_REACHED = 2**53
"""A version that no job comes to: only its end answers a wait for that."""

Progress = Callable[[str, int, int], None]
"""(what, bytes done, bytes in all)"""
LogStream = Literal["stdout", "stderr"]


@dataclass(frozen=True, slots=True)
class LogPiece:
    stream: LogStream
    data: bytes


class Result(msgspec.Struct, frozen=True):
    """How a task ended, and its job."""

    job: JobView
    task: TaskView


class Me(msgspec.Struct, frozen=True):
    """Which node answers, and who the caller is to it."""

    node: str
    name: str
    mesh: str
    version: str
    caller: str
    role: str


class _Submitted(msgspec.Struct):
    id: JobId
    is_new: bool


class _Invited(msgspec.Struct):
    invite: str


class _Token(msgspec.Struct):
    token: str


class Client:
    def __init__(
        self,
        nodes: str | Sequence[str] = (),
        *,
        token: str = "",
        ca_pem: str = "",
        is_stale_ok: bool = False,
        on_progress: Progress = lambda what, done, total: None,
    ) -> None:
        """`nodes`: HOST:PORT or unix:PATH, tried in turn; one string is read as MESH_NODE is. `token` is needed over TCP.
        Without nodes it is the mesh that the `mesh` command would speak to: MESH_NODE and MESH_TOKEN, a saved context, or
        else this machine's agent.

        With `is_stale_ok` what is asked of the queue is answered from what a node knows at once, perhaps a little
        old, and also when no majority of the voters can be reached.
        """
        if isinstance(nodes, str):
            nodes = split_nodes(nodes)
        if not nodes:
            mesh = find_mesh(token=token)
            nodes, token, ca_pem = mesh.nodes, mesh.token, ca_pem or mesh.ca_pem
        addresses = [parse_address(text) for text in nodes] or [local_address()]
        self._token = token.strip()
        self._is_stale_ok = is_stale_ok
        self.ca_pem = ca_pem
        """The mesh's CA: given, or learned and checked against the token at the first connection."""
        self._tls_context: ssl.SSLContext | None = None
        self._requester = Requester(addresses, self._token, self._tls)
        self._on_progress = on_progress

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Also from another thread: `events` and `follow` that are being read there end."""
        self._requester.close()

    @property
    def is_closed(self) -> bool:
        return self._requester.is_closed

    # --- jobs --------------------------------------------------------------------------------------------------------

    def submit(self, document: Mapping[str, Any], *, job_id: str = "", base: Path | str = ".") -> JobId:
        """Upload what the document names by path (relative to `base`), then submit it. Its id, once it is agreed.

        With a `job_id` (a fresh UUIDv7) of your own, calling this again with the same one is safe.
        """
        job_id = job_id or self.new_id()
        spec = upload_references(document, Path(base), self)
        return self._ask("POST", "/v1/jobs", _Submitted, {"id": job_id, "spec": spec}, waits_s=COPY_S).id

    def run(self, document: Mapping[str, Any], *, base: Path | str = ".", timeout_s: float | None = None) -> JobView:
        """Submit, and wait for the end."""
        return self.wait(self.submit(document, base=base), timeout_s=timeout_s)

    def wait(
        self, job: str, *, timeout_s: float | None = None, on_change: Callable[[JobView], None] | None = None
    ) -> JobView:
        """The job when it has ended, well or not. Raises WaitTimeout."""
        ends_s = time.monotonic() + timeout_s if timeout_s is not None else None
        version = 0 if on_change is not None else NEVER_REACHED
        while True:
            left_s = POLL_S if ends_s is None else min(POLL_S, ends_s - time.monotonic())
            view = self.wait_change(job, version, left_s)
            if on_change is not None and view.version != version:
                on_change(view)
            if view.is_final:
                return view
            if left_s <= 0:
                raise WaitTimeout(f"job {view.id} is still {view.state}", hint=f"mesh job wait {view.id}")
            job, version = view.id, view.version if on_change is not None else NEVER_REACHED

    def wait_change(self, job: str, version: int, timeout_s: float) -> JobView:
        """The job when its version is above this one or it has ended; at the timeout (at most 60 s) as it is."""
        waits_s = max(timeout_s, 0)
        return self._ask("GET", f"{_job(job)}/wait", JobView, waits_s=waits_s, after=version, timeout=f"{waits_s:.3f}")

    def job(self, job: str) -> JobView:
        """By id, unique prefix, name or `last`."""
        return self._look(_job(job), JobView)

    def jobs(
        self,
        *,
        states: Sequence[TaskState | str] = (),
        name: str = "",
        labels: Mapping[str, str] | None = None,
        limit: int = 50,
        is_stale_ok: bool = False,
    ) -> Iterator[JobView]:
        """Newest first, at most `limit`."""
        label = ",".join(f"{key}={value}" for key, value in (labels or {}).items())
        before = ""
        while limit > 0:
            page = self._look(
                "/v1/jobs", JobPage, is_stale_ok,
                state=",".join(states), name=name, label=label, limit=min(limit, 1000), before=before,
            )  # fmt: skip
            yield from page.jobs
            limit -= len(page.jobs)
            if page.next is None:
                return
            before = page.next

    def tasks(
        self, job: str, *, states: Sequence[TaskState | str] = (), start: int = 0, stop: int | None = None
    ) -> Iterator[TaskView]:
        """All tasks in [start, stop) in order, page by page."""
        following: int | None = start
        while following is not None:
            page = self._look(
                f"{_job(job)}/tasks", TaskPage,
                state=",".join(states), start=following, stop="" if stop is None else stop, limit=1000,
            )  # fmt: skip
            yield from page.tasks
            following = page.next

    def task(self, job: str, task: int = 0) -> TaskView:
        return self._look(f"{_job(job)}/tasks/{task}", TaskView)

    def cancel(self, job: str, tasks: Sequence[tuple[int, int]] | None = None) -> JobView:
        """All of it, or half-open ranges of tasks. Idempotent."""
        return self._ask("POST", f"{_job(job)}/cancel", JobView, {"tasks": tasks})

    def release(self, job: str) -> JobView:
        """Let a job go on that `meshd recover` holds: you promise that nothing of it runs any more. Idempotent."""
        return self._ask("POST", f"{_job(job)}/release", JobView)

    def retry(self, job: str) -> JobId:
        """Failed, cancelled and timed-out tasks run again, as a new job; its id."""
        return self._ask("POST", f"{_job(job)}/retry", _Submitted, {"id": self.new_id()}).id

    def explain(self, job: str, task: int = 0) -> Explanation:
        return self._look(f"{_job(job)}/explain", Explanation, task=task)

    def result(self, job: str, task: int = 0) -> Result:
        """Raises Conflict while there is none."""
        return self._look(f"{_job(job)}/result", Result, task=task)

    def outputs(self, job: str) -> TreeRef:
        """All files that the tasks of a finished job left, as one directory: task k's under `k/`."""
        return self._ask("GET", f"{_job(job)}/outputs", TreeRef)

    def output(self, job: str, task: int = 0, stream: LogStream = "stdout") -> bytes:
        """What a task wrote until now, whole."""
        return b"".join(self.output_chunks(job, task, stream))

    def output_chunks(self, job: str, task: int = 0, stream: LogStream = "stdout") -> Iterator[bytes]:
        return self._requester.stream(
            "GET", f"{_job(job)}/tasks/{task}/logs?{_query(stream=stream, stale=self._stale())}"
        ).chunks()

    def follow(
        self, job: str, task: int = 0, *, streams: Sequence[LogStream] = ("stdout", "stderr")
    ) -> Iterator[LogPiece]:
        """What a task writes, as it does, until it is final. Goes on at another node when this one is lost."""
        seen: dict[str, tuple[int, int]] = dict.fromkeys(streams, (0, 0))
        asked = "both" if len(streams) > 1 else streams[0]
        path = f"{_job(job)}/tasks/{task}/logs?{_query(stream=asked, follow='true', stale=self._stale())}"
        for kind, data, _ in live_events(self._requester, path, dict):
            if kind == "end":
                return
            if kind not in ("stdout", "stderr"):
                continue
            stream: LogStream = "stderr" if kind == "stderr" else "stdout"
            piece = msgspec.convert(data, LogView)
            # A stream that was begun anew starts at 0 of the present attempt: what was seen of it is left out.
            fence, end = seen[stream]
            if piece.fence < fence:  # from a node that has not heard of the later attempt
                continue
            if piece.fence > fence:
                end = 0
            fresh = piece.data[max(end - piece.offset, 0) :]
            if fresh:
                seen[stream] = piece.fence, piece.offset + len(piece.data)
                yield LogPiece(stream, fresh)

    def events(self, after: int | None = None) -> Iterator[EventView]:
        """What happens in the mesh, without end."""
        headers = {} if after is None else {"last-event-id": str(after)}
        for kind, data, position in live_events(self._requester, "/v1/events", lambda: headers):
            if kind != "end":
                headers["last-event-id"] = position
                yield msgspec.convert(data, EventView)

    # --- bytes -------------------------------------------------------------------------------------------------------

    def put_bytes(self, data: bytes, *, replicas: int = 2) -> BlobRef:
        return self._put(lambda: data, len(data), replicas)

    def put_file(self, path: Path | str, *, replicas: int = 2) -> BlobRef:
        path = Path(path)
        total = path.stat().st_size
        return self._put(lambda: self._counted(path), total, replicas)

    def put_stream(self, file: IO[bytes], *, replicas: int = 2) -> BlobRef:
        """A pipe can be read only once: it is not sent again to another node."""
        bodies = [iter(lambda: file.read(PIECE_BYTES), b"")]

        def body() -> Body:
            if not bodies:
                raise MeshError("the upload broke off, and a pipe can be read only once", hint="repeat the command")
            return bodies.pop()

        return self._put(body, None, replicas)

    def put_directory(self, path: Path | str, *, replicas: int = 2) -> TreeRef:
        path = Path(path)
        files = files_below(path)
        total = sum(file.stat().st_size for file in files)

        def body() -> Body:
            done = 0

            def count(size: int) -> None:
                nonlocal done
                done += size
                self._on_progress(f"uploading {path.name}/", done, total)

            return tar_of(path, files, count)

        headers = {"content-type": "application/x-tar"}
        answer = self._requester.stream("POST", f"/v1/trees?replicas={replicas}", body, headers=headers, timeout_s=600)
        return _decode(answer.read(), TreeRef)

    def get_blob(self, blob: str, target: IO[bytes]) -> int:
        """Write the blob; its size. Raises NotFound, Unavailable when it broke off (what was written is then a part)."""
        answer = self._requester.stream("GET", f"/v1/blobs/{quote(blob, safe='')}")
        done = 0
        for chunk in answer.chunks():
            target.write(chunk)
            done += len(chunk)
            self._on_progress("downloading", done, max(answer.size, done))
        return done

    def get_directory(self, tree: str, target: Path | str) -> int:
        """Unpack a tree below `target`; the number of files."""
        answer = self._requester.stream("GET", f"/v1/trees/{quote(tree, safe='')}/tar")
        return untar(answer.chunks(), Path(target), tree)

    def save_outputs(self, outputs: Inline | TreeRef, target: Path | str) -> int:
        """Unpack what one attempt left, as its outcome names it; the number of files."""
        from meshd import codec
        from meshd.spec import check_path

        if isinstance(outputs, TreeRef):
            return self.get_directory(outputs.blob.hash, target)
        tree = codec.decode(outputs.data, Tree)
        for entry in tree.entries:
            # What comes from a job is not trusted to stay inside of `target`.
            path = Path(target) / check_path(entry.path, "output")
            path.parent.mkdir(parents=True, exist_ok=True)
            assert isinstance(entry.content, Inline)
            path.write_bytes(entry.content.data)
            path.chmod(0o755 if entry.executable else 0o644)
        return len(tree.entries)

    def show_tree(self, tree: str) -> Tree:
        return self._ask("GET", f"/v1/trees/{quote(tree, safe='')}", Tree)

    def blobs(self, *, prefix: str = "") -> Iterator[BlobView]:
        """Those on the disk of the node that is asked whose names begin with `prefix`, in order, page by page."""
        after: str | None = ""
        while after is not None:
            page = self._ask("GET", "/v1/blobs", BlobList, prefix=prefix, after=after)
            yield from page.blobs
            after = page.next

    def blob_where(self, blob: str) -> BlobView:
        return self._ask("GET", f"/v1/blobs/{quote(blob, safe='')}/where", BlobView)

    def remove_blob(self, blob: str) -> None:
        self._ask("DELETE", f"/v1/blobs/{quote(blob, safe='')}", None)

    # --- nodes and the mesh ------------------------------------------------------------------------------------------

    def me(self) -> Me:
        return self._ask("GET", "/v1/me", Me)

    def nodes(self) -> MembersView:
        return self._look("/v1/nodes", MembersView)

    def node(self, node: str) -> MemberView:
        return self._look(_node(node), MemberView)

    def invite(self, roles: Sequence[Role | str] = ("server", "worker"), *, uses: int = 1, lifetime_ms: int = 3_600_000) -> str:  # fmt: skip
        body = {"roles": list(roles), "uses": uses, "lifetime_ms": lifetime_ms}
        return self._ask("POST", "/v1/invites", _Invited, body).invite

    def invites(self) -> InvitesView:
        return self._ask("GET", "/v1/invites", InvitesView)

    def drain(self, node: str, *, deadline_ms: int | None = None) -> Iterator[DrainView]:
        """Progress, until the node can be stopped with nothing lost."""
        body = msgspec.json.encode({"deadline_ms": deadline_ms})
        headers = {"content-type": "application/json", "accept": "text/event-stream"}
        answer = self._requester.stream("POST", f"{_node(node)}/drain", lambda: body, headers=headers)
        for kind, data, _ in parse_events(answer.lines()):
            raise_if_error(kind, data)
            yield msgspec.convert(data, DrainView)

    def undrain(self, node: str) -> None:
        self._ask("POST", f"{_node(node)}/drain", DrainView, {"cancel": True})

    def remove_node(self, node: str) -> None:
        self._ask("DELETE", _node(node), None)

    def cluster(self) -> ClusterStatus:
        return self._ask("GET", "/v1/cluster", ClusterStatus)

    def set_clock(self, to_ms: int | None = None) -> ClockMove:
        """Set the mesh's time, forward or back; None is the clock of the node that is asked."""
        return self._ask("POST", "/v1/cluster/clock", ClockMove, {"id": os.urandom(32).hex(), "to_ms": to_ms})

    def summary(self) -> Summary:
        return self._look("/v1/summary", Summary)

    def tokens(self) -> TokensView:
        return self._ask("GET", "/v1/tokens", TokensView)

    def create_token(self, name: str, role: str = "operator") -> str:
        """The token itself: it can be seen only now."""
        body = {"name": name, "role": role}
        return self._ask("POST", "/v1/tokens", _Token, body, is_resendable=False).token

    def revoke_token(self, name: str) -> None:
        self._ask("DELETE", f"/v1/tokens/{quote(name, safe='')}", None)

    @staticmethod
    def new_id() -> JobId:
        return new_job_id(time.time_ns() // 1_000_000, os.urandom(10))

    # --- underneath --------------------------------------------------------------------------------------------------

    def _look(self, path: str, kind: type[T], is_stale_ok: bool = False, **query: object) -> T:
        """A read of the queue: after a barrier, unless it may be stale."""
        asked = _query(stale=self._stale(is_stale_ok), **query)
        return self._ask("GET", f"{path}?{asked}" if asked else path, kind)

    def _stale(self, is_asked: bool = False) -> str:
        return "true" if is_asked or self._is_stale_ok else ""

    def _ask(
        self,
        method: str,
        path: str,
        kind: type[T] | None,
        body: object = None,
        *,
        is_resendable: bool = True,
        waits_s: float = 0,
        **query: object,
    ) -> T:
        """`waits_s`: so long may the node take before it even asks the mesh."""
        asked = _query(**query)
        data = self._requester.json(
            method,
            f"{path}?{asked}" if asked else path,
            body,
            timeout_s=ANSWER_S + waits_s,
            is_resendable=is_resendable,
        )
        return _decode(data, kind) if kind is not None else None  # type: ignore[return-value]

    def _put(self, body: Callable[[], Body], size: int | None, replicas: int) -> BlobRef:
        headers = {"content-type": "application/octet-stream"}
        if size is not None:
            headers["content-length"] = str(size)
        answer = self._requester.stream("PUT", f"/v1/blobs?replicas={replicas}", body, headers=headers, timeout_s=600)
        found = _decode(answer.read(), BlobView)
        return BlobRef(found.hash, found.size)

    def _counted(self, path: Path) -> Iterator[bytes]:
        done, total = 0, path.stat().st_size
        with path.open("rb") as file:
            # A file that grows meanwhile is sent as long as it was announced.
            while piece := file.read(min(PIECE_BYTES, total - done)):
                done += len(piece)
                self._on_progress(f"uploading {path.name}", done, total)
                yield piece
        if done < total:
            raise InvalidRequest(f"{path} became shorter while it was uploaded")

    def _tls(self, address: Address) -> ssl.SSLContext:
        if self._tls_context is None:
            from meshd.client.trust import pinned_context

            self._tls_context, self.ca_pem = pinned_context(address, self._token, self.ca_pem)
        return self._tls_context


def cannot_run(found: Explanation) -> Unplaceable:
    """For whoever waits for a job that no node can run as it is now."""
    lacks = "".join(f"\n  {node.name}: {', '.join(node.lacks)}" for node in found.nodes)
    return Unplaceable(
        f"no node can run job {found.job}: {found.summary}{lacks}",
        hint=f"it waits for such a node: mesh job explain {found.job} | mesh job cancel {found.job}",
    )


def _decode(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise MeshError(f"the node answered what this client does not understand: {error}", hint="are both of one version? mesh version") from error  # fmt: skip


def _query(**values: object) -> str:
    return urlencode({key: value for key, value in values.items() if value not in ("", None)})


def _job(selector: str) -> str:
    return f"/v1/jobs/{_segment(selector, 'job')}"


def _node(selector: str) -> str:
    return f"/v1/nodes/{_segment(selector, 'node')}"


def _segment(selector: str, what: str) -> str:
    if not selector or "/" in selector or selector in (".", ".."):
        raise InvalidRequest(f"{selector!r} does not name a {what}")
    return quote(selector, safe="")
