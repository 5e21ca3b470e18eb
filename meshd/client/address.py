"""Where a node's API is: a local socket, or HOST:PORT behind TLS."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from meshd.errors import InvalidRequest

SOCKET_NAME = "api.sock"


@dataclass(frozen=True, slots=True)
class Address:
    """Either `path` or `host` and `port`."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """`HOST:PORT`, `https://HOST:PORT`, `unix:PATH` or an absolute path. Raises InvalidRequest."""
    text = text.strip()
    if text.startswith(("unix:", "/")):
        return Address(path=text.removeprefix("unix:"))
    host, _, port = text.removeprefix("https://").rstrip("/").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or len(port) > 5 or not 0 < int(port) < 65536 or "/" in host:
        raise InvalidRequest(f"{text!r} is not an address", hint="write HOST:PORT, or unix:PATH for a local agent")
    return Address(host=host, port=int(port))


def local_address() -> Address:
    """Of this user's agent on this machine, or else of the system's, where there is one."""
    directory = os.environ.get("MESHD_DATA_DIR", "")
    if directory:
        return Address(path=str(Path(directory) / SOCKET_NAME))
    base = os.environ.get("XDG_DATA_HOME", "") or str(Path.home() / ".local/share")
    own, system = Path(base) / "meshd" / SOCKET_NAME, Path("/var/lib/meshd") / SOCKET_NAME
    return Address(path=str(system if os.geteuid() == 0 or (not own.exists() and os.access(system, os.W_OK)) else own))
