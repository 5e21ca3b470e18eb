"""How an agent was told to run: frozen, parsed once at the door. Defaults < TOML file < MESHD_* environment < flags.

Nothing else reads environment or configuration files; a `Config` is valid because it exists.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from meshd.errors import InvalidRequest, MeshError
from meshd.model import Count, Role, ShortText
from meshd.room import FREE_BYTES_MIN
from meshd.units import parse_size, shorten

DEFAULT_PORT = 7373
BACKENDS = "meshd.backends"
"""The entry points under which backends are installed."""


def default_data_dir() -> Path:
    """/var/lib/meshd for root, else the user's data directory."""
    if os.geteuid() == 0:
        return Path("/var/lib/meshd")
    base = os.environ.get("XDG_DATA_HOME", "")
    return (Path(base) if base else Path.home() / ".local/share") / "meshd"


class Config(Struct, frozen=True):
    """Every field is also a flag of `meshd up` and an environment variable MESHD_<FIELD>."""

    data_dir: str = ""
    name: ShortText = ""
    """For people; the host's name when empty."""
    listen: str = f"0.0.0.0:{DEFAULT_PORT}"
    """HOST:PORT for peers; port 0 picks one."""
    advertise: tuple[str, ...] = ()
    """HOST:PORT under which others find this node, when that is not what it listens on."""
    api: ShortText = ""
    """HOST:PORT of the HTTPS API; empty means only the local socket."""
    roles: tuple[Role, ...] = (Role.SERVER, Role.WORKER)
    """What a founder is; everybody else gets roles from the invite."""
    labels: tuple[tuple[ShortText, ShortText], ...] = ()
    """Written key=value; for placement."""
    backends: tuple[str, ...] = ()
    """Offer only these; empty means all that work."""
    slots: Count | None = None
    """Attempts held at a time; None is four for each core, 0 takes no work."""
    cpu: Annotated[float, Meta(ge=0, le=1_000_000)] | None = None
    """Cores offered; None is what the machine has."""
    memory: Count | None = None
    """Bytes offered; None is nine tenths of what the machine has."""
    custom: tuple[tuple[ShortText, Count], ...] = ()
    """Further resources, written name=amount, as gpu=1 or license=3."""
    disk_free: Count = FREE_BYTES_MIN
    """Bytes of its disk below which this node takes no new work; a twentieth of the disk where that is more."""
    term_grace_s: Annotated[float, Meta(ge=0, le=86_400)] = 5.0
    """Between TERM and KILL when an attempt is stopped."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def home(self) -> Path:
        """Absolute: helpers do not work where the agent was started."""
        return (Path(self.data_dir) if self.data_dir else default_data_dir()).absolute()


def load(flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None) -> Config:
    """The configuration that holds. Raises InvalidRequest naming the setting, as it was given."""
    values: dict[str, Any] = {}
    for field, (where, value) in _given(flags, environ, file).items():
        try:
            parsed = _PARSERS[field](value) if field in _PARSERS else value
            values[field] = msgspec.convert(parsed, _TYPES[field], strict=False)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"{where}: {shorten(value)}: {error}", hint="see `meshd up --help`") from error
        except MeshError as error:
            raise InvalidRequest(f"{where}: {error.message}", hint=error.hint or "see `meshd up --help`") from error
    return Config(**values)


def _given(flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None) -> dict[str, tuple[str, Any]]:
    """What was said of each field, and under which name."""
    found: dict[str, tuple[str, Any]] = {}
    if file is not None:
        try:
            written = tomllib.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"cannot read configuration {file}: {error}") from error
        for key, value in written.items():
            if key not in _TYPES:
                raise InvalidRequest(
                    f"{key} in {file}: there is no such setting", hint=f"there are: {', '.join(_TYPES)}"
                )
            found[key] = f"{key} in {file}", value
    for field in _TYPES:
        variable = f"MESHD_{field.upper()}"
        if raw := environ.get(variable):
            is_list = isinstance(getattr(_DEFAULTS, field), tuple)
            found[field] = variable, [part for part in raw.split(",") if part] if is_list else raw
    for field, value in flags.items():
        if value is not None and value != ():
            found[field] = f"--{_FLAGS.get(field) or field.replace('_', '-')}", value
    return found


def split_address(text: str) -> tuple[str, int]:
    """HOST:PORT in parts. Raises InvalidRequest."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise InvalidRequest(f"{text!r} is not HOST:PORT", hint="for example 0.0.0.0:7373")
    return host.strip("[]"), int(port)


def _address(value: object) -> object:
    if value:
        split_address(str(value))
    return value


def _addresses(value: object) -> tuple[str, ...]:
    texts = _texts(value)
    for text in texts:
        split_address(text)
    return texts


def _pairs(value: object) -> tuple[tuple[str, str], ...]:
    """key=value strings, sorted by key."""
    found: dict[str, str] = {}
    for pair in _texts(value):
        key, separator, text = pair.partition("=")
        if not separator or not key:
            raise InvalidRequest(f"{shorten(pair)} is not key=value")
        found[key] = text
    return tuple(sorted(found.items()))


def _amounts(value: object) -> tuple[tuple[str, int], ...]:
    """name=amount strings, sorted by name."""
    pairs = _pairs(value)
    for name, amount in pairs:
        if not (amount.isascii() and amount.isdigit() and len(amount) < 16):
            raise InvalidRequest(f"{shorten(f'{name}={amount}')}: the amount is not a whole number")
    return tuple((name, int(amount)) for name, amount in pairs)


def _installed(value: object) -> tuple[str, ...]:
    names = _texts(value)
    installed = sorted({point.name for point in entry_points(group=BACKENDS)})
    for name in names:
        if name not in installed:
            raise InvalidRequest(f"there is no backend {shorten(name)}", hint=f"there are: {', '.join(installed)}")
    return names


def _texts(value: object) -> tuple[str, ...]:
    return msgspec.convert(value, tuple[str, ...])


_PARSERS: Mapping[str, Callable[[Any], object]] = {
    "listen": _address,
    "advertise": _addresses,
    "api": _address,
    "labels": _pairs,
    "backends": _installed,
    "memory": parse_size,
    "custom": _amounts,
    "disk_free": parse_size,
}
_FLAGS = {"roles": "role", "labels": "label", "backends": "backend", "custom": "resource"}
"""Flags that are not called as their field."""
_TYPES = {field.name: field.type for field in msgspec.structs.fields(Config)}
_DEFAULTS = Config()
