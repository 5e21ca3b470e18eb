"""A network of our own: a namespace for each node, joined through a bridge in one more, and its faults.

Nothing of it touches the network of the machine. Names carry the harness's process id, so
that what a harness that was itself killed left behind is known by its dead id and removed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PREFIX = "mtorture"
NAMESPACES = Path("/run/netns")
SUBNET = "10.99.0"
PORT = 7373
NEEDS = ("ip", "nsenter", "nft", "tc", "setpriv")


def lacks() -> str:
    """Why no such network can be made here; empty when it can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    missing = [name for name in NEEDS if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: iproute2, nftables, util-linux)"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode != 0:
        return f"no namespace can be made: {made.stderr.strip()}"
    ruled = subprocess.run(
        ["nsenter", f"--net={NAMESPACES / probe}", "nft", "-f", "-"],
        input=_rules([f"{SUBNET}.9"], 5),
        capture_output=True,
        text=True,
    )
    _run("ip", "netns", "del", probe)
    return f"nftables does not work: {ruled.stderr.strip()}" if ruled.returncode != 0 else ""


def remove_stale() -> list[str]:
    """Namespaces, and the processes in them, of harnesses that are no more; their names."""
    removed = []
    for path in sorted(NAMESPACES.glob(f"{PREFIX}-*")) if NAMESPACES.exists() else []:
        found = re.fullmatch(rf"{PREFIX}-(\d+)-.*", path.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            _remove(path.name)
            removed.append(path.name)
    return removed


class Network:
    def __init__(self, nodes: Iterable[str]) -> None:
        self.nodes = list(nodes)
        self._prefix = f"{PREFIX}-{os.getpid()}"
        self._ruled: set[str] = set()
        self._shaped: set[str] = set()

    def __enter__(self) -> Network:
        hub = self._namespace("hub")
        _run("ip", "netns", "add", hub)
        _run("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", hub, "link", "set", "bridge", "up")
        for node in self.nodes:
            mine = self._namespace(node)
            _run("ip", "netns", "add", mine)
            _run("ip", "-n", mine, "link", "add", "eth0", "type", "veth", "peer", "name", node, "netns", hub)
            _run("ip", "-n", hub, "link", "set", node, "master", "bridge", "up")
            _run("ip", "-n", mine, "addr", "add", f"{self.host(node)}/24", "dev", "eth0")
            _run("ip", "-n", mine, "link", "set", "eth0", "up")
            _run("ip", "-n", mine, "link", "set", "lo", "up")
        return self

    def __exit__(self, *error: object) -> None:
        for name in ("hub", *self.nodes):
            with suppress(subprocess.CalledProcessError):
                _remove(self._namespace(name))

    def host(self, node: str) -> str:
        return f"{SUBNET}.{self.nodes.index(node) + 1}"

    def address(self, node: str) -> str:
        return f"{self.host(node)}:{PORT}"

    def inside(self, node: str) -> list[str]:
        """The beginning of a command that runs on this node's network."""
        return ["nsenter", f"--net={NAMESPACES / self._namespace(node)}"]

    # --- faults -------------------------------------------------------------------------------------------------------

    def cut(self, pairs: Iterable[tuple[str, str]]) -> None:
        """What the first of each pair sends does not reach the second."""
        deaf_to: dict[str, list[str]] = {}
        for source, target in sorted(pairs):
            deaf_to.setdefault(target, []).append(self.host(source))
        for target, sources in deaf_to.items():
            self._rule(target, sources, 0)

    def lose(self, node: str, percent: int) -> None:
        """So many of a hundred packets that reach the node are dropped."""
        self._rule(node, [], percent)

    def slow(self, node: str, kbit_s: int) -> None:
        """What the node sends is held to this rate; 200 ms of it wait, the rest is dropped."""
        shape = ("tbf", "rate", f"{kbit_s}kbit", "burst", "8kb", "latency", "200ms")
        _run("tc", "-n", self._namespace(node), "qdisc", "replace", "dev", "eth0", "root", *shape)
        self._shaped.add(node)

    def heal(self) -> None:
        for node in sorted(self._ruled):
            self._rule(node, [], 0)
        for node in sorted(self._shaped):
            _run("tc", "-n", self._namespace(node), "qdisc", "del", "dev", "eth0", "root")
        self._ruled.clear()
        self._shaped.clear()

    def _rule(self, node: str, sources: list[str], percent: int) -> None:
        command = [*self.inside(node), "nft", "-f", "-"]
        subprocess.run(command, input=_rules(sources, percent), text=True, check=True, capture_output=True)
        self._ruled.add(node)

    def _namespace(self, name: str) -> str:
        return f"{self._prefix}-{name}"


def _rules(sources: list[str], percent: int) -> str:
    rules = [f"ip saddr {source} drop" for source in sources]
    if percent:
        rules.append(f'iifname "eth0" numgen random mod 100 < {percent} drop')
    lines = "\n".join(f"    {rule}" for rule in rules)
    return f"""
table inet torture {{}}
delete table inet torture
table inet torture {{
  chain heard {{
    type filter hook input priority 0; policy accept;
{lines}
  }}
}}
"""


def _remove(namespace: str) -> None:
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
    for pid in map(int, listed.stdout.split()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _run("ip", "netns", "del", namespace)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
