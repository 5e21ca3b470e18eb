"""What lies on this machine, made fit to travel: files by their size, directories as tar, job documents with references.

What only an upload needs is imported when there is one: the command line starts through here.
"""

from __future__ import annotations

import base64
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from meshd.errors import Corrupt, InvalidRequest, NotFound
from meshd.model import BlobRef, TreeRef

PIECE_BYTES = 1 << 18
INLINE_BYTES = 4096
_REFERENCES = ("blob:", "tree:", "job:")


class Store(Protocol):
    """Where things are uploaded to."""

    def put_file(self, path: Path) -> BlobRef: ...
    def put_directory(self, path: Path) -> TreeRef: ...


def upload_references(document: Any, base: Path, store: Store) -> Any:
    """The job document with every path in it (relative to `base`) uploaded and replaced by its reference.

    Raises NotFound for a path that is not there. What is wrong otherwise is left for the API to say.
    """
    from meshd.spec import write_blob, write_tree

    if not isinstance(document, Mapping):
        return document
    job = dict(document)
    if isinstance(run := job.get("run"), Mapping):
        job["run"] = run = dict(run)
        if _is_path(run.get("module")):
            run["module"] = write_blob(store.put_file(_existing(base, run["module"], "run.module")))
        if _is_path(run.get("stdin")):
            run["stdin"] = content_of(_existing(base, run["stdin"], "run.stdin"), store)
    if isinstance(inputs := job.get("inputs"), Mapping):
        job["inputs"] = {path: _input(base, path, source, store) for path, source in inputs.items()}
    if isinstance(array := job.get("array"), Mapping):
        job["array"] = array = dict(array)
        if _is_path(array.get("each_line")):
            lines = _existing(base, array["each_line"], "array.each_line")
            if lines.is_file() and not lines.stat().st_size:
                raise InvalidRequest(f"array.each_line: {lines} is empty", hint="a task for each of its lines would be none")  # fmt: skip
            array["each_line"] = write_blob(store.put_file(lines))
        if _is_path(array.get("files")):
            directory = _existing(base, array["files"], "array.files", "directory")
            if not directory.is_dir():
                raise InvalidRequest(
                    f"array.files: {directory} is not a directory", hint="for the lines of a file: each_line"
                )
            if not files_below(directory):
                raise InvalidRequest(f"array.files: there is no file below {directory}")
            array["files"] = write_tree(store.put_directory(directory))
    return job


def content_of(path: Path, store: Store) -> object:
    """Small files travel in the document, larger ones as blobs."""
    from meshd.spec import write_blob

    if path.stat().st_size <= INLINE_BYTES:
        return {"base64": base64.b64encode(path.read_bytes()).decode()}
    return write_blob(store.put_file(path))


def _input(base: Path, name: object, source: object, store: Store) -> object:
    from meshd.spec import write_blob, write_tree

    if isinstance(source, Mapping) and _is_path(source.get("from")):
        found = _input(base, name, source["from"], store)
        return {
            **(found if isinstance(found, Mapping) else {"from": found}),
            **{key: it for key, it in source.items() if key != "from"},
        }
    if not _is_path(source):
        return source
    path = _existing(base, source, f"inputs.{name}")
    if path.is_dir():
        return write_tree(store.put_directory(path))
    reference = write_blob(store.put_file(path))
    return {"from": reference, "executable": True} if os.access(path, os.X_OK) else reference


def _is_path(value: object) -> bool:
    return isinstance(value, str) and not value.startswith(_REFERENCES)


def _existing(base: Path, text: object, where: str, kind: str = "file") -> Path:
    path = base / Path(str(text)).expanduser()
    if not path.exists():
        raise NotFound(f"{where}: there is no {kind} {path}")
    if not (path.is_file() or path.is_dir()):
        raise InvalidRequest(f"{where}: {path} is neither a file nor a directory")
    return path


def files_below(directory: Path) -> list[Path]:
    """All plain files, links to such included, sorted."""
    found = [Path(where) / name for where, _, names in os.walk(directory) for name in names]
    return sorted(path for path in found if path.is_file())


def tar_of(directory: Path, files: list[Path], count: Callable[[int], None]) -> Iterator[bytes]:
    """The files as one tar, piece by piece; `count` is told the bytes of each. Raises InvalidRequest if one changes."""
    import tarfile

    for path in files:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            head = tarfile.TarInfo(path.relative_to(directory).as_posix())
            head.size = facts.st_size
            head.mode = 0o755 if facts.st_mode & stat.S_IXUSR else 0o644
            yield head.tobuf(tarfile.PAX_FORMAT)
            left = head.size
            while left:
                piece = file.read(min(PIECE_BYTES, left))
                if not piece:
                    raise InvalidRequest(f"{path} became shorter while it was uploaded", hint="upload it again when it is at rest")  # fmt: skip
                left -= len(piece)
                count(len(piece))
                yield piece
            yield bytes(-head.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def untar(chunks: Iterator[bytes], target: Path, tree: str) -> int:
    """Unpack what arrives below `target`; the number of files. Raises Corrupt."""
    import tarfile

    target.mkdir(parents=True, exist_ok=True)
    count = 0
    try:
        with tarfile.open(mode="r|", fileobj=_Reader(chunks)) as tar:  # type: ignore[call-overload]
            for member in tar:
                # The filter keeps whatever a node sends inside of `target`.
                tar.extract(member, target, filter="data")
                count += 1
    except tarfile.TarError as error:
        raise Corrupt(f"directory {tree} did not arrive whole: {error}") from error
    return count


class _Reader:
    """A stream of chunks as a file to read from."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def read(self, size: int) -> bytes:
        parts = [self._rest]
        have = len(self._rest)
        while have < size and (chunk := next(self._chunks, b"")):
            parts.append(chunk)
            have += len(chunk)
        data = b"".join(parts)
        self._rest = data[size:]
        return data[:size]
