"""A whole agent in this process, on loopback."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs

from meshd import daemon
from meshd.config import Config
from meshd.gossip import own
from meshd.model import Role
from meshd.neighbours import ADDRESS_FACT, MEMBERS_FACT, OFFER_FACT


async def test_an_agent_with_more_blobs_than_gossip_tells_of_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "KEYS_MAX", own.KEYS_KEPT + 10)
    blobs = tmp_path / "blobs" / "whole"
    blobs.mkdir(parents=True)
    for number in range(own.KEYS_MAX + 10):
        (blobs / f"{number:064x}").write_bytes(b"x")
    config = Config(data_dir=str(tmp_path), name="full", listen="127.0.0.1:0", roles=(Role.SERVER,))
    stop = trio.Event()

    async with trio.open_nursery() as nursery:
        with capture_logs() as lines, trio.fail_after(60):
            started = await nursery.start(lambda task_status: daemon.run(config, stop=stop, task_status=task_status))
            gossip, me = started.node._gossip, started.me
            while any(gossip.fact(me, key) is None for key in (OFFER_FACT, ADDRESS_FACT, MEMBERS_FACT)):
                await trio.sleep(0.05)
        assert 0 < len(gossip.facts("blob/")) <= 10
        assert [line["log_level"] for line in lines if line["event"] == "gossip.blobs_untold"] == ["warning"]
        stop.set()
