"""Modules, compiled once per machine and linked once per runner. Runs inside a runner, never in the agent.

Compiled code is native code, so an entry counts only if this user alone could have
written it and its digest agrees; wasmtime itself would run whatever it is handed. The
key names everything that the code depends on, so a new wasmtime, another CPU or other
settings are simply a miss. A broken entry is a miss too, and is replaced.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import stat
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import wasmtime

MODULE_BYTES_MAX = 256 << 20
"""Larger than any toolchain's output we know; compiling needs some ten times as much memory."""

MODULES_MAX = 32
"""Linked modules that a runner keeps; beyond that the one unused for longest is loaded again when needed (0.2 ms)."""

CACHE_BYTES_MAX = 1 << 30
"""On disk. Beyond it the entries unused for longest go."""

WASI = "wasi_snapshot_preview1"

_MAGIC = b"\0asm"
_CORE_VERSION = b"\x01\x00\x00\x00"
_ENTRY_MAGIC = b"meshd-wasm-1\n"
_DIGEST_BYTES = 32


class Refused(Exception):
    """This module can never run here; the message is for its author."""


class Exited(Exception):
    """The guest called proc_exit. wasmtime's own refuses codes above 125; ours takes them all."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True, slots=True)
class Linked:
    """Ready to instantiate."""

    engine: wasmtime.Engine
    instance_pre: wasmtime.InstancePre


class Modules:
    def __init__(self, directory: Path, *, wasmtime_version: str) -> None:
        """A `directory` that is not private is left alone, and everything compiled anew."""
        self._directory = directory if _is_private(directory) else None
        self._version = wasmtime_version
        self._linked: OrderedDict[tuple[str, bool], Linked] = OrderedDict()
        self._engines: dict[bool, tuple[wasmtime.Engine, wasmtime.Linker]] = {}

    def get(self, path: str, name: str, *, with_fuel: bool) -> Linked:
        """The module in the file `path`, whose hash is `name` ("" when unknown). Raises Refused, OSError."""
        key = (name or path, with_fuel)
        if (linked := self._linked.get(key)) is not None:
            self._linked.move_to_end(key)
            return linked
        engine, linker = self._engine(with_fuel)
        module = self._load(engine, path, name, with_fuel)
        _check_exports(module)
        _check_imports(module)
        try:
            linked = Linked(engine, linker.instantiate_pre(module))
        except wasmtime.WasmtimeError as error:
            raise Refused(f"the module cannot be linked: {error}") from error
        if name:
            self._linked[key] = linked
            if len(self._linked) > MODULES_MAX:
                self._linked.popitem(last=False)
        return linked

    def _engine(self, with_fuel: bool) -> tuple[wasmtime.Engine, wasmtime.Linker]:
        found = self._engines.get(with_fuel)
        if found is None:
            config = wasmtime.Config()
            config.epoch_interruption = True
            config.consume_fuel = with_fuel
            # Both would get around the memory limit, which is per memory and does not cover shared ones.
            config.wasm_multi_memory = False
            config.shared_memory = False
            engine = wasmtime.Engine(config)
            linker = wasmtime.Linker(engine)
            linker.define_wasi()
            linker.allow_shadowing = True
            linker.define_func(WASI, "proc_exit", wasmtime.FuncType([wasmtime.ValType.i32()], []), _exit)
            found = self._engines[with_fuel] = (engine, linker)
        return found

    def _load(self, engine: wasmtime.Engine, path: str, name: str, with_fuel: bool) -> wasmtime.Module:
        if self._directory is None or not name:
            return _compile(engine, path)
        entry = self._directory / f"{_cache_key(name, self._version, with_fuel)}.bin"
        module = _read_entry(engine, entry)
        if module is not None:
            return module
        # One compilation at a time: it uses all cores anyway, and whoever waited finds the entry.
        with _locked(self._directory):
            module = _read_entry(engine, entry)
            if module is None:
                module = _compile(engine, path)
                _write_entry(entry, bytes(module.serialize()))
        return module


def _cache_key(name: str, wasmtime_version: str, with_fuel: bool) -> str:
    """Everything that compiled code depends on. Bump the version when the engine's settings change."""
    parts = ("settings-1", name, wasmtime_version, f"fuel={with_fuel}", platform.machine(), _cpu())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _compile(engine: wasmtime.Engine, path: str) -> wasmtime.Module:
    size = os.stat(path).st_size
    if size > MODULE_BYTES_MAX:
        raise Refused(f"the module has {size} bytes; the limit is {MODULE_BYTES_MAX}")
    binary = Path(path).read_bytes()
    if binary[:4] != _MAGIC:
        raise Refused(f"not a WebAssembly module: it begins with {binary[:8]!r} instead of {_MAGIC!r}")
    if binary[4:8] != _CORE_VERSION:
        raise Refused("this is a WebAssembly component or of an unknown version; compile for wasm32-wasi (preview 1)")
    try:
        return wasmtime.Module(engine, binary)
    except wasmtime.WasmtimeError as error:
        raise Refused(f"not a valid WebAssembly module: {' '.join(str(error).split())}") from error


def _check_exports(module: wasmtime.Module) -> None:
    for export in module.exports:
        if export.name == "_start" and isinstance(export.type, wasmtime.FuncType):
            if export.type.params or export.type.results:
                raise Refused("the module's _start takes or returns values; a WASI command's does not")
            return
    raise Refused("the module exports no function _start: it is a library, not a WASI command")


def _check_imports(module: wasmtime.Module) -> None:
    foreign = sorted({f"{item.module}.{item.name}" for item in module.imports if item.module != WASI})
    if foreign:
        shown = ", ".join(foreign[:8]) + (f" and {len(foreign) - 8} more" if len(foreign) > 8 else "")
        raise Refused(f"the module imports {shown}; only {WASI} is offered")


def _exit(code: int) -> None:
    raise Exited(code)


def _read_entry(engine: wasmtime.Engine, entry: Path) -> wasmtime.Module | None:
    try:
        data = entry.read_bytes()
        start = len(_ENTRY_MAGIC) + _DIGEST_BYTES
        code = data[start:]
        if data[:start] != _ENTRY_MAGIC + hashlib.sha256(code).digest():
            return None
        module = wasmtime.Module.deserialize(engine, code)
        os.utime(entry)
    except (OSError, wasmtime.WasmtimeError):
        return None
    return module


def _write_entry(entry: Path, code: bytes) -> None:
    """Beside and renamed. Not synced: what a power cut leaves behind fails its digest and is a miss."""
    beside = entry.with_suffix(f".{os.getpid()}.tmp")
    try:
        beside.write_bytes(_ENTRY_MAGIC + hashlib.sha256(code).digest() + code)
        beside.rename(entry)
        _evict(entry.parent)
    except OSError:
        beside.unlink(missing_ok=True)  # no room is no reason not to run


def _evict(directory: Path) -> None:
    entries = sorted((file.stat().st_mtime, file.stat().st_size, file) for file in _cached(directory))
    excess = sum(size for _, size, _ in entries) - CACHE_BYTES_MAX
    for _, size, file in entries:
        if excess <= 0:
            return
        file.unlink(missing_ok=True)
        excess -= size


def _cached(directory: Path) -> Iterator[Path]:
    return (file for file in directory.iterdir() if file.suffix in (".bin", ".tmp"))


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Held by a descriptor, so that a killed runner lets go."""
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_private(directory: Path) -> bool:
    try:
        found = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _cpu() -> str:
    """The first processor's features, as the kernel names them; "" where it does not, and wasmtime checks by itself."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return ""
