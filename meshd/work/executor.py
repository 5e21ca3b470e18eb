"""One attempt from its lease to its outcome: inputs to disk, backend, outputs to blobs, on two disks before it is told.

    fetch (blobs from whoever has them) → working directory → backend.run → collect → replicate → Outcome

Whatever a job does is an `Outcome`. What the mesh could not do for it (an input that nobody
has, a disk that is full) is an outcome too, `backend`, which counts as a loss and not as one
of the job's own tries. Attempts that need none of this run in batches (planned.py).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic

import structlog
import trio
from msgspec.structs import replace

from meshd.backends import remains
from meshd.blobs.fetch import Fetcher
from meshd.blobs.replicate import Replicator
from meshd.blobs.tree import CheckedTree, check_tree, collect, materialise, refs_of, unpack_tree
from meshd.errors import Corrupt, InvalidRequest, MeshError, NotFound, TooLarge, Unavailable
from meshd.items import LIST_BYTES_MAX, LISTS_BYTES_KEPT, Lines, Strings, item_of
from meshd.model import (
    AttemptKey,
    BlobRef,
    EndReason,
    Inline,
    ItemsBlob,
    ItemsFiles,
    JobSpec,
    NodeId,
    Outcome,
    Tree,
    TreeEntry,
    TreeRef,
)
from meshd.ports import Backend, BlobStore, Execution, Leash
from meshd.work.planned import PlannedRuns, limits_of

FETCH_S = 300.0
"""For one input; a peer that stalls is left much earlier."""
REPLICATE_S = 30.0
REPLICATE_PAUSE_S = 1.0
REMAINS_MAX = 64
"""Directories of ended attempts that wait to be removed; beyond that an attempt removes its own before it is told of."""

log = structlog.get_logger()


class Executor:
    """Runs attempts on this node. `holders` names who had a job's inputs when it was submitted."""

    def __init__(
        self,
        *,
        directory: Path,
        me: NodeId,
        store: BlobStore,
        fetcher: Fetcher,
        replicator: Replicator,
        backends: Mapping[str, Backend],
        offered: Callable[[], Sequence[str]],
    ) -> None:
        self._directory = directory
        self._me = me
        self._store = store
        self._fetcher = fetcher
        self._replicator = replicator
        self._backends = backends
        self._offered = offered
        self._lists: dict[BlobRef, Tree | Lines] = {}
        self._running: dict[int, Path] = {}
        self.planned = PlannedRuns(directory=directory, me=me, store=store, supplies=self)
        self._remains, self._removable = trio.open_memory_channel[Path](REMAINS_MAX)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Remove what ended attempts left, which nobody waits for. What is left at the end, `sweep` finds."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.planned.serve)
            task_status.started()
            async for directory in self._removable:
                await trio.to_thread.run_sync(remains.remove, directory)

    def sweep(self) -> None:
        """Remove what attempts of an earlier start left: their processes died with that agent."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def read_output(self, fence: int, stream: str, offset: int, bytes_max: int) -> bytes | None:
        """What an attempt that runs here has written from there on; None when it does not run here, or not yet."""
        if stream not in ("stdout", "stderr"):
            return None
        directory = self._running.get(fence)
        if directory is None:
            return await self.planned.read_output(fence, stream, offset, bytes_max)
        return _read(directory / stream, offset, bytes_max)

    async def run(self, key: AttemptKey, spec: JobSpec, leash: Leash) -> Outcome:
        """To the end, with everything the outcome names on `spec.replicas` disks. Cancelling stops the attempt."""
        directory = self._directory / f"{key.fence:x}"
        self._running[key.fence] = directory
        started = monotonic()
        try:
            outcome = await self._run(directory, key, spec, leash)
        except trio.Cancelled:
            raise
        except InvalidRequest as error:
            outcome = Outcome(EndReason.INVALID, message=str(error)[:2000])
        except (MeshError, OSError) as error:
            log.warning("attempt.failed", job=key.job, task=key.task, fence=key.fence, error=str(error))
            outcome = Outcome(EndReason.BACKEND, message=str(error)[:2000])
        finally:
            del self._running[key.fence]
            await self._leave(directory)
        return replace(outcome, run_ms=outcome.run_ms or int((monotonic() - started) * 1000))

    async def _run(self, directory: Path, key: AttemptKey, spec: JobSpec, leash: Leash) -> Outcome:
        backend = self.choose(spec)
        workdir = directory / "work"
        await trio.to_thread.run_sync(_prepare, directory, workdir)
        try:
            item = await self._lay_inputs(workdir, key, spec)
        except Corrupt as error:
            # The bad copy was put aside; whoever else has it still has it right.
            log.warning("input.corrupt", job=key.job, task=key.task, error=str(error))
            await trio.to_thread.run_sync(remains.remove, directory)
            await trio.to_thread.run_sync(_prepare, directory, workdir)
            item = await self._lay_inputs(workdir, key, spec)
        execution = await self._execution(directory, workdir, key, spec, item, leash)
        outcome = await backend.run(execution)
        outcome = await self._collect(outcome, workdir, spec)
        outcome = await self._keep_logs(outcome, execution)
        return await self._replicate(outcome, spec)

    async def _leave(self, directory: Path) -> None:
        try:
            self._remains.send_nowait(directory)
        except trio.WouldBlock:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(remains.remove, directory)

    def choose(self, spec: JobSpec) -> Backend:
        """Raises Unavailable."""
        offered = self._offered()
        for name in spec.backend:
            if name in offered and name in self._backends:
                return self._backends[name]
        raise Unavailable(f"none of {', '.join(spec.backend)} works on this node any more")

    # --- before ------------------------------------------------------------------------------------------------------

    async def _lay_inputs(self, workdir: Path, key: AttemptKey, spec: JobSpec) -> str:
        """Everything as one tree, so that no path leaves the working directory, whoever wrote the spec."""
        item, entries = await self._item(key.task, spec)
        parts = [("", entries)]
        for wanted in spec.inputs:
            if isinstance(wanted.source, TreeRef):
                parts.append((wanted.path, (await self._tree(wanted.source)).entries))
            else:
                parts.append(("", [TreeEntry(wanted.path, wanted.source, wanted.executable)]))
        if any(entries for _, entries in parts):
            tree, missing = await trio.to_thread.run_sync(self._join, parts)
            if missing:
                await self._fetcher.fetch_many(missing, timeout_s=FETCH_S)
            await materialise(tree, workdir, self._store)
        return item

    def _join(self, parts: Sequence[tuple[str, Sequence[TreeEntry]]]) -> tuple[CheckedTree, list[BlobRef]]:
        """All of them as one tree, and what of it is not here (blocks: there may be 100,000 files). Raises InvalidRequest."""
        entries: list[TreeEntry] = []
        for path, below in parts:
            base = path.rstrip("/")
            is_root = base in ("", ".")
            entries += below if is_root else [replace(entry, path=f"{base}/{entry.path}") for entry in below]
        tree = Tree(tuple(sorted(entries)))
        return check_tree(tree), [ref for ref in refs_of(tree) if not self._store.has(ref.hash)]

    async def _item(self, task: int, spec: JobSpec) -> tuple[str, Sequence[TreeEntry]]:
        """A task's item, and the files that come with it."""
        items = spec.array.items
        if isinstance(items, ItemsFiles):
            entries = (await self._tree(items.tree)).entries[task * items.per_task : (task + 1) * items.per_task]
            return "\n".join(entry.path for entry in entries), entries
        lines = await self.lines(items.blob) if isinstance(items, ItemsBlob) else Lines()
        return item_of(task, spec, lines), []

    async def fetch(self, ref: BlobRef) -> None:
        if not self._store.has(ref.hash):
            try:
                await self._fetcher.fetch(ref, timeout_s=FETCH_S)
            except NotFound as error:
                raise Unavailable(f"no node that can be reached has blob {ref.hash}", hint=error.hint) from error

    async def _tree(self, ref: TreeRef) -> Tree:
        found = self._lists.get(ref.blob)
        if not isinstance(found, Tree):
            data = await self._bytes(ref.blob)
            found = await trio.to_thread.run_sync(lambda: unpack_tree(data, bytes_max=LIST_BYTES_MAX))
            self._remember(ref.blob, found)
        return found

    async def lines(self, ref: BlobRef) -> Lines:
        found = self._lists.get(ref)
        if not isinstance(found, Lines):
            found = await trio.to_thread.run_sync(Lines, await self._bytes(ref))
            self._remember(ref, found)
        return found

    async def _bytes(self, ref: BlobRef) -> bytes:
        if ref.size > LIST_BYTES_MAX:
            raise TooLarge(f"a list of {ref.size} bytes is over the limit of {LIST_BYTES_MAX}")
        await self.fetch(ref)
        return await self._store.get_bytes(ref, bytes_max=LIST_BYTES_MAX)

    def _remember(self, ref: BlobRef, value: Tree | Lines) -> None:
        self._lists[ref] = value
        while len(self._lists) > 1 and sum(kept.size for kept in self._lists) > LISTS_BYTES_KEPT:
            del self._lists[next(iter(self._lists))]

    async def _execution(
        self, directory: Path, workdir: Path, key: AttemptKey, spec: JobSpec, item: str, leash: Leash
    ) -> Execution:
        run = spec.run
        Strings(run).check(item)
        module = stdin = None
        if run.module is not None:
            await self.fetch(run.module)
            module = self._store.path(run.module.hash)
        match run.stdin:
            case BlobRef():
                stdin = directory / "stdin"
                await self.fetch(run.stdin)
                await self._store.export(run.stdin, stdin)
            case Inline(data):
                stdin = directory / "stdin"
                await trio.to_thread.run_sync(stdin.write_bytes, data)
        env = {
            **dict(run.env),
            "MESHD_JOB": key.job,
            "MESHD_TASK": str(key.task),
            "MESHD_ATTEMPT": str(key.attempt),
            "MESHD_FENCE": str(key.fence),
            "MESHD_ITEM": item,
            "MESHD_NODE": self._me,
        }
        return Execution(
            key=key,
            args=tuple(argument.replace("{item}", item) for argument in run.args),
            env=tuple(env.items()),
            workdir=workdir,
            stdout=directory / "stdout",
            stderr=directory / "stderr",
            stdin=stdin,
            module=module,
            module_hash=run.module.hash if run.module is not None else "",
            limits=limits_of(spec),
            needs=spec.needs.resources,
            leash=leash,
        )

    # --- after -------------------------------------------------------------------------------------------------------

    async def _collect(self, outcome: Outcome, workdir: Path, spec: JobSpec) -> Outcome:
        if not spec.outputs or not outcome.is_success:
            return outcome
        try:
            return replace(
                outcome,
                outputs=await collect(workdir, spec.outputs, self._store, inline_bytes_max=spec.inline_bytes_max),
            )
        except (InvalidRequest, NotFound) as error:
            # It said success but did not leave what it promised: its next try would not either.
            return replace(outcome, reason=EndReason.INVALID, message=str(error)[:2000])

    async def _keep_logs(self, outcome: Outcome, execution: Execution) -> Outcome:
        small = await trio.to_thread.run_sync(
            _read_small, (execution.stdout, execution.stderr), execution.limits.inline_bytes_max
        )
        stdout, stderr = [
            Inline(data) if data else None if data is not None else await self._store.put_file(path)
            for path, data in small
        ]
        return replace(outcome, stdout=stdout, stderr=stderr)

    async def keep(self, outcome: Outcome, stdout: Path | None, stderr: Path | None, spec: JobSpec) -> Outcome:
        """With these files as blobs, on as many disks as the job asks for; they are removed."""
        if stdout is not None:
            outcome = replace(outcome, stdout=await self._store.put_file(stdout))
        if stderr is not None:
            outcome = replace(outcome, stderr=await self._store.put_file(stderr))
        for path in (stdout, stderr):
            if path is not None:
                path.unlink(missing_ok=True)
        return await self._replicate(outcome, spec)

    async def _replicate(self, outcome: Outcome, spec: JobSpec) -> Outcome:
        """Waits as long as it takes: an outcome that rests on one disk is not told (protocol.md 6).

        Raises NotFound when one of its blobs is gone from this disk: only another attempt makes that again.
        """
        refs = [content for content in (outcome.stdout, outcome.stderr) if isinstance(content, BlobRef)]
        if isinstance(outcome.outputs, TreeRef):
            refs.append(outcome.outputs.blob)
            # Not remembered: nobody else here asks for it, and it would push out what the tasks of an array share.
            packed = await self._store.get_bytes(outcome.outputs.blob, bytes_max=LIST_BYTES_MAX)
            refs += await trio.to_thread.run_sync(lambda: refs_of(unpack_tree(packed, bytes_max=LIST_BYTES_MAX)))
        if not refs:
            return outcome
        while True:
            try:
                holders = await self._replicator.ensure(refs, spec.replicas, timeout_s=REPLICATE_S)
                return replace(outcome, holders=holders)
            except Unavailable as error:
                log.warning("outputs.not_replicated", blobs=len(refs), error=str(error))
                if gone := [ref.hash for ref in refs if not self._store.has(ref.hash)]:
                    raise NotFound(
                        f"blob {gone[0]} of this outcome is not on this disk any more",
                        hint="it was removed, or put aside as damaged: see the node's log",
                    ) from error
                await trio.sleep(REPLICATE_PAUSE_S)


def _prepare(directory: Path, workdir: Path) -> None:
    os.mkdir(directory, 0o700)
    os.mkdir(workdir, 0o700)


def _read_small(paths: Sequence[Path], bytes_max: int) -> list[tuple[Path, bytes | None]]:
    """Each with its bytes, or None when it has more than that."""
    return [(path, _small_bytes(path, bytes_max)) for path in paths]


def _small_bytes(path: Path, bytes_max: int) -> bytes | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return b""  # it was refused before it could say anything
    if size == 0:
        return b""
    return path.read_bytes() if size <= bytes_max else None


def _read(path: Path, offset: int, bytes_max: int) -> bytes:
    try:
        with path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), bytes_max, offset)
    except FileNotFoundError:
        return b""
