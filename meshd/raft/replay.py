"""Reading a journal back: what its frames say, in order, and which of them nothing later proves durable."""

from __future__ import annotations

from meshd.errors import Corrupt
from meshd.raft.frames import FIRST_INDEX, LocalHeader, Record, frames, records_of
from meshd.raft.messages import NO_OP, Entry, VoterId


class Replay:
    def __init__(self) -> None:
        self.term = 0
        self.vote: VoterId | None = None
        self.entries: list[Entry] = []
        self.durable_offset = 0
        self.durable_last = (FIRST_INDEX, 0)
        self.unproven: list[Record] = []
        self._base: tuple[int, int] | None = None

    def segment(self, name: str, number: int, header: LocalHeader, data: bytes, limit: int | None) -> None:
        if self._base is None:
            self._base = header.base
        if header.term > self.term:
            self.term, self.vote = header.term, header.vote
        elif header.term == self.term and header.vote is not None:
            self.vote = header.vote
        self.unproven = []
        # The header was synced before its segment got a name.
        self.durable_offset, self.durable_last = 0, self._last()
        end = 0
        for offset, end, body in frames(name, number, header, data, limit):
            if offset == 0:
                self.durable_offset = end
                continue
            self.durable_offset, self.durable_last = offset, self._last()
            self.unproven = records_of(name, offset, body)
            for record in self.unproven:
                self._take(name, offset, record)
        if limit is not None and end != limit:
            raise Corrupt(f"journal {name} ends at byte {end}, its successor says {limit}")

    def entries_after(self, snapshot: tuple[int, int] | None) -> list[Entry]:
        """The log as memory holds it: a placeholder for the snapshot, and what joins it."""
        base = self._base or (FIRST_INDEX, 0)
        index, term = snapshot or (FIRST_INDEX, 0)
        placeholder = (NO_OP, index, term)
        if base[0] > index:
            raise Corrupt(f"the journal begins after entry {base[0]}, the newest snapshot ends at {index}")
        covered = index - base[0]
        # A log that holds the snapshot's last entry agrees with it, and its tail may have been acknowledged.
        # Any other log is older than the snapshot or contradicts it.
        if covered > len(self.entries) or (covered > 0 and self.entries[covered - 1][2] != term):
            return [placeholder]
        if covered == 0 and base[1] != term:
            return [placeholder]
        return [placeholder, *self.entries[covered:]]

    def _last(self) -> tuple[int, int]:
        if self.entries:
            return self.entries[-1][1], self.entries[-1][2]
        return self._base or (FIRST_INDEX, 0)

    def _take(self, name: str, offset: int, record: Record) -> None:
        match record:
            case ("e", bytes(command), int(index), int(term)):
                if index != self._last()[0] + 1:
                    raise Corrupt(f"journal {name} at byte {offset}: entry {index} follows {self._last()[0]}")
                self.entries.append((command, index, term))
            case ("t", int(term), vote):
                self.term, self.vote = term, vote
            case ("x", int(index)):
                while self.entries and self.entries[-1][1] >= index:
                    self.entries.pop()
                if self._last()[0] >= index:
                    # Reaches into segments that were given back: only a snapshot can cover what lies before.
                    self._base = (index - 1, 0)
            case ("r", int(index), int(term)):
                self.entries, self._base = [], (index, term)
            case _:
                raise Corrupt(f"journal {name} at byte {offset}: unknown record")
