"""Everything that can go wrong for a caller, by whose fault it is and whether to try again.

    MeshError
    ├─ InvalidRequest   yours: change it before you send it again             exit 2    400
    │  └─ TooLarge      over a stated limit                                   exit 2    413
    ├─ NotFound         yours: there is no such thing                         exit 3    404
    ├─ Unplaceable      no node can run this job as it stands                 exit 4    422
    ├─ JobFailed        the job itself ended badly                            exit 5    409
    ├─ Conflict         someone was first, or it has moved on: look again     exit 6    409
    ├─ NotAllowed       you may not                                           exit 7    403
    ├─ Unavailable      nobody's: try again, also at another node             exit 8    503
    │  ├─ Busy          a bound was reached: try again later                  exit 8    429
    │  └─ UnknownOutcome  perhaps done: resend with the same id, or ask       exit 8    504
    ├─ WaitTimeout      you waited as long as you said                        exit 124  408
    ├─ PeerFault        another node broke the rules: ask another             exit 1    502
    ├─ Corrupt          bytes on this disk are not what was written           exit 1    500
    └─ StartRefused     this agent cannot start as it was told to             exit 1    500

A job that fails is an `Outcome`, a value; a bug is an `assert`. A message says what
happened and to what; `hint` is the next thing to try. Codes travel between nodes
and to clients, so that an error keeps its class wherever it is shown.
"""

from __future__ import annotations

from typing import ClassVar


class MeshError(Exception):
    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500
    may_retry: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class InvalidRequest(MeshError):
    code = "invalid_request"
    exit_code = 2
    http_status = 400


class TooLarge(InvalidRequest):
    code = "too_large"
    http_status = 413


class NotFound(MeshError):
    code = "not_found"
    exit_code = 3
    http_status = 404


class Unplaceable(MeshError):
    code = "unplaceable"
    exit_code = 4
    http_status = 422


class JobFailed(MeshError):
    code = "job_failed"
    exit_code = 5
    http_status = 409


class Conflict(MeshError):
    code = "conflict"
    exit_code = 6
    http_status = 409


class NotAllowed(MeshError):
    code = "not_allowed"
    exit_code = 7
    http_status = 403


class Unavailable(MeshError):
    code = "unavailable"
    exit_code = 8
    http_status = 503
    may_retry = True


class Busy(Unavailable):
    code = "busy"
    http_status = 429


class UnknownOutcome(Unavailable):
    code = "unknown_outcome"
    http_status = 504


class WaitTimeout(MeshError):
    code = "wait_timeout"
    exit_code = 124
    http_status = 408
    may_retry = True


class PeerFault(MeshError):
    code = "peer_fault"
    http_status = 502


class Corrupt(MeshError):
    code = "corrupt"


class StartRefused(MeshError):
    code = "start_refused"


_BY_CODE: dict[str, type[MeshError]] = {
    kind.code: kind
    for kind in (
        MeshError, InvalidRequest, TooLarge, NotFound, Unplaceable, JobFailed, Conflict, NotAllowed, Unavailable,
        Busy, UnknownOutcome, WaitTimeout, PeerFault, Corrupt, StartRefused,
    )
}  # fmt: skip


def from_code(code: str, message: str, hint: str = "") -> MeshError:
    """The error that another node or an API named; an unknown code becomes a plain `MeshError`."""
    return _BY_CODE.get(code, MeshError)(message, hint=hint)
