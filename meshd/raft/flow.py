"""How much may be on its way to one peer: as much as its link takes without anything waiting in line for long.

A slow link that is given more than it carries does not get faster: frames wait, heartbeats
behind them, and contact is lost. So the window follows the answers: it grows while they
come soon, slowly once some came late, and halves then, as TCP Vegas does. Nothing is sent again because
time has passed. A stream delivers in order or breaks, so what is only late is not lost, and
a resend would make it later; what is lost shows in the answer to a later round. (With a
resend after 0.6 s of silence a follower on a link of six times the load never came back:
most of what the link carried had been there before.)
"""

from __future__ import annotations

from collections import deque

WINDOW_MESSAGES = 64
"""Unanswered messages to one peer; enough to fill a fast link, few enough to resend."""
WINDOW_BYTES_FIRST = 128 << 10
WINDOW_BYTES_MAX = 4 << 20
"""Below the wire's buffer …"""
WINDOW_BYTES_MIN = 32 << 10
"""… and two small messages, so that one is on the link while the other is answered."""
MESSAGE_BYTES_MIN = 16 << 10
MESSAGES_IN_WINDOW = 4
"""A message is at most such a part of the window."""
LATE_S = 0.4
"""An answer that takes longer has waited in line: heartbeats behind it would soon come too late for contact."""


class Flow:
    __slots__ = ("_bytes", "_flying", "_narrowed_s", "_window")

    def __init__(self) -> None:
        self.begin_anew()

    def begin_anew(self) -> None:
        """A new stream: nothing is on its way, and nothing is known of it."""
        self._flying: deque[tuple[int, int, float]] = deque()
        self._bytes = 0
        self._window = WINDOW_BYTES_FIRST
        self._narrowed_s = float("-inf")

    @property
    def is_empty(self) -> bool:
        return not self._flying

    @property
    def has_room(self) -> bool:
        return len(self._flying) < WINDOW_MESSAGES and self._bytes < self._window

    @property
    def message_bytes(self) -> int:
        return max(MESSAGE_BYTES_MIN, self._window // MESSAGES_IN_WINDOW)

    def sent(self, mark: int, size: int, now_s: float) -> None:
        """`mark` only ever rises: what will be told when this has arrived."""
        self._flying.append((mark, size, now_s))
        self._bytes += size

    def arrived(self, mark: int, now_s: float) -> int:
        """Everything up to this mark is there; how many bytes that were on their way."""
        before = self._bytes
        while self._flying and self._flying[0][0] <= mark:
            _, size, sent_s = self._flying.popleft()
            self._bytes -= size
            if now_s - sent_s <= LATE_S:
                is_new = self._narrowed_s == float("-inf")
                # Twice as wide with each window that is answered; where its end is known, by a tenth.
                self._window = min(WINDOW_BYTES_MAX, self._window + (size if is_new else size // 10))
            elif sent_s >= self._narrowed_s:  # what was sent before that has waited behind the wider one
                self._window = max(WINDOW_BYTES_MIN, self._window // 2)
                self._narrowed_s = now_s
        return before - self._bytes

    def forget(self) -> None:
        """It goes on elsewhere in the log; what is on its way tells nothing any more."""
        self._flying.clear()
        self._bytes = 0
