"""How much is on its way to a peer, and what is taken for lost."""

from __future__ import annotations

import pytest

from meshd.raft.flow import (
    LATE_S,
    WINDOW_BYTES_FIRST,
    WINDOW_BYTES_MAX,
    WINDOW_BYTES_MIN,
    WINDOW_MESSAGES,
    Flow,
)
from meshd.raft.progress import Progress, Transfer


class Link:
    """A peer that answers after the delay, behind a line that carries so many bytes a second."""

    def __init__(self, flow: Flow, bytes_s: float, delay_s: float) -> None:
        self.flow = flow
        self.now_s = 0.0
        self._bytes_s = bytes_s
        self._delay_s = delay_s
        self._free_s = 0.0
        self._answers: list[tuple[float, int]] = []
        self.sent_bytes = 0
        self.waited_s = 0.0

    def run(self, seconds: float) -> None:
        until = self.now_s + seconds
        while self.now_s < until:
            while self.flow.has_room:
                size = self.flow.message_bytes
                self.sent_bytes += size
                self._free_s = max(self._free_s, self.now_s) + size / self._bytes_s
                self.waited_s = self._free_s - self.now_s
                self.flow.sent(self.sent_bytes, size, self.now_s)
                self._answers.append((self._free_s + self._delay_s, self.sent_bytes))
            at_s, mark = self._answers.pop(0)
            self.now_s = max(self.now_s, at_s)
            self.flow.arrived(mark, self.now_s)


@pytest.mark.parametrize("bytes_s", [60_000, 250_000, 1_000_000, 10_000_000])
def test_a_slow_link_is_kept_busy_and_never_long_in_arrears(bytes_s: float) -> None:
    link = Link(Flow(), bytes_s, 0.02)
    link.run(10)
    before, worst = link.sent_bytes, 0.0
    for _ in range(40):
        link.run(0.5)
        worst = max(worst, link.waited_s)
    assert link.sent_bytes - before > 0.8 * 20 * bytes_s
    assert worst < max(LATE_S, WINDOW_BYTES_MIN / bytes_s) + 0.3


def test_a_fast_link_gets_a_wide_window_at_once() -> None:
    link = Link(Flow(), 1e9, 0.001)
    link.run(0.1)
    assert link.flow.message_bytes == WINDOW_BYTES_MAX // 4


def test_a_window_has_an_end() -> None:
    flow = Flow()
    for mark in range(WINDOW_MESSAGES):
        assert flow.has_room
        flow.sent(mark, 1, 0.0)
    assert not flow.has_room
    flow.forget()
    flow.sent(1, WINDOW_BYTES_FIRST, 0.0)
    assert not flow.has_room


def test_late_answers_halve_the_window_once_for_all_that_waited_together() -> None:
    flow = Flow()
    for mark in range(1, 5):
        flow.sent(mark, 1000, 0.0)
    flow.arrived(4, 1.0)
    assert flow.message_bytes == WINDOW_BYTES_FIRST // 2 // 4
    flow.begin_anew()
    assert flow.message_bytes == WINDOW_BYTES_FIRST // 4


# --- what is lost -----------------------------------------------------------------------------------------------------


def test_many_refusals_of_one_gap_are_answered_once() -> None:
    """Each message behind the gap is refused; stock, and we once, sent everything again for each (F5)."""
    progress = Progress(next=100, is_connected=True, match=50)
    progress.refused(61, round_=7, round_now=9)
    assert (progress.next, progress.may_send()) == (61, True)
    progress.sent(70, 1000, 0.0)
    for round_ in (7, 8, 8, 9):
        progress.refused(61, round_=round_, round_now=9)
    assert progress.next == 71
    progress.refused(52, round_=9, round_now=9)
    assert progress.next == 52, "but a conflict further back is news"
    progress.refused(61, round_=10, round_now=10)
    assert progress.next == 52, "never further on than what was refused"
    assert progress.match == 50


def test_what_of_a_snapshot_is_late_is_not_sent_again_and_what_is_missing_is() -> None:
    progress = Progress(next=1, is_connected=True)
    progress.begin_transfer(Transfer(10, 1, bytes(1000), bytes(32)))
    transfer = progress.transfer
    assert transfer is not None
    transfer.sent, transfer.sent_round = 600, 5
    progress.received(0, round_=5, now_s=1.0)
    progress.received(200, round_=4, now_s=1.0)
    assert (transfer.sent, transfer.acked) == (600, 200)
    progress.received(200, round_=6, now_s=2.0)
    assert (transfer.sent, transfer.acked) == (200, 200), "what was sent before that round has not come"
    transfer.sent, transfer.sent_round = 600, 6
    progress.received(0, round_=6, now_s=2.0)
    assert (transfer.sent, transfer.acked) == (0, 0), "the peer began anew"


def test_a_new_stream_goes_on_with_a_snapshot_where_the_peer_has_it() -> None:
    progress = Progress(next=1, is_connected=True)
    progress.begin_transfer(Transfer(10, 1, bytes(1000), bytes(32), sent=800, acked=300))
    progress.begin_anew(last=99)
    assert progress.transfer is not None
    assert (progress.transfer.sent, progress.flow.is_empty) == (300, True)
