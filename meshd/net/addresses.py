"""Multiaddrs as this mesh uses them: where a TCP port is, and under which of them others may find this node."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path
from typing import NamedTuple

from meshd.errors import InvalidRequest

ADDRESS_CHARS_MAX = 300
"""A DNS name has at most 253."""

_SIOCGIFADDR = 0x8915
_IPV6_TABLE = Path("/proc/net/if_inet6")
_IPV6_GLOBAL, _IPV6_HOST = "00", "10"


class Endpoint(NamedTuple):
    host: str
    """An IP address, or a DNS name."""
    port: int


def parse(address: str) -> Endpoint:
    """`/ip4/…/tcp/…`, `/ip6/…/tcp/…` or `/dns{,4,6}/…/tcp/…`. Raises InvalidRequest."""
    parts = address[: ADDRESS_CHARS_MAX + 1].split("/")
    try:
        if len(address) > ADDRESS_CHARS_MAX or len(parts) != 5:
            raise ValueError("/ip4/HOST/tcp/PORT is expected")
        empty, kind, host, tcp, port = parts
        if empty or tcp != "tcp" or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise ValueError("/ip4/HOST/tcp/PORT is expected")
        if kind == "ip4":
            ipaddress.IPv4Address(host)
        elif kind == "ip6":
            ipaddress.IPv6Address(host)
        elif kind not in ("dns", "dns4", "dns6") or not host:
            raise ValueError(f"{kind} is no kind of address")
    except ValueError as error:
        raise InvalidRequest(f"malformed address {address[:ADDRESS_CHARS_MAX]!r}: {error}") from error
    return Endpoint(host, int(port))


def reachable(host: str, port: int) -> list[str]:
    """The addresses of a socket bound to `host`: itself, or those of every interface if it is bound to all."""
    address = ipaddress.ip_address(host)
    kind = f"ip{address.version}"
    hosts = [host]
    if address.is_unspecified:
        hosts = _interfaces_ip4() if address.version == 4 else _interfaces_ip6()
    return [f"/{kind}/{each}/tcp/{port}" for each in hosts]


def _interfaces_ip4() -> list[str]:
    found: list[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _index, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, request)
            except OSError:
                continue  # it has none
            found.append(socket.inet_ntoa(answer[20:24]))
    return _loopback_last(found or ["127.0.0.1"])


def _interfaces_ip6() -> list[str]:
    found: list[str] = []
    try:
        lines = _IPV6_TABLE.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        number, _index, _prefix, scope, *_rest = line.split()
        if scope in (_IPV6_GLOBAL, _IPV6_HOST):
            found.append(str(ipaddress.IPv6Address(int(number, 16))))
    return _loopback_last(found or ["::1"])


def _loopback_last(hosts: list[str]) -> list[str]:
    return sorted(hosts, key=lambda host: ipaddress.ip_address(host).is_loopback)
