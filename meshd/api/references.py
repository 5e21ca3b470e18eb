"""What a submission refers to: short references are completed, and everything it names is found before it is agreed.

blob:HASH        → blob:HASH:SIZE
tree:HASH        → tree:HASH:SIZE:FILES:BYTES
job:SELECTOR     → the tree of what that finished job's tasks left behind, task k's files under k/
array.each_line  → with the number of its lines
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from heapq import merge
from typing import Annotated

import trio
from msgspec import Meta, Raw, Struct

from meshd import codec
from meshd.api.endpoint import QUERY_S
from meshd.api.face import Face
from meshd.errors import Conflict, InvalidRequest, NotFound, TooLarge
from meshd.items import LIST_BYTES_MAX, LineCount
from meshd.model import BlobRef, ItemsBlob, ItemsFiles, JobSpec, TaskState, Tree, TreeEntry, TreeRef
from meshd.spec import INPUTS_MAX, write_blob, write_tree
from meshd.views import PAGE_MAX, GetJob, JobView, ListTasks, TaskPage

TREE_BYTES_MAX = 32 << 20
"""Of a tree's own listing: some 200,000 files."""
TREE_FILES_MAX = 200_000
TREE_REPLICAS = 2
RUN = 10_000
"""Entries that are sorted at once: a few ms."""

_THREADS = trio.CapacityLimiter(2)
"""For the lists of trees: of a large one there are some 100 MiB in memory."""

_SHORT_BLOB = re.compile(r"blob:([0-9a-f]{64})")
_SHORT_TREE = re.compile(r"tree:([0-9a-f]{64})")


async def resolve(face: Face, document: object) -> object:
    """The document with every reference in its long form; other mistakes are left for `parse_job` to name.

    Raises NotFound, InvalidRequest (not a tree), Conflict (the job has not finished), Unavailable.
    """
    if not isinstance(document, Mapping):
        return document
    job = dict(document)
    if isinstance(run := job.get("run"), Mapping):
        job["run"] = run = dict(run)
        for key in ("module", "stdin"):
            if key in run:
                run[key] = await _complete(face, run[key])
    if isinstance(inputs := job.get("inputs"), Mapping) and len(inputs) <= INPUTS_MAX:
        job["inputs"] = {path: await _complete_input(face, source) for path, source in inputs.items()}
    if isinstance(array := job.get("array"), Mapping):
        job["array"] = array = dict(array)
        if "files" in array:
            array["files"] = await _complete(face, array["files"])
        if "each_line" in array:
            array["each_line"] = await _complete(face, array["each_line"])
            if "count" not in array and isinstance(array["each_line"], str):
                array["count"] = await _count_lines(face, array["each_line"])
    return job


async def _complete_input(face: Face, source: object) -> object:
    if isinstance(source, Mapping) and "from" in source:
        return {**source, "from": await _complete(face, source["from"])}
    return await _complete(face, source)


async def _complete(face: Face, text: object) -> object:
    if not isinstance(text, str):
        return text
    if match := _SHORT_BLOB.fullmatch(text):
        view = await face.blob_where(match[1])
        return write_blob(BlobRef(view.hash, view.size))
    if match := _SHORT_TREE.fullmatch(text):
        return write_tree((await describe_tree(face, match[1]))[0])
    if text.startswith("job:"):
        job = await face.query(GetJob(text[4:260]), JobView, timeout_s=QUERY_S)
        return write_tree(await outputs_tree(face, job))
    return text


async def _count_lines(face: Face, text: str) -> int:
    count, size = LineCount(), 0
    async with aclosing(face.get_blob(text.split(":")[1])) as chunks:
        async for chunk in chunks:
            count.add(chunk)
            size += len(chunk)
            if size > LIST_BYTES_MAX:  # whatever the reference says
                raise TooLarge(f"array.each_line: a list over the limit of {LIST_BYTES_MAX} bytes")
    return count.lines


# --- trees --------------------------------------------------------------------------------------------------------------


class _Listing(Struct, frozen=True, gc=False):
    """A tree whose entries are still bytes. One call for all of a large one would keep the interpreter from the loop for
    half a second; entry by entry it takes longer and stops nobody."""

    entries: Annotated[tuple[Raw, ...], Meta(max_length=TREE_FILES_MAX)]


async def describe_tree(face: Face, blob: str) -> tuple[TreeRef, Tree]:
    """The tree that this blob lists. Raises NotFound, InvalidRequest when it lists none, TooLarge."""
    data = await read_blob(face, blob, bytes_max=TREE_BYTES_MAX)

    def decode() -> tuple[TreeRef, Tree]:
        listing: _Listing = codec.decode(data, _Listing, bytes_max=TREE_BYTES_MAX)
        tree = Tree(tuple(codec.decode(entry, TreeEntry) for entry in listing.entries))
        return TreeRef(BlobRef(blob, len(data)), len(tree.entries), sum(map(size_of, tree.entries))), tree

    try:
        return await trio.to_thread.run_sync(decode, limiter=_THREADS)
    except InvalidRequest as error:
        raise InvalidRequest(
            f"blob {blob} is not a directory of at most {TREE_FILES_MAX} files", hint="a file is named as blob:HASH"
        ) from error


async def store_tree(face: Face, entries: list[TreeEntry], *, replicas: int) -> TreeRef:
    if len(entries) > TREE_FILES_MAX:
        raise TooLarge(f"a directory of {len(entries)} files is over the limit of {TREE_FILES_MAX}")

    def encode() -> tuple[bytes, int]:
        listing = _Listing(tuple(Raw(codec.encode(entry)) for entry in _in_order(entries)))
        return codec.encode(listing), sum(map(size_of, entries))

    data, bytes_total = await trio.to_thread.run_sync(encode, limiter=_THREADS)
    if len(data) > TREE_BYTES_MAX:
        raise TooLarge(f"a directory whose list takes {len(data)} bytes is over the limit of {TREE_BYTES_MAX}")
    view = await face.put_blob(once(data), replicas=replicas)
    return TreeRef(BlobRef(view.hash, view.size), len(entries), bytes_total)


def _in_order(entries: list[TreeEntry]) -> Iterable[TreeEntry]:
    """By path, in steps as well."""
    runs = [sorted(entries[start : start + RUN], key=_path) for start in range(0, len(entries), RUN)]
    return merge(*runs, key=_path)


def _path(entry: TreeEntry) -> str:
    return entry.path


async def outputs_tree(face: Face, job: JobView) -> TreeRef:
    """What the done tasks of a finished job left, task k's files under `k/`. Raises Conflict, NotFound, TooLarge."""
    if not job.is_final:
        raise Conflict(f"job {job.id} has not finished: it is {job.state}", hint=f"mesh job wait {job.id}")
    if not job.spec.outputs:
        raise NotFound(f"job {job.id} keeps no files", hint="its spec names none under `outputs`")
    entries: list[TreeEntry] = []

    def add(number: int, tree: Tree) -> None:
        entries.extend(TreeEntry(f"{number}/{it.path}", it.content, it.executable) for it in tree.entries)

    start: int | None = 0
    while start is not None:
        query = ListTasks(job.id, (TaskState.DONE,), start, None, PAGE_MAX)
        page = await face.query(query, TaskPage, timeout_s=QUERY_S)
        for task in page.tasks:
            outputs = task.outcome.outputs if task.outcome is not None else None
            if outputs is None:
                continue
            if isinstance(outputs, TreeRef):
                _, tree = await describe_tree(face, outputs.blob.hash)
                await trio.to_thread.run_sync(add, task.task, tree, limiter=_THREADS)
            else:
                add(task.task, codec.decode(outputs.data, Tree))
            if len(entries) > TREE_FILES_MAX:
                raise TooLarge(f"job {job.id} left over {TREE_FILES_MAX} files", hint="read them task by task")
        start = page.next
    return await store_tree(face, entries, replicas=TREE_REPLICAS)


async def collect_refs(face: Face, spec: JobSpec) -> list[BlobRef]:
    """Every blob that the job needs to run, those inside its trees too, each once."""
    found: dict[str, BlobRef] = {}
    trees: list[TreeRef] = []
    named: list[object] = [spec.run.module, spec.run.stdin, *(given.source for given in spec.inputs)]
    match spec.array.items:
        case ItemsBlob(blob):
            named.append(blob)
        case ItemsFiles(files):
            named.append(files)
        case _:
            pass
    for source in named:
        if isinstance(source, BlobRef):
            found[source.hash] = source
        elif isinstance(source, TreeRef):
            found[source.blob.hash] = source.blob
            trees.append(source)
    for ref in trees:
        known, tree = await describe_tree(face, ref.blob.hash)
        if known != ref:
            raise InvalidRequest(f"{write_tree(ref)} is in truth {write_tree(known)}")
        found |= await trio.to_thread.run_sync(_refs_in, tree, limiter=_THREADS)
    return list(found.values())


def _refs_in(tree: Tree) -> dict[str, BlobRef]:
    return {it.content.hash: it.content for it in tree.entries if isinstance(it.content, BlobRef)}


def size_of(entry: TreeEntry) -> int:
    return entry.content.size if isinstance(entry.content, BlobRef) else len(entry.content.data)


async def read_blob(face: Face, blob: str, *, bytes_max: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    async with aclosing(face.get_blob(blob)) as chunks:
        async for chunk in chunks:
            size += len(chunk)
            if size > bytes_max:
                raise TooLarge(f"blob {blob} is over {bytes_max} bytes, too large to be read as a whole")
            parts.append(chunk)
    return b"".join(parts)


async def once(data: bytes) -> AsyncGenerator[bytes, None]:
    for start in range(0, len(data), 1 << 20):
        yield data[start : start + (1 << 20)]
