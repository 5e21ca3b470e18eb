"""What a node and the leader say to each other about a session. Bodies of RPCs; none of it enters the log.

    session.renew    node → leader, through any voter    Renew → Granted | Refused
    attempt.notice   leader → node                       Notice → (empty: it arrived)

A lost notice costs time only: the digest in the next renewals shows that the node does
not hold what is leased to it, and the list that the leader then asks for puts it right
(protocol.md 4). A node must take notices from servers of its mesh only.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from hashlib import blake2b
from typing import Annotated

from msgspec import Meta, Struct

from meshd.model import AttemptKey, AttemptRun, Count, JobId, JobSpec

NOTICE_LEASES_MAX = 1000
"""Runs of leases, and stops, in one notice."""

NOTICE_SPECS_BYTES_MAX = 2 << 20
"""Specs in one notice: half a frame, so that a last spec of the largest size still fits."""

DIGEST_BYTES = 16

Digest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


def digest_of(held: Iterable[AttemptKey]) -> bytes:
    """Equal exactly when the same attempts are held. The fence alone names an attempt."""
    digest = blake2b(digest_size=DIGEST_BYTES)
    for fence in sorted(key.fence for key in held):
        digest.update(fence.to_bytes(8, "big"))
    return digest.digest()


class Renew(Struct, frozen=True, array_like=True, tag=True):
    """I am still here, in this epoch, and hold what makes up this digest."""

    epoch: Count
    digest: Digest


class Granted(Struct, frozen=True, array_like=True, tag=True):
    """The view reaches 10 s from the sending of the renewal. `list_fence`: send a Reconcile as of this fence."""

    list_fence: Count | None = None


class Refusal(StrEnum):
    NOT_LEADING = "not_leading"
    """Ask another voter; says nothing about the session."""
    OVER = "over"
    """The session is ended, or about to be: take the next epoch."""


class Refused(Struct, frozen=True, array_like=True, tag=True):
    reason: Refusal


RenewAnswer = Granted | Refused


class Notice(Struct, frozen=True, array_like=True):
    """These attempts are leased to you in this epoch, with the spec of each job once; these are no longer wanted."""

    epoch: Count
    leases: Annotated[tuple[AttemptRun, ...], Meta(max_length=NOTICE_LEASES_MAX)] = ()
    specs: tuple[tuple[JobId, JobSpec], ...] = ()
    stops: Annotated[tuple[AttemptKey, ...], Meta(max_length=NOTICE_LEASES_MAX)] = ()
