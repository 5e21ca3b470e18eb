"""A short torture of real agents in network namespaces, as CI can afford it; `make torture CYCLES=…` is the long one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from torture.network import lacks
from torture.plan import PARTITIONS, Kill, cycles

REPO = Path(__file__).parents[2]
SEED, CYCLES = 16009, 8
FAULTS = (
    "kill-leader", "kill-follower", "kill-node", "kill-minority", "kill-all", "partition", "one-way", "bridge", "lossy",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def can_be_done() -> None:
    if lack := lacks():
        pytest.skip(f"no torture here: {lack}")


def test_eight_kills_and_each_kind_of_partition_lose_nothing_and_double_nothing(tmp_path):
    planned = list(cycles(SEED, CYCLES, FAULTS))
    assert {cycle.weather for cycle in planned} >= PARTITIONS and {cycle.kill for cycle in planned} == set(Kill)
    command = [sys.executable, "-m", "torture", "--cycles", str(CYCLES), "--seed", str(SEED)]
    done = subprocess.run(
        [*command, "--faults", ",".join(FAULTS), "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=REPO,
        timeout=300,
    )
    line = done.stdout.splitlines()[-1]
    found = re.fullmatch(r"cycles 8 partitions (\d+) acknowledged (\d+) lost 0 doubled 0 stuck 0", line)
    assert found and done.returncode == 0, done.stdout + done.stderr
    assert int(found[1]) >= 3 and int(found[2]) >= 50
    [written] = tmp_path.glob("meshd-*.json")
    result = json.loads(written.read_text())
    assert (result["seed"], result["cycles"], result["lost"]) == (SEED, CYCLES, 0)
