"""What a person writes down as a job, made into the `JobSpec` that the mesh keeps. Nothing is guessed, nothing ignored.

The document is a mapping as YAML or JSON gives it (product.md shows one). Every wrong
key or value is an InvalidRequest that begins with its path, as in `run.args[2]: …`.
What is larger than a few KiB is named, not contained:

    blob:HASH:SIZE                         bytes, or a file
    tree:HASH:SIZE:FILES:BYTES             a directory
    {text: …} or {base64: …}               small bytes, up to 4 KiB

The API writes these long forms where a person wrote `blob:HASH`, `tree:HASH` or `job:ID`.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from meshd.errors import InvalidRequest, MeshError, TooLarge
from meshd.ids import is_job_id
from meshd.items import LIST_BYTES_MAX
from meshd.model import (
    INLINE_BYTES_MAX,
    TASKS_MAX,
    Array,
    BlobRef,
    Content,
    Inline,
    Input,
    ItemsBlob,
    ItemsFiles,
    ItemsInline,
    ItemsRange,
    JobSpec,
    Needs,
    OnLost,
    Resources,
    Retry,
    RetryOn,
    Run,
    Timeout,
    TreeRef,
)
from meshd.units import format_size, parse_duration_ms, parse_range, parse_size, shorten

T = TypeVar("T")

NAME_CHARS_MAX = 128
ITEMS_MAX = 10_000
"""Items written in the document itself; a longer list is a file, by `each_line`."""
ENTRIES_MAX = 256
"""Of `env`, `labels` and `needs` each. Every voter holds them, and 80,000 fit into a request."""
INPUTS_MAX = 1024
"""More files than that are a directory."""

MEMORY_BYTES_MIN = {"process": 1 << 20, "wasm": 1 << 16}
"""`echo` was seen to need 120 KiB of data, bash 300, Python 3.7 MiB; a page of wasm is 64 KiB."""

_LATER = {
    "schedule", "requires", "unique", "cache", "runtime", "network", "networks", "tenant", "workflow", "volumes",
    "run.secrets", "timeout.idle", "array.from_json",
}  # fmt: skip
"""Promised by the design and not built yet: refused, so that nobody believes that they work."""

_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._+@-]{{0,{NAME_CHARS_MAX - 1}}}")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_BACKEND = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_ENV = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
_BLOB = re.compile(r"blob:([0-9a-f]{64}):(\d{1,15})", re.ASCII)
_TREE = re.compile(r"tree:([0-9a-f]{64}):(\d{1,15}):(\d{1,15}):(\d{1,15})", re.ASCII)


def parse_job(document: object) -> JobSpec:
    """The job that `document` describes. Raises InvalidRequest (and nothing else) naming what is wrong and where."""
    job = _Section(document, "")
    run = _run(job.section("run"))
    backend = job.take("backend", _backends, ("process",) if run.module is None else ("wasm",))
    spec = JobSpec(
        backend=backend,
        run=run,
        name=job.take("name", _name, ""),
        inputs=job.take("inputs", _inputs, ()),
        outputs=job.take("outputs", _outputs, ()),
        array=job.take("array", _array, Array()),
        needs=job.take("needs", _needs, Needs()),
        retry=job.take("retry", _retry, Retry()),
        timeout=job.take("timeout", _timeout, Timeout()),
        on_lost=job.take("on_lost", _one_of(OnLost), OnLost.RERUN),
        lost_after_ms=job.take("lost_after", _lost_after, None),
        priority=job.take("priority", _whole(0, 100), 50),
        replicas=job.take("replicas", _whole(1, 16), 2),
        output_bytes_max=job.take("output_max", _size, 64 << 20),
        labels=job.take("labels", _labels, ()),
    )
    job.finish()
    if "wasm" in backend and run.module is None:
        raise InvalidRequest("run.module: missing; backend wasm runs a module", hint="or use backend: process")
    if "process" in backend and not run.args:
        raise InvalidRequest("run.args: missing; backend process runs the command that they are")
    if "process" in backend and not run.args[0]:
        raise InvalidRequest("run.args[0]: empty; it names the command")
    if run.fuel is not None and backend == ("process",):
        raise InvalidRequest("run.fuel: only backend wasm counts it", hint="timeout.run bounds a command")
    _check_memory(spec.needs.resources.memory, backend)
    return _checked(spec)


def _check_memory(memory: int, backends: tuple[str, ...]) -> None:
    """None is no limit; so little that nothing starts is a unit forgotten, and would end as a crash without a word."""
    for name in backends:
        least = MEMORY_BYTES_MIN.get(name, 0)
        if 0 < memory < least:
            amount = "1 byte is" if memory == 1 else f"{memory} bytes are"
            raise InvalidRequest(
                f"needs.memory: {amount} below {format_size(least)}, the least that backend {name} can run in",
                hint="write the unit, as 64Mi or 1Gi",
            )


def parse_content(text: object, path: str) -> Content:
    """`blob:HASH:SIZE`, `{text: …}` or `{base64: …}`. Raises InvalidRequest."""
    if isinstance(text, str):
        if match := _BLOB.fullmatch(text):
            return BlobRef(match[1], int(match[2]))
        if text.startswith(("blob:", "tree:", "job:")):
            raise InvalidRequest(f"{path}: {shorten(text)} is not blob:HASH:SIZE")
        raise InvalidRequest(
            f"{path}: {shorten(text)} is a file on your machine, not in the mesh",
            hint="`mesh submit` uploads it; over HTTP, PUT it to /v1/blobs and write blob:HASH:SIZE here",
        )
    fields = _Section(text, path)
    if "text" in fields:
        data = fields.take("text", _string, "").encode("utf-8", "surrogateescape")
    elif "base64" in fields:
        data = fields.take("base64", _base64, b"")
    else:
        raise InvalidRequest(f"{path}: needs one of: text, base64")
    fields.finish()
    if len(data) > INLINE_BYTES_MAX:
        raise InvalidRequest(f"{path}: {len(data)} bytes are over the {INLINE_BYTES_MAX} that fit here; make it a blob")
    return Inline(data)


def parse_tree(text: object, path: str) -> TreeRef:
    """`tree:HASH:SIZE:FILES:BYTES`. Raises InvalidRequest."""
    match = _TREE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise InvalidRequest(f"{path}: {shorten(text)} is not tree:HASH:SIZE:FILES:BYTES")
    return TreeRef(BlobRef(match[1], int(match[2])), int(match[3]), int(match[4]))


def write_blob(ref: BlobRef) -> str:
    return f"blob:{ref.hash}:{ref.size}"


def write_tree(ref: TreeRef) -> str:
    return f"tree:{ref.blob.hash}:{ref.blob.size}:{ref.files}:{ref.bytes_total}"


def check_path(text: object, path: str, *, is_root_ok: bool = False) -> str:
    """A relative POSIX path that cannot leave its directory, without a trailing slash. Raises InvalidRequest."""
    if not isinstance(text, str):
        raise InvalidRequest(f"{path}: expected a path, got {_kind(text)}")
    parts = text.rstrip("/").split("/")
    if is_root_ok and text in (".", "./"):
        return ""
    if not text or text.startswith("/") or "\0" in text or len(text) > 4096 or not _is_utf8(text):
        raise InvalidRequest(f"{path}: {shorten(text)} is not a relative path")
    if any(part in ("", ".", "..") for part in parts):
        raise InvalidRequest(f"{path}: {shorten(text)} may not contain empty parts, `.` or `..`")
    return "/".join(parts)


# --- the sections -------------------------------------------------------------------------------------------------------


def _run(run: _Section) -> Run:
    found = Run(
        args=run.take("args", _list_of(_argument, 4096), ()),
        module=run.take("module", _module, None),
        env=run.take("env", _environment, ()),
        stdin=run.take("stdin", parse_content, None),
        fuel=run.take("fuel", _whole(1, 2**53), None),
    )
    run.finish()
    if not found.args and found.module is None:
        raise InvalidRequest("run: needs args (a command) or module (wasm)")
    return found


def _module(value: object, path: str) -> BlobRef:
    content = parse_content(value, path)
    if not isinstance(content, BlobRef):
        raise InvalidRequest(f"{path}: must be a blob")
    return content


def _environment(value: object, path: str) -> tuple[tuple[str, str], ...]:
    found = {}
    for name, text in _mapping(value, path, ENTRIES_MAX).items():
        if not isinstance(name, str) or not _ENV.fullmatch(name):
            raise InvalidRequest(f"{path}: {shorten(name)} is not a name for a variable")
        if name.startswith("MESHD_"):
            raise InvalidRequest(f"{path}.{name}: names beginning with MESHD_ are the mesh's own")
        found[name] = _argument(text, f"{path}.{name}")
    return tuple(sorted(found.items()))


def _inputs(value: object, path: str) -> tuple[Input, ...]:
    found: dict[str, Input] = {}
    for name, source in _mapping(value, path, INPUTS_MAX).items():
        here = f"{path}.{shorten(name)[1:-1]}"
        is_tree = isinstance(source, str) and source.startswith("tree:")
        executable = False
        if isinstance(source, Mapping) and "from" in source:
            fields = _Section(source, here)
            source = fields.take("from", lambda inner, _: inner, None)
            executable = fields.take("executable", _boolean, False)
            fields.finish()
            is_tree = isinstance(source, str) and source.startswith("tree:")
        target = check_path(name, here, is_root_ok=is_tree)
        if target in found:
            raise InvalidRequest(f"{here}: {target!r} is named twice")
        content = parse_tree(source, here) if is_tree else parse_content(source, here)
        found[target] = Input(target, content, executable)
    above = None
    # In the order of their parts, for which the NUL stands, whatever lies below a path follows it at once.
    for target in sorted(found, key=lambda target: target.replace("/", "\0")):
        if above is not None and target.startswith(above + "/"):
            raise InvalidRequest(f"{path}.{target}: {above!r} is a file, so nothing can lie below it")
        if not isinstance(found[target].source, TreeRef):
            above = target
    return tuple(found[name] for name in sorted(found))


def _outputs(value: object, path: str) -> tuple[str, ...]:
    def one(item: object, here: str) -> str:
        checked = check_path(item, here)
        return checked + "/" if isinstance(item, str) and item.endswith("/") else checked

    return tuple(dict.fromkeys(_list_of(one, 256)(value, path)))


def _array(value: object, path: str) -> Array:
    """A mapping; or short `10` (tasks 0 to 9), `1-100` or `1-100:2%50` (at most 50 at once)."""
    limit = ""
    if isinstance(value, str):
        value, _, limit = value.partition("%")
    if not isinstance(value, Mapping):
        value = {"range": value}
    fields = _Section(value, path)
    count, items = _items(fields)
    at_once = fields.take("at_once", _whole(1, TASKS_MAX), 0)
    max_fails = fields.take("max_fails", _whole(0, TASKS_MAX), 0)
    fields.finish()
    if not 1 <= count <= TASKS_MAX:
        raise InvalidRequest(f"{path}: {count} tasks; it can be 1 to {TASKS_MAX}")
    return Array(count, items, _at(path, _limit, limit) if limit else at_once, max_fails)


def _items(fields: _Section) -> tuple[int, ItemsRange | ItemsInline | ItemsBlob | ItemsFiles]:
    """How many tasks, and what each one's item is."""
    forms = [form for form in ("range", "items", "each_line", "files") if form in fields]
    if len(forms) != 1:
        raise InvalidRequest(f"{fields.path}: needs exactly one of: range, items, each_line, files")
    match forms[0]:
        case "range":
            first, last, step = fields.take("range", _range, (0, 0, 1))
            return (last - first) // step + 1, ItemsRange(first, step)
        case "items":
            items = fields.take("items", _list_of(_argument, ITEMS_MAX), ())
            return len(items), ItemsInline(items)
        case "each_line":
            lines = fields.take("each_line", _lines, None)
            return fields.take("count", _whole(1, TASKS_MAX), 0), ItemsBlob(lines)
        case _:
            tree = fields.take("files", parse_tree, None)
            per_task = fields.take("per_task", _whole(1, 100_000), 1)
            return -(-tree.files // per_task), ItemsFiles(tree, per_task)


def _lines(value: object, path: str) -> BlobRef:
    blob = _module(value, path)
    if blob.size > LIST_BYTES_MAX:
        raise TooLarge(
            f"{path}: a list of {blob.size} bytes is over the limit of {LIST_BYTES_MAX}", hint="make it several jobs"
        )
    return blob


def _range(value: object, path: str) -> tuple[int, int, int]:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise InvalidRequest(f"{path}: expected a range like 1-100 or a number of tasks, got {_kind(value)}")
    if isinstance(value, int):
        return 0, _whole(1, TASKS_MAX)(value, path) - 1, 1
    return _at(path, parse_range, value)


def _limit(text: str) -> int:
    if not re.fullmatch(r"\d{1,8}", text, re.ASCII) or not int(text):
        raise InvalidRequest(f"%{shorten(text)[1:-1]} is not how many run at once")
    return int(text)


def _needs(value: object, path: str) -> Needs:
    fields = _Section(_mapping(value, path, ENTRIES_MAX), path, is_open=True)
    labels = fields.take("labels", _string, "")
    resources = Resources(
        cpu_milli=fields.take("cpu", _cpu, 1000),
        memory=fields.take("memory", _size, 0),
        disk=fields.take("disk", _size, 0),
        gpu=fields.take("gpu", _whole(0, 10_000), 0),
        custom=tuple(sorted((name, fields.take(name, _whole(0, 2**53), 0)) for name in fields.rest(_NAME))),
    )
    return Needs(resources, labels)


def _cpu(value: object, path: str) -> int:
    """Cores, as 1, 0.5 or 500m; thousandths."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}m", value, re.ASCII):
        return int(value[:-1])
    try:
        cores = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else -1.0
    except (ValueError, OverflowError):
        cores = -1.0
    if not 0 <= cores <= 1_000_000:
        raise InvalidRequest(f"{path}: {shorten(value)} is not a number of cores", hint="write it like 1, 0.5 or 500m")
    return round(cores * 1000)


def _retry(value: object, path: str) -> Retry:
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"attempts": value}
    fields = _Section(value, path)
    default = Retry()
    low, high = fields.take("backoff", _backoff, (default.backoff_min_ms, default.backoff_max_ms))
    found = Retry(
        attempts=fields.take("attempts", _whole(1, 1000), default.attempts),
        backoff_min_ms=low,
        backoff_max_ms=high,
        on=fields.take("on", _retry_on, default.on),
        crash_limit=fields.take("crash_limit", _whole(1, 1000), default.crash_limit),
    )
    fields.finish()
    return found


def _backoff(value: object, path: str) -> tuple[int, int]:
    low_text, dots, high_text = value.partition("..") if isinstance(value, str) else (value, "", "")
    low = _duration(low_text, path)
    high = _duration(high_text, path) if dots else low
    if high < low:
        raise InvalidRequest(f"{path}: {shorten(value)} ends before it begins")
    return low, high


def _retry_on(value: object, path: str) -> tuple[RetryOn, ...]:
    def one(item: object, here: str) -> RetryOn:
        if item == "lost":
            raise InvalidRequest(
                f"{here}: a lost node is the matter of on_lost and retry.crash_limit, leave `lost` out"
            )
        return _one_of(RetryOn)(item, here)

    return tuple(dict.fromkeys(_list_of(one, 16)(value, path)))


def _timeout(value: object, path: str) -> Timeout:
    if isinstance(value, str | int | float):
        value = {"run": value}
    fields = _Section(value, path)
    found = Timeout(
        run_ms=fields.take("run", _duration, 0),
        queue_ms=fields.take("queue", _duration, 0),
        total_ms=fields.take("total", _duration, 0),
    )
    fields.finish()
    return found


def _lost_after(value: object, path: str) -> int | None:
    return None if value == "auto" else _duration(value, path)


def _backends(value: object, path: str) -> tuple[str, ...]:
    names = _list_of(_string, 16)([value] if isinstance(value, str) else value, path)
    for name in names:
        if not _BACKEND.fullmatch(name):
            raise InvalidRequest(f"{path}: {shorten(name)} is not the name of a backend")
    if not names:
        raise InvalidRequest(f"{path}: names none")
    return tuple(dict.fromkeys(names))


def _name(value: object, path: str) -> str:
    text = _string(value, path)
    if len(text) > NAME_CHARS_MAX:
        raise InvalidRequest(f"{path}: {len(text)} characters; at most {NAME_CHARS_MAX}")
    if text == "last":
        raise InvalidRequest(f"{path}: 'last' is what the newest job is called", hint="take another name")
    if not _NAME.fullmatch(text):
        raise InvalidRequest(f"{path}: {shorten(text)} is not a name", hint="letters, digits and . _ + @ -")
    if is_job_id(text):
        raise InvalidRequest(f"{path}: {shorten(text)} is not a name: it looks like the id of a job")
    return text


def _labels(value: object, path: str) -> tuple[tuple[str, str], ...]:
    found = {}
    for name, text in _mapping(value, path, ENTRIES_MAX).items():
        if not isinstance(name, str) or not _LABEL.fullmatch(name):
            raise InvalidRequest(f"{path}: {shorten(name)} is not a name for a label")
        found[name] = _argument(text, f"{path}.{name}")
        if len(found[name]) > 256:
            raise InvalidRequest(f"{path}.{name}: over 256 characters")
    return tuple(sorted(found.items()))


# --- values -------------------------------------------------------------------------------------------------------------

_Parser = Callable[[object, str], T]


class _Section:
    """A mapping whose keys are taken one by one, so that what is left over is a mistake."""

    def __init__(self, value: object, path: str, *, is_open: bool = False) -> None:
        self.path = path
        self._fields = dict(_mapping(value, path or "job"))
        self._known: list[str] = []
        self._is_open = is_open

    def __contains__(self, key: object) -> bool:
        return key in self._fields

    def take(self, key: str, parser: _Parser[T], default: T | Any) -> T:
        self._known.append(key)
        value = self._fields.pop(key, None)
        return default if value is None else parser(value, self._join(key))

    def section(self, key: str) -> _Section:
        self._known.append(key)
        if key not in self._fields:
            raise InvalidRequest(f"{self._join(key)}: missing", hint="for example run: {args: [echo, hello]}")
        return _Section(self._fields.pop(key), self._join(key))

    def rest(self, name: re.Pattern[str]) -> list[str]:
        """The keys nobody took, each a name that the user chose."""
        for key in self._fields:
            if not isinstance(key, str) or not name.fullmatch(key):
                raise InvalidRequest(f"{self.path}: {shorten(key)} is not a name")
        return [str(key) for key in self._fields]

    def finish(self) -> None:
        for key in self._fields:
            path = self._join(shorten(key)[1:-1])
            if path in _LATER:
                raise InvalidRequest(f"{path}: not supported yet")
            raise InvalidRequest(f"{path}: no such key", hint=did_you_mean(shorten(key)[1:-1], self._known))

    def _join(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean `needs`?`, or what there is."""
    from difflib import get_close_matches

    known = list(known)
    close = get_close_matches(word[:100], known, 1)
    return f"did you mean `{close[0]}`?" if close else f"there are: {', '.join(known)}"


def _mapping(value: object, path: str, length_max: int | None = None) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{path}: expected a mapping, got {_kind(value)}")
    if length_max is not None and len(value) > length_max:
        raise InvalidRequest(f"{path}: {len(value)} entries; at most {length_max}")
    return value


def _list_of(parser: _Parser[T], length_max: int) -> _Parser[tuple[T, ...]]:
    def parse(value: object, path: str) -> tuple[T, ...]:
        if not isinstance(value, list | tuple):
            raise InvalidRequest(f"{path}: expected a list, got {_kind(value)}")
        if len(value) > length_max:
            raise InvalidRequest(f"{path}: {len(value)} entries; at most {length_max}")
        return tuple(parser(item, f"{path}[{place}]") for place, item in enumerate(value))

    return parse


def _one_of(kind: Callable[[Any], T]) -> _Parser[T]:
    def parse(value: object, path: str) -> T:
        try:
            return kind(value)
        except ValueError:
            names = [str(member) for member in kind]  # type: ignore[attr-defined]
            hint = did_you_mean(value, names) if isinstance(value, str) else ""
            raise InvalidRequest(f"{path}: {shorten(value)} is not one of {', '.join(names)}", hint=hint) from None

    return parse


def _whole(low: int, high: int) -> _Parser[int]:
    def parse(value: object, path: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidRequest(f"{path}: expected a whole number, got {_kind(value)}")
        if not low <= value <= high:
            raise InvalidRequest(f"{path}: {shorten(value)} is not between {low} and {high}")
        return value

    return parse


def _string(value: object, path: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{path}: expected text, got {_kind(value)}")
    if not _is_utf8(value):
        raise InvalidRequest(f"{path}: not UTF-8")
    return value


def _argument(value: object, path: str) -> str:
    """Text; a plain number is taken as it would be written, true and false are not (YAML makes them of yes and no)."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InvalidRequest(f"{path}: expected text, got {_kind(value)}", hint="put it in quotes")
    try:
        text = str(value)
    except ValueError:  # an int of over 4,300 digits
        raise InvalidRequest(f"{path}: number too large") from None
    if "\0" in text:
        raise InvalidRequest(f"{path}: contains a NUL byte")
    return _string(text, path)


def _boolean(value: object, path: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{path}: expected true or false, got {_kind(value)}")
    return value


def _base64(value: object, path: str) -> bytes:
    try:
        return base64.b64decode(_string(value, path), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"{path}: not base64") from None


def _size(value: object, path: str) -> int:
    return _at(path, parse_size, _scalar(value, path))


def _duration(value: object, path: str) -> int:
    return _at(path, parse_duration_ms, _scalar(value, path))


def _scalar(value: object, path: str) -> str | int | float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InvalidRequest(f"{path}: expected a number with a unit, got {_kind(value)}")
    return value


def _at(path: str, parser: Callable[[Any], T], value: object) -> T:
    try:
        return parser(value)
    except OverflowError:
        raise InvalidRequest(f"{path}: number too large") from None
    except MeshError as error:
        raise InvalidRequest(f"{path}: {error.message}", hint=error.hint) from None


def _checked(spec: JobSpec) -> JobSpec:
    """The bounds of the model's own fields, which building a struct does not check."""
    try:
        return msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=JobSpec)
    except (msgspec.MsgspecError, UnicodeError, OverflowError) as error:
        raise InvalidRequest(f"job: {error}") from error


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "a mapping"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
