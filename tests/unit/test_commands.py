"""Commands as bytes, before anything applies them."""

from __future__ import annotations

import pytest

from meshd import codec
from meshd.raft.state.commands import Cancel, Command, Report, RetryJob, Submit, adds_work
from tests.scene import spec


@pytest.mark.parametrize(
    ("command", "waits"),
    [
        (Submit("0198c0de000000000000000000", spec()), True),
        (RetryJob("0198c0de000000000000000000", "0198c0de000000000000000001"), True),
        (Cancel("0198c0de000000000000000000"), False),
        (Report(1, 1), False),
    ],
)
def test_a_full_disk_refuses_what_adds_work_and_nothing_that_ends_it(command: Command, waits: bool) -> None:
    assert adds_work(codec.encode(command)) == waits


def test_nonsense_adds_no_work() -> None:
    assert not adds_work(b"\xc1")
