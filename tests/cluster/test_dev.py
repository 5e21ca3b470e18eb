"""`meshd dev`: gone without a trace when it is stopped, and readable when something went wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PATIENCE_S = 40.0


@pytest.fixture
def dev(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """One that stands, and its directory."""
    process = subprocess.Popen(
        [sys.executable, "-m", "meshd.main", "dev", "--nodes", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        said = re.search(r" in (\S+); ctrl-c", process.stdout.readline())
        assert said is not None
        yield process, Path(said[1])
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE_S)


def test_it_leaves_nothing_when_it_is_stopped(dev: tuple[subprocess.Popen[str], Path]) -> None:
    process, directory = dev
    assert directory.exists()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, err) == (0, "")
    assert not directory.exists()


def test_an_agent_that_ends_is_named_and_its_log_is_where_the_hint_says(
    dev: tuple[subprocess.Popen[str], Path],
) -> None:
    process, directory = dev
    agent = _agent_of(process)
    os.kill(agent, signal.SIGKILL)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0
    assert "agent node1 ended with code -9" in err
    log = re.search(r"see (\S+)", err)
    assert log is not None and Path(log[1]).is_relative_to(directory) and "ready" in Path(log[1]).read_text()


def _agent_of(process: subprocess.Popen[str]) -> int:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.02)
    raise AssertionError("it has no agent")
