"""What a leader sends to one peer: the entries it has not, or a snapshot when the log does not reach back that far."""

from __future__ import annotations

from meshd.raft.messages import SNAPSHOT_BYTES_MAX, Append, Chunk, Entry, VoterId
from meshd.raft.progress import CHUNK_BYTES, Progress, Transfer
from meshd.raft.pysyncobj_state import RaftState

APPEND_BYTES_MAX = 256 << 10
"""Entries in one message, unless a single one is larger."""


class Feeder:
    def __init__(self, raft: RaftState) -> None:
        self._raft = raft
        self._round = 0
        self._ends_doubt = False
        self._agreed = (0, b"")

    def feed(
        self, peer: VoterId, progress: Progress, round_: int, now: float, agreed: tuple[int, bytes], *, ends_doubt: bool,
        is_round: bool, is_news_due: bool,
    ) -> None:  # fmt: skip
        """`is_round`: something must be sent, that the peer may answer this round; `is_news_due`: the commit, if it does not know it.

        `agreed` and `ends_doubt` are told along.
        """
        self._ends_doubt = ends_doubt
        self._round = round_
        self._agreed = agreed
        if progress.transfer is not None or progress.next <= self._raft.first:
            self._feed_snapshot(peer, progress, now, is_round)
            return
        has_sent = False
        until = self._raft.sendable
        while progress.next <= until and progress.may_send():
            entries, size = self._entries_from(progress.next, until, min(APPEND_BYTES_MAX, progress.flow.message_bytes))
            if not self._send_append(peer, progress, entries, now):
                return
            progress.sent(entries[-1][1], size, now)
            has_sent = True
        # To one whose link is full the news of a commit only adds to the line: it comes with the next entries.
        is_news = progress.commit_told < self._raft.commit and progress.flow.has_room
        is_first = not progress.commit_told  # of a stream, or after a refusal: where it stands shall be known at once
        if not has_sent and (is_round or (is_news and (is_news_due or is_first))):
            self._send_append(peer, progress, (), now)

    def _send_append(self, peer: VoterId, progress: Progress, entries: tuple[Entry, ...], now: float) -> bool:
        raft, prev = self._raft, progress.next - 1
        message = Append(
            raft.term, self._round, int(now * 1000), raft.commit, prev, raft.term_at(prev), entries, *self._agreed,
            self._ends_doubt,
        )  # fmt: skip
        if not raft.send(peer, message):
            return False
        progress.commit_told = raft.commit
        return True

    def _entries_from(self, index: int, until: int, bytes_max: int) -> tuple[tuple[Entry, ...], int]:
        first, size, entries_max = self._raft.first, 0, self._raft.settings.append_entries
        entries: list[Entry] = []
        for entry in self._raft.log[index - first : min(index + entries_max, until + 1) - first]:
            if entries and size + len(entry[0]) > bytes_max:
                break
            entries.append(entry)
            size += len(entry[0])
        return tuple(entries), size

    def _feed_snapshot(self, peer: VoterId, progress: Progress, now: float, is_round: bool) -> None:
        if progress.transfer is None and (packed := self._raft.snapshot()) is not None:
            assert len(packed.data) <= SNAPSHOT_BYTES_MAX
            progress.begin_transfer(Transfer(packed.index, packed.term, packed.data, packed.digest))
        if (transfer := progress.transfer) is None:
            if is_round:
                self._raft.send(peer, Append(self._raft.term, self._round, int(now * 1000), 0, 0, 0))
            return
        has_sent = False
        while transfer.sent < len(transfer.data) and progress.flow.has_room:
            size = min(CHUNK_BYTES, progress.flow.message_bytes)
            if not self._send_chunk(peer, transfer, transfer.data[transfer.sent : transfer.sent + size], now):
                return
            progress.flow.sent(transfer.sent, size, now)
            has_sent = True
        if is_round and not has_sent:
            # How far is it? Something may be lost; or it has everything, and its last word was.
            self._send_chunk(peer, transfer, b"", now)

    def _send_chunk(self, peer: VoterId, transfer: Transfer, data: bytes, now: float) -> bool:
        raft = self._raft
        chunk = Chunk(
            raft.term, self._round, int(now * 1000), transfer.index, transfer.term,
            len(transfer.data), transfer.digest, transfer.sent, data,
        )  # fmt: skip
        if not raft.send(peer, chunk):
            return False
        if data:
            transfer.sent += len(data)
            transfer.sent_round = self._round
        return True
