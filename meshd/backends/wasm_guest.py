"""One guest after the other, from one plan, through wasmtime's C interface. Runs inside a runner.

What a guest that does nothing costs, in µs of one core (wasmtime 50): store and WASI context 3, instance 5, its
_start 18 (the pages of its memory), environment 8, working directory 2.5, two files for its output 7: 44 in all. The
same through wasmtime's Python classes takes 75, because they look up every export and describe every type anew for
each call. So this speaks to the same C functions directly; what is a type or an error still comes from the classes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_char, c_char_p, c_void_p, cast
from typing import Any

import wasmtime
from wasmtime import _ffi as ffi
from wasmtime._func import maybe_raise_last_exn

from meshd.backends.wasm_messages import Plan, Task
from meshd.backends.wasm_modules import Exited, Linked

MEMORY_BYTES_MAX = 4 << 30
"""When the job names no limit: all that wasm32 can address."""

TABLE_ELEMENTS_MAX = 1_000_000
"""8 bytes each, outside the memory limit."""

PROGRAM = "module.wasm"
"""The program's own name comes first, as everywhere; nothing better than this is known."""

TOLD = ("MESHD_TASK", "MESHD_ATTEMPT", "MESHD_FENCE", "MESHD_ITEM")
"""What is told to each guest of a plan besides the plan's own variables."""

_START = b"_start"
_MEMORY = b"memory"
_HERE = b"."
_no_finalizer = cast(0, ctypes.CFUNCTYPE(None, c_void_p))

Failure = wasmtime.Trap | wasmtime.WasmtimeError


class Guests:
    """Raises nothing for what a guest does."""

    def __init__(
        self, linked: Linked, plan: Plan, *, workdir: str, stdin: str | None, stdout: str, stderr: str
    ) -> None:
        self.engine = linked.engine
        self._engine = linked.engine.ptr()
        self._linked = linked  # keeps what the pointer points to
        self._pre = linked.instance_pre.ptr()
        self._workdir = workdir.encode()
        self._stdin = None if stdin is None else stdin.encode()
        self.write_to(stdout, stderr)
        self._memory = MEMORY_BYTES_MAX if plan.memory is None else plan.memory
        self._fuel = plan.fuel
        self._is_told = plan.files is None
        self._args = plan.args
        self._has_item = self._is_told and any("{item}" in argument for argument in plan.args)
        self._argv = _strings([PROGRAM, *plan.args])
        names = [name for name, _ in plan.env]
        values = [value for _, value in plan.env]
        if self._is_told:
            names += TOLD
            values += [""] * len(TOLD)
        self._names = _strings(names)
        self._values = _strings(values)

    def write_to(self, stdout: str, stderr: str) -> None:
        self._stdout, self._stderr = stdout.encode(), stderr.encode()

    def run(self, task: Task, begin: Callable[[Any], bool]) -> tuple[Failure | None, int, int] | None:
        """Its failure, exit code, and memory if it did not end well; None when `begin` does not let it begin.

        `begin` is called with the store's context when everything is ready. Raises OSError.
        """
        store = ffi.wasmtime_store_new(self._engine, None, _no_finalizer)
        try:
            context = ffi.wasmtime_store_context(store)
            error = ffi.wasmtime_context_set_wasi(context, self._wasi(task))
            if error:
                raise OSError(str(wasmtime.WasmtimeError._from_ptr(error)))
            ffi.wasmtime_store_limiter(store, self._memory, TABLE_ELEMENTS_MAX, -1, -1, -1)
            if self._fuel is not None and (error := ffi.wasmtime_context_set_fuel(context, self._fuel)):
                raise OSError(str(wasmtime.WasmtimeError._from_ptr(error)))
            if not begin(context):
                return None
            return self._run(context)
        finally:
            ffi.wasmtime_store_delete(store)

    def _run(self, context: Any) -> tuple[Failure | None, int, int]:
        instance = ffi.wasmtime_instance_t()
        trap = POINTER(ffi.wasm_trap_t)()
        error = ffi.wasmtime_instance_pre_instantiate(self._pre, context, byref(instance), byref(trap))
        if error or trap:
            return _ended(error, trap, lambda: 0)
        found = ffi.wasmtime_extern_t()
        ffi.wasmtime_instance_export_get(context, byref(instance), _START, len(_START), byref(found))
        error = ffi.wasmtime_func_call(context, byref(found.of.func), None, 0, None, 0, byref(trap))
        if error or trap:
            return _ended(error, trap, lambda: _memory_bytes(context, instance))
        return None, 0, 0

    def _wasi(self, task: Task) -> Any:
        argv, values = self._argv, self._values
        if self._is_told:
            values[-4:] = [b"%d" % task.task, b"%d" % task.attempt, b"%d" % task.fence, task.item.encode()]
            if self._has_item:
                argv = _strings([PROGRAM, *(argument.replace("{item}", task.item) for argument in self._args)])
        wasi = ffi.wasi_config_new()
        is_good = (
            ffi.wasi_config_set_argv(wasi, len(argv), _pointer(argv))
            and ffi.wasi_config_set_env(wasi, len(values), _pointer(self._names), _pointer(values))
            and (self._stdin is None or ffi.wasi_config_set_stdin_file(wasi, self._stdin))
            and ffi.wasi_config_set_stdout_file(wasi, self._stdout)
            and ffi.wasi_config_set_stderr_file(wasi, self._stderr)
            and ffi.wasi_config_preopen_dir(wasi, self._workdir, _HERE, True)
        )
        if not is_good:
            ffi.wasi_config_delete(wasi)
            raise OSError(f"its files cannot be opened ({self._workdir.decode()})")
        return wasi


def _ended(error: Any, trap: Any, memory: Callable[[], int]) -> tuple[Failure | None, int, int]:
    failure: Failure = wasmtime.WasmtimeError._from_ptr(error) if error else wasmtime.Trap._from_ptr(trap)
    try:
        maybe_raise_last_exn()
    except Exited as exited:
        return None, exited.code, memory() if exited.code else 0
    return failure, 0, memory()


def _memory_bytes(context: Any, instance: Any) -> int:
    """The guest's memory at its end, which is its peak: wasm memory never shrinks. 0 when it is not exported."""
    found: Any = ffi.wasmtime_extern_t()
    if not ffi.wasmtime_instance_export_get(context, byref(instance), _MEMORY, len(_MEMORY), byref(found)):
        return 0
    if found.kind != ffi.WASMTIME_EXTERN_MEMORY.value:
        return 0
    return int(ffi.wasmtime_memory_data_size(context, byref(found.of.memory)))


def _strings(strings: Sequence[str]) -> Any:
    return (c_char_p * len(strings))(*[each.encode() for each in strings])


def _pointer(strings: Any) -> Any:
    return cast(strings, POINTER(POINTER(c_char)))
