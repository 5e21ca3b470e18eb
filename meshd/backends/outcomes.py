"""What a helper says of an attempt, as an outcome that the log can carry: a guest may have taken the helper over."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec.structs import replace

from meshd.model import AttemptKey, Inline, Outcome
from meshd.ports import Finished

MESSAGE_CHARS_MAX = 2048


def outcome_of(*, reason: object, exit_code: object, message: object, run_ms: object) -> Outcome:
    """Raises ValueError. An outcome that no replica can read would be reported again and again, and stop its node."""
    shortened = message[:MESSAGE_CHARS_MAX] if isinstance(message, str) else message
    fields = {"reason": reason, "exit_code": exit_code, "message": shortened, "run_ms": run_ms}
    try:
        outcome = msgspec.convert(fields, Outcome)
        msgspec.msgpack.encode(outcome)
    except (msgspec.ValidationError, OverflowError, UnicodeError) as error:
        raise ValueError(f"no outcome: {error}") from error
    return outcome


def finished_with_output(
    key: AttemptKey, outcome: Outcome, stdout: object, stderr: object, *, spill: str, inline_bytes_max: int
) -> Finished:
    """Each as the helper sent it; None stands for the file that it left in `spill`. Raises ValueError."""
    kept: list[Inline | None] = []
    files: list[Path | None] = []
    for stream, data in (("stdout", stdout), ("stderr", stderr)):
        if data is None:
            kept.append(None)
            files.append(Path(spill, f"{key.fence:x}.{stream}"))
        elif isinstance(data, bytes) and len(data) <= inline_bytes_max:
            kept.append(Inline(data) if data else None)
            files.append(None)
        else:
            raise ValueError(f"no output: {data!r}"[:200])
    return Finished(key, replace(outcome, stdout=kept[0], stderr=kept[1]), files[0], files[1])
