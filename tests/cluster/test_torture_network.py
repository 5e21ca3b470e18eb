"""The torture's faults do what they say: packets between real namespaces, a disk that is full, a bit that is flipped."""

from __future__ import annotations

import os
import subprocess
import sys
from random import Random

import pytest

from torture.disks import Disks
from torture.network import Network, lacks

NODES = ["node1", "node2", "node3"]
SENT = 200

RECEIVE = """
import socket, sys
port = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); port.bind(("0.0.0.0", 9)); port.settimeout(0.7)
print("listening", flush=True)
count = 0
try:
    while True:
        port.recv(10); count += 1
except TimeoutError:
    print(count)
"""
SEND = """
import socket, sys, time
port = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(int(sys.argv[2])): port.sendto(bytes(1000), (sys.argv[1], 9)); time.sleep(0.0005)
"""


@pytest.fixture(scope="module")
def network():
    if lack := lacks():
        pytest.skip(f"no torture here: {lack}")
    with Network(NODES) as network:
        yield network


def arrived(network, source, target):
    """How many of 200 packets."""
    inside = network.inside(target)
    receiver = subprocess.Popen([*inside, sys.executable, "-c", RECEIVE], stdout=subprocess.PIPE, text=True)
    assert receiver.stdout is not None and receiver.stdout.readline() == "listening\n"
    command = [*network.inside(source), sys.executable, "-c", SEND, network.host(target), str(SENT)]
    subprocess.run(command, check=True)
    return int(receiver.communicate(timeout=20)[0])


def test_a_cut_is_one_way_and_between_these_two_only_until_it_heals(network):
    assert arrived(network, "node1", "node2") == SENT
    network.cut([("node1", "node2")])
    assert arrived(network, "node1", "node2") == 0
    assert arrived(network, "node2", "node1") == SENT
    assert arrived(network, "node1", "node3") == SENT
    network.heal()
    assert arrived(network, "node1", "node2") == SENT


def test_packets_are_lost_at_the_rate_that_was_asked_for(network):
    network.lose("node2", 30)
    assert 0.4 * SENT < arrived(network, "node1", "node2") < 0.95 * SENT
    network.heal()


def test_a_slow_link_is_slow(network):
    # Of 200 kB a burst of 8 kB passes, and what this rate lets through meanwhile.
    network.slow("node1", 8)
    assert 0 < arrived(network, "node1", "node2") < SENT
    network.heal()


def test_a_full_disk_is_full_until_it_is_freed(tmp_path):
    if lack := lacks():
        pytest.skip(f"no torture here: {lack}")
    with Disks(tmp_path, NODES, small=["node1"]) as disks:
        disks.fill("node1", 0)
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "node1" / "more").write_bytes(b"x" * 8192)
        disks.free()
        disks.fill("node1", 1 << 20)
        status = os.statvfs(tmp_path / "node1")
        assert 0.9 < status.f_bavail * status.f_frsize / (1 << 20) <= 1
        disks.free()
        (tmp_path / "node1" / "more").write_bytes(b"x" * (4 << 20))


def test_one_bit_of_what_was_written_is_flipped(tmp_path):
    raft = tmp_path / "node1" / "data" / "raft"
    with Disks(tmp_path, ["node1"], small=[]) as disks:
        raft.mkdir(parents=True)
        before = b"\x00" * 4096 + b"\xff" * 100 + b"\x00" * 3996
        (raft / "journal-000000000000").write_bytes(before)
        (raft / "reserve-0").write_bytes(b"\xff" * 4096)
        disks.flip("node1", Random(1))
    after = (raft / "journal-000000000000").read_bytes()
    differing = [(at, a ^ b) for at, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert len(differing) == 1 and 4096 <= differing[0][0] < 4196 and differing[0][1].bit_count() == 1
    assert (raft / "reserve-0").read_bytes() == b"\xff" * 4096
