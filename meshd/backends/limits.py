"""What every backend refuses or bounds in the same way."""

from __future__ import annotations

from meshd.codec import FRAME_BYTES_MAX
from meshd.model import EndReason, Outcome
from meshd.ports import Execution, Plan

TOO_LARGE = Outcome(
    EndReason.INVALID,
    message=f"arguments, environment and item are over the limit of {FRAME_BYTES_MAX} bytes for one message",
)


def refuse_strings(execution: Execution | Plan) -> str | None:
    """Why these arguments and variables can never reach a program, or None. C would cut them off at the NUL, silently."""
    for position, argument in enumerate(execution.args, start=1):
        if "\0" in argument:
            return f"argument {position} contains a NUL character"
    for name, value in execution.env:
        if not name or "=" in name or "\0" in name:
            return f"{name!r} cannot name an environment variable"
        if "\0" in value:
            return f"environment variable {name} contains a NUL character"
    return None


def file_bytes_max(execution: Execution | Plan) -> int | None:
    """How large any single file of the attempt may become: the disk the job asked for; None when it named none.

    Never less than its output may be, so that a flood is seen as one.
    """
    disk = execution.needs.disk
    return max(disk, execution.limits.output_bytes_max + 1) if disk else None
