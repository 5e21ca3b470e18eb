"""What the command line prints of what others wrote."""

from __future__ import annotations

from mesh_cli.output import facts, plain


def test_a_lying_worker_cannot_steer_the_terminal():
    assert plain("\x1b[2J\x1b]0;owned\x07 naïve → fine\n\tnext") == "\\x1b[2J\\x1b]0;owned\\x07 naïve → fine\n\tnext"
    assert plain("\u202egnp.exe") == "\\u202egnp.exe"
    assert facts(("reason", "\x1b[31mdone")) == ["reason  \\x1b[31mdone"]
