"""Reading a journal back: what its frames say in order, what of it is lost, and whether that matters.

Gaps cut what was read into pieces. The last piece that joins the newest snapshot is the
log; when that is not the last piece of all, acknowledged entries are missing behind it.
What a good snapshot covers was not lost (protocol.md 9, Torn or corrupt).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from meshd.errors import Corrupt, InvalidRequest
from meshd.raft.configurations import voters_of
from meshd.raft.messages import NO_OP, TERM_MAX, Entry, VoterId
from meshd.raft.storage.frames import (
    FIRST_INDEX,
    End,
    Ended,
    Frame,
    Gap,
    LocalHeader,
    Record,
    read_segment,
    records_of,
)


@dataclass(slots=True)
class _Piece:
    """Entries in a row."""

    base: tuple[int, int | None] | None
    """(index, term) of the entry before them; None while nothing says it."""
    entries: list[Entry] = field(default_factory=list)

    @property
    def last(self) -> tuple[int, int] | None:
        if self.entries:
            return self.entries[-1][1], self.entries[-1][2]
        return None if self.base is None else (self.base[0], self.base[1] or 0)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a start goes on with."""

    entries: list[Entry]
    """The log as memory holds it: a placeholder for the snapshot, and what joins it."""
    doubt: str = ""
    """Why neither votes nor acknowledgements of this voter count, until others have brought it up to date."""
    is_loss: bool = False
    """It once had what it has no more. Else only the last frame is missing, and nobody knows whether it mattered."""


class Replay:
    def __init__(self) -> None:
        self.term = 0
        self.vote: VoterId | None = None
        self.durable_offset = 0
        self.durable_last = (FIRST_INDEX, 0)
        self.unproven: Sequence[Record] = ()
        self.gaps: list[str] = []
        """What could not be read, by file and offset."""
        self._pieces: list[_Piece] = []
        self._hint: tuple[VoterId, ...] = ()
        """Of the newest header."""
        self._named: tuple[VoterId, ...] = ()
        """Of that, or of an entry behind it."""
        self._was_in_doubt = False
        self._lost = ""
        self._may_have_voted = False
        """A vote may have been in a gap."""
        self._unproven_end = ""

    def segment(self, name: str, number: int, header: LocalHeader, data: bytes, limit: int | None) -> None:
        self._begin(header)
        for part in read_segment(header, number, data, limit):
            match part:
                case Gap(offset):
                    self.gap(f"{name} at byte {offset}")
                case Frame(0, end):
                    # The header was synced before its segment got a name.
                    self.durable_offset, self.durable_last, self.unproven = end, self.last, ()
                case Frame(offset, _, body):
                    self.durable_offset, self.durable_last = offset, self.last
                    self.unproven = records_of(name, offset, body)
                    for record in self.unproven:
                        self._take(name, offset, record)
                case Ended(offset, end):
                    self._unproven_end = f"{name} at byte {offset}" if end is End.UNPROVEN else ""

    def gap(self, where: str) -> None:
        """Something durable is not there any more."""
        self.gaps.append(where)
        self._pieces.append(_Piece(None))
        self._may_have_voted = True

    @property
    def last(self) -> tuple[int, int]:
        """(index, term) of the last entry that was read, also when there is a gap behind it."""
        return next((last for piece in reversed(self._pieces) if (last := piece.last)), (FIRST_INDEX, 0))

    @property
    def lost(self) -> str:
        """What an earlier start has found to be lost, while that is not mended."""
        return self._lost if self._was_in_doubt else ""

    def voters(self, of_snapshot: Sequence[VoterId], founding: Sequence[VoterId]) -> tuple[VoterId, ...]:
        """The newest configuration that anything readable names; in doubt, that was readable when it began."""
        return tuple((self._hint if self._was_in_doubt else self._named) or of_snapshot or founding)

    def verdict(self, snapshot: tuple[int, int] | None, *, is_sole: bool) -> Verdict:
        """`is_sole`: nobody else could have voted for anything else, so a gap between entries in a row held none."""
        pieces = self._pieces
        if is_sole:
            pieces = _in_a_row(pieces)
        at = snapshot or (FIRST_INDEX, 0)
        joining = [number for number, piece in enumerate(pieces) if piece.base is not None and piece.base[0] <= at[0]]
        chosen = joining[-1] if joining else -1
        entries = [(NO_OP, *at), *(_behind(pieces[chosen], at) if joining else [])]
        if pieces and chosen != len(pieces) - 1:
            return Verdict(
                entries, f"what followed entry {entries[-1][1]} is lost: {', '.join(self.gaps) or 'a snapshot'}", True
            )
        if self._may_have_voted and not is_sole:
            return Verdict(entries, f"a vote may be lost: {', '.join(self.gaps)}")
        if self._unproven_end:
            return Verdict(entries, f"the last frame is damaged, and may have been acknowledged: {self._unproven_end}")
        return Verdict(entries, (self._lost or "it was in doubt before this start") if self._was_in_doubt else "")

    # --- in order ------------------------------------------------------------------------------------------------------

    def _begin(self, header: LocalHeader) -> None:
        last = self._pieces[-1].last if self._pieces else None
        if last is None or last[0] != header.base[0]:
            if self._pieces and self._pieces[-1].base is None and not self._pieces[-1].entries:
                self._pieces.pop()
            self._pieces.append(_Piece(header.base))
        if header.term > self.term:
            self.term, self.vote = header.term, header.vote
        elif header.term == self.term and header.vote is not None:
            self.vote = header.vote
        self._may_have_voted = False
        self._was_in_doubt, self._lost = header.is_in_doubt, header.lost
        self._hint = self._named = header.voters or self._named

    def _take(self, name: str, offset: int, record: Record) -> None:
        piece = self._pieces[-1]
        match record:
            case ("e", bytes(command), int(index), int(term)) if 0 < index <= TERM_MAX and 0 <= term <= TERM_MAX:
                if piece.last is None or piece.last[0] != index - 1:
                    if piece.base is not None:
                        self.gaps.append(f"{name} at byte {offset}, where entry {index} follows {self.last[0]}")
                        self._pieces.append(piece := _Piece(None))
                    piece.base = (index - 1, None)
                piece.entries.append((command, index, term))
                self._named = _voters_in(piece.entries[-1:]) or self._named
                self.term = max(self.term, term)
            case ("t", int(term), str() | None as vote) if 0 <= term <= TERM_MAX:
                self.term, self.vote = max(self.term, term), None if vote is None else VoterId(vote)
                self._may_have_voted = False
            case ("x", int(index)) if 0 < index <= TERM_MAX:
                while piece.entries and piece.entries[-1][1] >= index:
                    if _voters_in([piece.entries.pop()]):
                        self._named = _voters_in(piece.entries) or self._hint
                if piece.last is not None and piece.last[0] >= index:
                    # Reaches behind a gap, or into segments that were given back: only a snapshot covers what lies before.
                    piece.base = (index - 1, None)
            case ("r", int(index), int(term)) if 0 < index <= TERM_MAX and 0 <= term <= TERM_MAX:
                # What was before matters no more, nor what of it is lost.
                self._pieces[:] = [_Piece((index, term))]
                self.gaps.clear()
            case ("c",):
                self._was_in_doubt = False
            case _:
                raise Corrupt(f"journal {name} at byte {offset}: unknown record")


def _voters_in(entries: list[Entry]) -> tuple[VoterId, ...]:
    """The newest configuration among them. Raises Corrupt."""
    for command, index, _ in reversed(entries):
        try:
            voters = voters_of(command)
        except InvalidRequest as error:
            raise Corrupt(f"entry {index} of the journal cannot be read: {error.message}") from error
        if voters is not None:
            return tuple(voters)
    return ()


def _in_a_row(pieces: list[_Piece]) -> list[_Piece]:
    joined: list[_Piece] = []
    for piece in pieces:
        if joined and piece.base is not None and joined[-1].last is not None and joined[-1].last[0] == piece.base[0]:
            joined[-1] = _Piece(joined[-1].base, joined[-1].entries + piece.entries)
        else:
            joined.append(piece)
    return joined


def _behind(piece: _Piece, at: tuple[int, int]) -> list[Entry]:
    """The entries behind a snapshot at (index, term).

    A log that holds the snapshot's last entry agrees with it, and its tail may have been
    acknowledged. Any other log is older than the snapshot or contradicts it.
    """
    assert piece.base is not None
    (base_index, base_term), (index, term) = piece.base, at
    covered = index - base_index
    if covered > len(piece.entries) or (covered > 0 and piece.entries[covered - 1][2] != term):
        return []
    if covered == 0 and base_term is not None and base_term != term:
        return []
    return piece.entries[covered:]
