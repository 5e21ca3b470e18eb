"""What a helper says of an attempt, as an outcome that the log can carry: a guest may have taken the helper over."""

from __future__ import annotations

import msgspec

from meshd.model import Outcome

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
