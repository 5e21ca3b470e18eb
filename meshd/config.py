"""How an agent was told to run: frozen, parsed once at the door. Defaults < TOML file < MESHD_* environment < flags.

Nothing else reads environment or configuration files; a `Config` is valid because it exists.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from meshd.errors import InvalidRequest
from meshd.model import Role
from meshd.room import FREE_BYTES_MIN

DEFAULT_PORT = 7373


def default_data_dir() -> Path:
    """/var/lib/meshd for root, else the user's data directory."""
    if os.geteuid() == 0:
        return Path("/var/lib/meshd")
    base = os.environ.get("XDG_DATA_HOME", "")
    return (Path(base) if base else Path.home() / ".local/share") / "meshd"


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """Every field is also a flag of `meshd up` and an environment variable MESHD_<FIELD>."""

    data_dir: str = ""
    name: str = ""
    """For people; the host's name when empty."""
    listen: str = f"0.0.0.0:{DEFAULT_PORT}"
    """HOST:PORT for peers; port 0 picks one."""
    advertise: tuple[str, ...] = ()
    """HOST:PORT under which others find this node, when that is not what it listens on."""
    api: str = ""
    """HOST:PORT of the HTTPS API; empty means only the local socket."""
    roles: tuple[Role, ...] = (Role.SERVER, Role.WORKER)
    """What a founder is; everybody else gets roles from the invite."""
    labels: tuple[str, ...] = ()
    """key=value, for placement."""
    backends: tuple[str, ...] = ()
    """Offer only these; empty means all that work."""
    slots: int = 0
    """Attempts held at a time; 0 is four for each core."""
    cpu: float = 0.0
    """Cores offered; 0 is what the machine has."""
    memory: int = 0
    """Bytes offered; 0 is nine tenths of what the machine has."""
    custom: tuple[str, ...] = ()
    """name=amount of further resources, as gpu=1 or license=3."""
    disk_free: int = FREE_BYTES_MIN
    """Bytes of its disk below which this node takes no new work; a twentieth of the disk where that is more."""
    term_grace_s: float = 5.0
    """Between TERM and KILL when an attempt is stopped."""
    log_level: str = "info"

    @property
    def home(self) -> Path:
        """Absolute: helpers do not work where the agent was started."""
        return (Path(self.data_dir) if self.data_dir else default_data_dir()).absolute()


def load(flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None) -> Config:
    """The configuration that holds. Raises InvalidRequest naming the field and where it came from."""
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values |= tomllib.loads(file.read_text())
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise InvalidRequest(f"cannot read configuration {file}: {error}") from error
    for field in Config.__struct_fields__:
        raw = environ.get(f"MESHD_{field.upper()}")
        if raw:
            is_list = isinstance(getattr(Config(), field), tuple)
            values[field] = [part for part in raw.split(",") if part] if is_list else raw
    values |= {key: value for key, value in flags.items() if value is not None and value != ()}
    try:
        return msgspec.convert(values, Config, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"configuration: {error}", hint="see `meshd up --help`") from error


def split_address(text: str) -> tuple[str, int]:
    """HOST:PORT in parts. Raises InvalidRequest."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise InvalidRequest(f"{text!r} is not HOST:PORT", hint="for example 0.0.0.0:7373")
    return host.strip("[]"), int(port)


def parse_pairs(pairs: tuple[str, ...], what: str) -> tuple[tuple[str, str], ...]:
    """key=value strings, sorted by key. Raises InvalidRequest."""
    found: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise InvalidRequest(f"{what} {pair!r} is not key=value")
        found[key] = value
    return tuple(sorted(found.items()))
