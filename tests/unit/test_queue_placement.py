"""Label selectors and what an offer lacks."""

from __future__ import annotations

import pytest

from meshd.errors import InvalidRequest
from meshd.model import BackendOffer, Needs, Offer, Resources
from meshd.placement import amounts_of, fits, parse_labels, resources_of
from tests.scene import spec

LABELS = {"zone": "eu", "arch": "x86_64", "gpu.model": "a100"}


@pytest.mark.parametrize(
    ("selector", "is_true"),
    [
        ("", True),
        ("zone=eu", True),
        ("zone == eu", True),
        ("zone=us", False),
        ("zone!=us", True),
        ("spot!=yes", True),
        ("zone in (us, eu)", True),
        ("zone notin (us,eu)", False),
        ("spot notin (yes)", True),
        ("gpu.model", True),
        ("!spot", True),
        ("! zone", False),
        (" zone in (eu,us) , arch=x86_64, !spot ", True),
        ("zone=eu,spot", False),
    ],
)
def test_a_selector_is_true_or_not(selector: str, is_true: bool):
    assert all(term.is_true_of(LABELS) for term in parse_labels(selector)) is is_true


@pytest.mark.parametrize(
    "bad", [",", "a,", ",a", "a b", "a=", "=a", "a in", "a in ()", "a in (b", "!", "a=b;c", "a" + ",a" * 32]
)
def test_a_bad_selector_is_refused(bad: str):
    with pytest.raises(InvalidRequest):
        parse_labels(bad)


def test_lacks_are_named_with_their_reason():
    offer = Offer(
        backends=(BackendOffer("process"),),
        resources=Resources(cpu_milli=2000, memory=1 << 30),
        labels=(("zone", "eu"),),
        missing=(("wasm", "wasmtime is not installed"),),
    )
    job = spec(needs=Needs(resources=Resources(cpu_milli=4000, memory=1 << 29), labels="zone=us"))
    assert fits(job, offer, Resources(memory=1 << 30)) == (
        "backend wasm: wasmtime is not installed",
        "label zone=us",
        "cpu 4 (has cpu 2)",
        "memory 512Mi (free memory 0Mi)",
    )
    assert fits(spec(backend=("wasm", "process")), offer, Resources()) == ()


def test_resources_survive_the_way_there_and_back():
    resources = Resources(cpu_milli=1, memory=2, disk=3, gpu=4, custom=(("a", 5), ("cpu", 6)))
    assert resources_of(amounts_of(resources)) == resources
