"""Which offer fits which job, and what does it lack?

`Demand` is what of a job decides where it can run. Jobs with equal demands fit the
same nodes, so the queue compares demands with nodes and never jobs with nodes.

Labels are chosen by terms that must all be true, joined by commas:

    zone=eu    zone!=eu    zone in (eu, us)    zone notin (eu, us)    ssd    !spot

`!=` and `notin` are also true of a node without that label.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from functools import lru_cache

from msgspec import Struct

from meshd.errors import InvalidRequest
from meshd.model import JobSpec, Needs, Offer, Resources
from meshd.units import AMOUNT_MAX

TERMS_MAX = 32
"""Terms in one selector; each is checked against every node that joins."""

_NAME = r"[A-Za-z0-9][A-Za-z0-9._/-]*"
_VALUE = r"[A-Za-z0-9._/:+@-]+"
_TERM = re.compile(
    rf"\s*(?:(?P<absent>!\s*{_NAME})"
    rf"|(?P<name>{_NAME})(?:\s*(?P<op>==|!=|=)\s*(?P<value>{_VALUE})"
    rf"|\s+(?P<set_op>in|notin)\s*\(\s*(?P<values>{_VALUE}(?:\s*,\s*{_VALUE})*)\s*\))?)\s*"
)


class Check(Enum):
    IN = "in"
    NOT_IN = "notin"
    PRESENT = "present"
    ABSENT = "absent"


class Term(Struct, frozen=True):
    name: str
    check: Check
    values: tuple[str, ...] = ()

    def __str__(self) -> str:
        match self.check:
            case Check.PRESENT:
                return self.name
            case Check.ABSENT:
                return f"!{self.name}"
            case Check.IN if len(self.values) == 1:
                return f"{self.name}={self.values[0]}"
            case Check.NOT_IN if len(self.values) == 1:
                return f"{self.name}!={self.values[0]}"
            case _:
                return f"{self.name} {self.check.value} ({', '.join(self.values)})"

    def is_true_of(self, labels: Mapping[str, str]) -> bool:
        match self.check:
            case Check.PRESENT:
                return self.name in labels
            case Check.ABSENT:
                return self.name not in labels
            case Check.IN:
                return labels.get(self.name) in self.values
            case Check.NOT_IN:
                return labels.get(self.name) not in self.values


def parse_labels(text: str) -> tuple[Term, ...]:
    """The terms of a selector; an empty one has none. Raises InvalidRequest."""
    terms: list[Term] = []
    position = 0
    while text[position:].strip():
        match = _TERM.match(text, position)
        if match is None or (match.end() < len(text) and text[match.end()] != ","):
            rest = text[position:].strip()
            raise InvalidRequest(
                f"label selector {text[:100]!r} is not understood at {rest[:40]!r}",
                hint='write it like "zone in (a,b), arch=x86_64, !spot"',
            )
        terms.append(_term(match))
        position = match.end() + 1
    if text.rstrip().endswith(","):
        raise InvalidRequest(f"label selector {text[:100]!r} ends with a comma")
    if len(terms) > TERMS_MAX:
        raise InvalidRequest(f"a label selector has at most {TERMS_MAX} terms, not {len(terms)}")
    return tuple(terms)


def _term(match: re.Match[str]) -> Term:
    if match["absent"]:
        return Term(match["absent"][1:].strip(), Check.ABSENT)
    if match["op"]:
        return Term(match["name"], Check.NOT_IN if match["op"] == "!=" else Check.IN, (match["value"],))
    if match["set_op"]:
        values = tuple(value.strip() for value in match["values"].split(","))
        return Term(match["name"], Check(match["set_op"]), values)
    return Term(match["name"], Check.PRESENT)


class Demand(Struct, frozen=True):
    """What a job asks of a node. Raises InvalidRequest when made from a spec with a bad label selector."""

    backends: tuple[str, ...]
    amounts: tuple[tuple[str, int], ...]
    terms: tuple[Term, ...]

    @classmethod
    def of(cls, spec: JobSpec) -> Demand:
        return _demand_of(spec.backend, spec.needs)


@lru_cache(maxsize=1024)
def _demand_of(backends: tuple[str, ...], needs: Needs) -> Demand:
    """Remembered: most jobs ask for what others ask for, and each asks twice."""
    return Demand(backends, tuple(amounts_of(needs.resources).items()), parse_labels(needs.labels))


def amounts_of(resources: Resources) -> dict[str, int]:
    """Resources by name, without zeros. Custom ones cannot hide the built-in ones: those have a space in front.

    Named several times they add up to `AMOUNT_MAX` at most: what is used of a total must be a number that views can say.
    """
    amounts = {
        " cpu": resources.cpu_milli,
        " memory": resources.memory,
        " disk": resources.disk,
        " gpu": resources.gpu,
    }
    for name, amount in resources.custom:
        amounts[name.strip()] = min(amounts.get(name.strip(), 0) + amount, AMOUNT_MAX)
    return {name: amount for name, amount in amounts.items() if amount}


def resources_of(amounts: Mapping[str, int]) -> Resources:
    """The inverse of `amounts_of`."""
    return Resources(
        cpu_milli=amounts.get(" cpu", 0),
        memory=amounts.get(" memory", 0),
        disk=amounts.get(" disk", 0),
        gpu=amounts.get(" gpu", 0),
        custom=tuple(sorted((name, amount) for name, amount in amounts.items() if amount and name[:1] != " ")),
    )


def rank(demand: Demand, offer: Offer) -> int | None:
    """Which of the demand's backends this node would use when it is idle, by position; None: it can never run it."""
    if permanent_lacks(demand, offer):
        return None
    offered = {backend.name for backend in offer.backends}
    return next(i for i, name in enumerate(demand.backends) if name in offered)


def permanent_lacks(demand: Demand, offer: Offer) -> tuple[str, ...]:
    """Why the node could not run it even when idle, for people; empty when it could."""
    lacks: list[str] = []
    offered = {backend.name for backend in offer.backends}
    if not offered.intersection(demand.backends):
        missing = dict(offer.missing)
        for name in demand.backends:
            why = missing.get(name)
            lacks.append(f"backend {name}: {why}" if why else f"backend {name}")
    labels = dict(offer.labels)
    lacks.extend(f"label {term}" for term in demand.terms if not term.is_true_of(labels))
    total = amounts_of(offer.resources)
    lacks.extend(
        f"{_amount(name, amount)} (has {_amount(name, total.get(name, 0))})"
        for name, amount in demand.amounts
        if total.get(name, 0) < amount
    )
    return tuple(lacks)


def passing_lacks(demand: Demand, offer: Offer, used: Mapping[str, int]) -> tuple[str, ...]:
    """What is taken just now by others, of what the node has enough of in all."""
    total = amounts_of(offer.resources)
    return tuple(
        f"{_amount(name, amount)} (free {_amount(name, max(total.get(name, 0) - used.get(name, 0), 0))})"
        for name, amount in demand.amounts
        if total.get(name, 0) >= amount > total.get(name, 0) - used.get(name, 0)
    )


def fits(spec: JobSpec, offer: Offer, used: Resources) -> tuple[str, ...]:
    """All that this offer lacks for the job, for people; empty when it fits. Raises InvalidRequest (bad selector)."""
    demand = Demand.of(spec)
    return permanent_lacks(demand, offer) + passing_lacks(demand, offer, amounts_of(used))


def _amount(name: str, amount: int) -> str:
    match name:
        case " cpu":
            return f"cpu {amount / 1000:g}"
        case " memory" | " disk":
            return f"{name.strip()} {amount / (1 << 20):.0f}Mi"
        case _:
            return f"{name.strip()} {amount}"
