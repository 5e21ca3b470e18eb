"""Which recovery epoch of its mesh a node belongs to, and what it does when it hears of others (protocol.md 10).

    peer's epoch           this node
    the same               goes on
    one that this led to   holds a log of its own: stops, it must rejoin · else: follows, and opens a session there
    one that led to this   goes on; the peer learns from this node's greeting that it was left behind
    neither                no stream between them; with two to choose from a node stays where it is, and says so

Every member shows its epoch in its greeting, signed with the mesh's key, so that a worker that has
followed can tell others, and a server that was away is stopped by whoever it meets first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from msgspec import Struct

from meshd import codec
from meshd.admission.certificates import Sign, Verify
from meshd.errors import NotAllowed, StartRefused, Unavailable
from meshd.model import EpochCertificate, NodeId
from meshd.raft.state.lineage import RECOVERIES_MAX, Lineage, descends, name_of

KEEP_ONE = "keep one: on each node that is not of it, `meshd rejoin --recovery NAME`"
HEARD_MAX = 8
"""Epochs of others that are remembered: two are a mistake, more change nothing."""


FOUNDED = EpochCertificate()


class EpochFile(Struct, frozen=True):
    """recovery.json: the epoch that this directory belongs to, and others of this mesh that it has heard of."""

    own: EpochCertificate = FOUNDED
    heard: tuple[EpochCertificate, ...] = ()


@dataclass(frozen=True, slots=True)
class Follow:
    """One epoch that this one led to: the newest, where one led to another."""

    to: EpochCertificate


@dataclass(frozen=True, slots=True)
class Torn:
    """Several recoveries were made of this node's epoch, none of which led to another. Nothing is followed."""

    between: tuple[EpochCertificate, ...]

    def refusal(self) -> StartRefused:
        names = " and ".join(name_of(epoch.lineage) for epoch in self.between)
        return StartRefused(
            f"the mesh was recovered twice without this node, as {names}",
            hint=KEEP_ONE,
        )


def certify_epoch(sign: Sign, mesh: str, lineage: Lineage) -> EpochCertificate:
    return EpochCertificate(lineage, sign(_signed_bytes(mesh, lineage))) if lineage else FOUNDED


def check_epoch(epoch: EpochCertificate, mesh: str, public_key: bytes, verify: Verify) -> None:
    """Raises NotAllowed unless the mesh's key vouches for it."""
    if len(epoch.lineage) > RECOVERIES_MAX:
        raise NotAllowed(f"an epoch of {len(epoch.lineage)} recoveries: there are at most {RECOVERIES_MAX}")
    if epoch.lineage and not verify(public_key, _signed_bytes(mesh, epoch.lineage), epoch.signature):
        raise NotAllowed(f"recovery {name_of(epoch.lineage)} is not signed by this mesh")


def choose(own: Lineage, heard: Iterable[EpochCertificate]) -> Follow | Torn | None:
    """Where a node of this epoch goes, from what it has heard. Never back, and never to one that its own did not lead to."""
    later = {epoch.lineage: epoch for epoch in heard if descends(epoch.lineage, own)}
    ends = [epoch for epoch in later.values() if not any(descends(other, epoch.lineage) for other in later)]
    if not ends:
        return None
    return Follow(ends[0]) if len(ends) == 1 else Torn(tuple(sorted(ends, key=lambda epoch: epoch.lineage)))


class Epochs:
    """`on_news` is called when an epoch was heard of that this one led to, or that is apart from it; must not wait."""

    def __init__(
        self, mesh: str, public_key: bytes, verify: Verify, file: EpochFile, *, on_news: Callable[[], None]
    ) -> None:
        self._mesh = mesh
        self._public_key = public_key
        self._verify = verify
        self._on_news = on_news
        self.own = file.own
        self._heard = {epoch.lineage: epoch for epoch in file.heard}
        self._beside: dict[NodeId, Lineage] = {}

    @property
    def lineage(self) -> Lineage:
        return self.own.lineage

    def file(self) -> EpochFile:
        return EpochFile(self.own, tuple(self._heard.values()))

    def decide(self) -> Follow | Torn | None:
        return choose(self.lineage, self._heard.values())

    def torn(self) -> StartRefused | None:
        """Two recoveries of one mesh, while members of both are met; None: this node knows of one."""
        decision = self.decide()
        if isinstance(decision, Torn):
            return decision.refusal()
        if not self._beside:
            return None
        others = " and ".join(sorted({name_of(lineage) for lineage in self._beside.values()}))
        return StartRefused(
            f"the mesh was recovered twice, as {name_of(self.lineage)} here and as {others} elsewhere", hint=KEEP_ONE
        )

    def belong(self, epoch: EpochCertificate) -> None:
        """This node has followed; what can no longer be followed is forgotten."""
        self.own = epoch
        self._beside.clear()
        self._heard = {each.lineage: each for each in self._heard.values() if descends(each.lineage, epoch.lineage)}

    def meet(self, peer: NodeId, theirs: EpochCertificate) -> None:
        """A member showed its epoch. Raises Unavailable where this node is not of it (yet), NotAllowed for a forged one."""
        if theirs.lineage == self.lineage or descends(self.lineage, theirs.lineage):
            self._beside.pop(peer, None)
            return
        check_epoch(theirs, self._mesh, self._public_key, self._verify)
        if theirs.lineage not in self._heard and len(self._heard) < HEARD_MAX:
            self._heard[theirs.lineage] = theirs
            self._on_news()
        theirs_name, ours_name = name_of(theirs.lineage), name_of(self.lineage)
        if descends(theirs.lineage, self.lineage):
            raise Unavailable(f"{peer} is of recovery {theirs_name}; this node is still of {ours_name}")
        self._beside[peer] = theirs.lineage
        raise Unavailable(
            f"{peer} is of recovery {theirs_name}, this node of {ours_name}: two recoveries of one mesh",
            hint=KEEP_ONE,
        )


def _signed_bytes(mesh: str, lineage: Lineage) -> bytes:
    return codec.pack(("meshd recovery", mesh, lineage))
