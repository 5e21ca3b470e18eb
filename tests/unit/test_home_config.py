from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from meshd import config
from meshd.admission.home import Counters, Home, KnownPeer
from meshd.errors import Busy, Corrupt, InvalidRequest, StartRefused
from meshd.model import NodeId, Role
from meshd.raft.storage.disk import DirectoryDisk
from meshd.raft.storage.opening import open_log
from meshd.work.offer import make_offer, slots


def test_flags_beat_the_environment_and_that_beats_the_file(tmp_path):
    file = tmp_path / "meshd.toml"
    file.write_text('name = "file"\nlisten = "1.1.1.1:1"\nslots = 3\nlabels = ["a=1"]\n')
    environ = {"MESHD_LISTEN": "2.2.2.2:2", "MESHD_LABELS": "b=2,c=3", "MESHD_ROLES": "server", "OTHER": "x"}
    found = config.load({"slots": 9, "name": None, "labels": ()}, environ, file)
    assert (found.name, found.listen, found.slots) == ("file", "2.2.2.2:2", 9)
    assert found.labels == (("b", "2"), ("c", "3")) and found.roles == (Role.SERVER,)


@pytest.mark.parametrize("text", ["nonsense = 1", "slots = 'many'", "[", "roles = ['king']"])
def test_a_wrong_setting_is_named(tmp_path, text):
    file = tmp_path / "meshd.toml"
    file.write_text(text)
    with pytest.raises(InvalidRequest):
        config.load({}, {}, file)


@pytest.mark.parametrize(
    ("field", "flag", "value"),
    [
        ("cpu", "--cpu", "nan"),
        ("cpu", "--cpu", "inf"),
        ("cpu", "--cpu", -1.0),
        ("slots", "--slots", -3),
        ("memory", "--memory", "-1"),
        ("disk_free", "--disk-free", "lots"),
        ("api", "--api", "host:bad"),
        ("listen", "--listen", "7373"),
        ("advertise", "--advertise", "host"),
        ("custom", "--resource", "gpu"),
        ("custom", "--resource", "gpu=-1"),
        ("custom", "--resource", "gpu=99999999999999999999"),
        ("labels", "--label", "zone"),
        ("labels", "--label", "zone=" + "z" * 300),
        ("backends", "--backend", "docker"),
        ("roles", "--role", "king"),
        ("name", "--name", "n" * 300),
        ("term_grace_s", "--term-grace-s", "nan"),
        ("log_level", "--log-level", "loud"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_the_name_under_which_it_was_given(tmp_path, field, flag, value):
    is_list = field in ("advertise", "custom", "labels", "backends", "roles")
    file = tmp_path / "meshd.toml"
    file.write_text(f"{field} = {json.dumps([value] if is_list else value)}")
    ways = {
        flag: ({field: (value,) if is_list else value}, {}, None),
        f"MESHD_{field.upper()}": ({}, {f"MESHD_{field.upper()}": str(value)}, None),
        f"{field} in {file}": ({}, {}, file),
    }
    for where, given in ways.items():
        with pytest.raises(InvalidRequest) as caught:
            config.load(*given)
        assert caught.value.message.startswith(f"{where}: ") and len(caught.value.message) < 300 + len(str(file))


def test_none_of_something_is_none_of_it_and_not_given_is_what_the_machine_has():
    nothing = config.load({"cpu": 0.0, "slots": 0, "memory": "0"}, {})
    assert (nothing.cpu, nothing.slots, nothing.memory) == (0.0, 0, 0)
    offered = make_offer(nothing, "n", "1", ()).resources
    assert (offered.cpu_milli, offered.memory, slots(nothing)) == (0, 0, 0)
    silent = config.load({}, {})
    offered = make_offer(silent, "n", "1", ()).resources
    assert offered.cpu_milli and offered.memory and slots(silent)


def test_sizes_and_amounts_are_read_in_every_way(tmp_path):
    file = tmp_path / "meshd.toml"
    file.write_text('disk_free = "4Gi"\ncustom = ["gpu=2", "license=3"]\n')
    found = config.load({}, {"MESHD_MEMORY": "1Gi"}, file)
    assert (found.disk_free, found.memory, found.custom) == (4 << 30, 1 << 30, (("gpu", 2), ("license", 3)))


def test_a_backend_that_is_not_installed_is_refused_with_those_that_are():
    with pytest.raises(InvalidRequest) as caught:
        config.load({"backends": ("docker",)}, {})
    assert "process" in caught.value.hint and "wasm" in caught.value.hint
    assert config.load({"backends": ("wasm",)}, {}).backends == ("wasm",)


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:x", "host:70000"])
def test_an_address_is_host_and_port(text):
    with pytest.raises(InvalidRequest):
        config.split_address(text)


def test_one_agent_at_a_time_uses_a_directory_and_the_second_is_told_who_does(tmp_path):
    first = Home(tmp_path / "d")
    with pytest.raises(StartRefused, match=f"pid {os.getpid()}"):
        Home(tmp_path / "d")
    first.close()
    Home(tmp_path / "d").close()


def test_a_directory_that_cannot_be_used_is_a_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StartRefused, match="cannot use data directory"):
        Home(tmp_path / "file" / "d")


def test_counters_survive_and_are_private(tmp_path):
    home = Home(tmp_path / "d")
    assert home.counters() == Counters()
    home.write_counters(Counters(3, 7))
    assert home.counters() == Counters(3, 7)
    assert (tmp_path / "d" / "counters.json").stat().st_mode & 0o077 == 0


def test_what_must_not_be_forgotten_is_an_error_when_damaged_and_a_hint_is_not(tmp_path):
    home = Home(tmp_path / "d")
    home.write_peers((KnownPeer(NodeId("a"), "a", ("/ip4/1.1.1.1/tcp/1",)),))
    assert [peer.name for peer in home.peers()] == ["a"]
    for name in ("counters.json", "peers.json", "mesh.json"):
        (home.path / name).write_bytes(b"\xff{")
    assert home.peers() == ()
    for read in (home.counters, home.mesh):
        with pytest.raises(Corrupt):
            read()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, and what fills it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "meshd-test", disk], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk):
    with (disk / "ballast").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_on_a_full_disk_the_counters_are_raised_all_the_same(small_disk):
    home = Home(small_disk / "d")
    home.write_counters(Counters(1, 1))
    fill(small_disk)
    for start in range(2, 20):
        home.write_counters(Counters(start, 1))
        fill(small_disk)
    home.close()
    again = Home(small_disk / "d")
    again.write_counters(Counters(20, 1))
    assert again.counters() == Counters(20, 1)
    again.close()


def test_on_a_full_disk_what_does_not_fit_is_refused_and_what_stood_there_stays(small_disk):
    home = Home(small_disk / "d")
    one = KnownPeer(NodeId("a"), "a", ("/ip4/1.1.1.1/tcp/1",))
    home.write_peers((one,))
    fill(small_disk)
    with pytest.raises(Busy, match="the disk is full"):
        home.write_peers((one,) * 2000)
    assert home.peers() == (one,)
    (small_disk / "ballast").unlink()
    home.write_peers((one,) * 2000)
    assert len(home.peers()) == 2000
    home.close()


def test_a_journal_that_a_crash_left_half_made_is_none(tmp_path):
    """Else the first start of a mesh, killed at the wrong moment, is followed by one that founds nothing for ever."""
    home = Home(tmp_path / "d")
    home.raft.mkdir()
    disk = DirectoryDisk(home.raft)

    def killed(name: str, to: str) -> None:
        raise KeyboardInterrupt

    disk.rename = killed
    founding = functools.partial(
        open_log, mesh="m", lineage=(), me=NodeId("a"), is_founding=True, random="aa", incarnation="01"
    )
    with pytest.raises(KeyboardInterrupt):
        founding(disk)
    disk.close()
    assert os.listdir(home.raft) != ["lock"], "it was killed in between"
    assert not home.has_journal()
    journal, _ = founding(disk := DirectoryDisk(home.raft))
    assert journal.header.founding and home.has_journal()
    journal.close()
    disk.close()


def test_a_disk_that_fails_is_named_and_what_was_there_stays(tmp_path, monkeypatch):
    home = Home(tmp_path / "d")
    home.write_counters(Counters(3, 7))

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Corrupt, match=r"counters\.json.*Input/output error"):
        home.write_counters(Counters(4, 7))
    assert home.counters() == Counters(3, 7)


def test_two_threads_that_write_one_file_do_not_trip_over_each_other(tmp_path):
    home = Home(tmp_path / "d")
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: home.write_peers((KnownPeer(NodeId(f"n{n}"), "n", ()),)), range(400)))
    assert len(home.peers()) == 1


def test_a_data_directory_is_absolute_since_helpers_work_elsewhere() -> None:
    assert config.Config(data_dir="here").home == Path.cwd() / "here"
