"""What this machine has to offer: what its kernel says, unless the configuration says otherwise."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

from meshd.config import Config
from meshd.model import BackendOffer, BackendProbe, Offer, Resources

SLOTS_PER_CORE = 4
"""Attempts held at a time for each core, unless configured: enough that a free core finds its next one here."""


def make_offer(config: Config, name: str, version: str, probes: Sequence[BackendProbe]) -> Offer:
    labels = dict(config.labels)
    labels |= {"arch": platform.machine(), "os": platform.system().lower(), "name": name}
    works = [probe for probe in probes if probe.works]
    return Offer(
        backends=tuple(BackendOffer(probe.name, probe.version) for probe in works),
        resources=_resources(config),
        labels=tuple(sorted(labels.items())),
        version=version,
        missing=tuple((probe.name, probe.reason[:256]) for probe in probes if not probe.works),
    )


def zone(config: Config) -> str:
    """What fails together with this machine, by its label; empty when nobody said."""
    return dict(config.labels).get("zone", "")


def slots(config: Config) -> int:
    return SLOTS_PER_CORE * _cores() if config.slots is None else config.slots


def _resources(config: Config) -> Resources:
    custom = dict(config.custom)
    home = config.home
    return Resources(
        cpu_milli=int((_cores() if config.cpu is None else config.cpu) * 1000),
        memory=_memory() * 9 // 10 if config.memory is None else config.memory,
        disk=shutil.disk_usage(home if home.exists() else "/").free,
        gpu=custom.pop("gpu", 0),
        custom=tuple(sorted(custom.items())),
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 0
