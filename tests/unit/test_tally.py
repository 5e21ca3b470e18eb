"""What peers can cause without end is counted, and told in few lines."""

from __future__ import annotations

import pytest
import structlog

from meshd.tally import LINES_PER_WINDOW, WINDOW_S, Tally, Throttle


def test_only_what_has_risen_is_told_and_once():
    calls = {"frames_malformed": 2, "calls": 900}
    gossip = {"chunks_forged": 0, "exchanges": 5}
    tally = Tally([lambda: calls, lambda: gossip])
    assert tally.risen() == {"frames_malformed": 2}
    assert tally.risen() == {}
    calls["frames_malformed"], gossip["chunks_forged"] = 3, 7
    assert tally.risen() == {"chunks_forged": 7, "frames_malformed": 1}


def test_a_peer_cannot_fill_the_log_and_what_was_left_out_is_counted():
    now_s = 0.0
    throttle = Throttle(lambda: now_s)

    def line(event: str) -> dict[str, object]:
        return dict(throttle(None, "warning", {"event": event}))

    for _ in range(LINES_PER_WINDOW):
        assert line("rpc.malformed") == {"event": "rpc.malformed"}
    for _ in range(7):
        with pytest.raises(structlog.DropEvent):
            line("rpc.malformed")
    assert line("join.refused"), "each event has lines of its own"
    now_s = WINDOW_S
    assert line("rpc.malformed")["left_out"] == 7
    assert "left_out" not in line("rpc.malformed")


def test_what_the_node_itself_does_is_never_left_out():
    throttle = Throttle(lambda: 0.0)
    for _ in range(10 * LINES_PER_WINDOW):
        assert throttle(None, "info", {"event": "attempt.started"})
