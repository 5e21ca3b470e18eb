"""How a guest ended, from what wasmtime says and how large its memory had become. Runs inside a runner."""

from __future__ import annotations

import wasmtime

from meshd.backends.wasm_messages import Plan

NEAR_LIMIT_BYTES = 2 << 20
"""A guest that was refused memory this close to its limit, or within a sixteenth of it, ran out of memory."""

FRAMES_MAX = 8
"""Functions named in a trap's message, innermost first."""


def judge(
    plan: Plan, trap: wasmtime.Trap | wasmtime.WasmtimeError | None, code: int, memory: int
) -> tuple[str, int | None, str]:
    """Reason, exit code and message of a guest that came to its end by itself."""
    if trap is None and code == 0:
        return "exit", 0, ""
    if plan.memory is not None and is_at_memory_limit(memory, plan.memory, trap):
        return "memory_limit", None, f"its memory reached {memory} of at most {plan.memory} bytes, and it ended badly"
    if trap is None:
        return "exit", code, ""
    if isinstance(trap, wasmtime.Trap) and trap.trap_code is wasmtime.TrapCode.OUT_OF_FUEL:
        return "fuel_limit", None, f"used all of its {plan.fuel} units of fuel"
    return "trap", None, _describe(trap)


def is_at_memory_limit(memory: int, limit: int, trap: wasmtime.Trap | wasmtime.WasmtimeError | None) -> bool:
    """Whether a guest that ended badly did so for want of memory, as far as can be seen from outside.

    A refused growth is invisible: the guest's malloc returns NULL and the program decides. So what counts is
    that its memory ends near the limit.
    """
    if trap is not None and "exceeds memory limits" in str(trap):
        return True
    return memory > 0 and memory + max(limit // 16, NEAR_LIMIT_BYTES) >= limit


def _describe(trap: wasmtime.Trap | wasmtime.WasmtimeError) -> str:
    text = " ".join(str(trap).split())
    cause = text.rpartition("wasm trap: ")[2].rpartition("Caused by: ")[2]
    if not isinstance(trap, wasmtime.Trap):
        return f"the guest broke a rule of WASI: {cause}"
    code = trap.trap_code
    names = [frame.func_name or f"function {frame.func_index}" for frame in trap.frames[:FRAMES_MAX]]
    where = f", in {' < '.join(names)}" if names else ""
    return f"trap {code.name.lower() if code is not None else 'of unknown kind'}: {cause}{where}"
