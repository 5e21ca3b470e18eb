"""Small C programs for tests, compiled to WASI once for each version of their source."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "guests"
FLAGS = ("-target", "wasm32-wasi", "-O2", "-s")


def guest(name: str = "guest") -> Path:
    """The module compiled from tests/guests/NAME.c."""
    return compile_c(Path(__file__).with_name(f"{name}.c"))


def example(name: str) -> Path:
    """The module compiled from examples/NAME.c."""
    return compile_c(ROOT / "examples" / f"{name}.c")


def compile_c(source: Path) -> Path:
    """Takes seconds the first time, nothing afterwards. Safe for several test processes at once."""
    sources = [source, *sorted(source.parent.glob("*.h"))]
    digest = hashlib.sha256(repr(FLAGS).encode() + b"".join(file.read_bytes() for file in sources)).hexdigest()[:16]
    module = CACHE / f"{source.stem}-{digest}.wasm"
    if not module.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            beside = Path(scratch, "module.wasm")
            command = [sys.executable, "-m", "ziglang", "cc", *FLAGS, "-o", str(beside), str(source)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{source.name} does not compile:\n{done.stderr}"
            beside.rename(module)
    return module
