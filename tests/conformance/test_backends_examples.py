"""The examples are real programs: their result equals that of a plain Python count, on any bytes."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest

from meshd.testing.backend_suite import BackendSuite, Bench, Program
from tests.guests import ROOT, example

WASM = "meshd.backends.wasm:WasmBackend"


class _Wasm(BackendSuite):
    factory = WASM


def plain_count() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plain_count", ROOT / "examples" / "plain_count.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def run(bench: Bench, name: str, *args: str, item: str | None = None, **given: object) -> Path:
    env = (("MESHD_ITEM", item),) if item is not None else ()
    attempt = bench.attempt(Program(args, example(name)), env=env, **given)  # type: ignore[arg-type]
    outcome = await bench.run(attempt)
    assert outcome.is_success, (outcome, attempt.stderr.read_bytes())
    return attempt.workdir


@pytest.mark.parametrize("seed", range(5))
async def test_word_count_and_reduce_agree_with_a_plain_count(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    sizes = (0, 1, 300, 65535, 65536, 65537)  # around the size of the guest's buffer
    # Few separators in some, so that words span buffers.
    files = {
        f"d{k}/f.py": bytes(
            rng.choices(b"abAB_9 \n\xff\0", [9, 9, 9, 9, 9, 9, *([rng.choice([0.001, 5])] * 4)], k=size)
        )
        for k, size in enumerate(sizes)
    }
    async with _Wasm().serving(tmp_path) as bench:
        mapped = [
            await run(bench, "wordcount", item="\n".join(names), inputs={name: files[name] for name in names})
            for names in (list(files)[:3], list(files)[3:])
        ]
        counts = {f"counts/{k}/counts.txt": (done / "counts.txt").read_bytes() for k, done in enumerate(mapped)}
        total = (await run(bench, "reduce", inputs=counts)) / "total.txt"
        plain = plain_count()
        expected = plain.lines(plain.count(done / name for done in mapped for name in files if (done / name).exists()))
        assert total.read_bytes() == b"".join(line + b"\n" for line in expected)


@pytest.mark.parametrize("env", [(), (("MESHD_ITEM", ""),)])
async def test_word_count_reads_stdin_when_it_has_no_item(tmp_path: Path, env: tuple[tuple[str, str], ...]) -> None:
    async with _Wasm().serving(tmp_path) as bench:
        attempt = bench.attempt(Program((), example("wordcount")), env=env, stdin=b"to be or not to be")
        assert (await bench.run(attempt)).is_success
        assert attempt.stdout.read_bytes() == b"2 be\n1 not\n1 or\n2 to\n"


@pytest.mark.parametrize("line", [b"garbage\n", b"12\n", b"12 \n", b"x 1\n", b"99999999999999999999999 word\n"])
async def test_reduce_refuses_what_is_no_count_and_names_the_file(tmp_path: Path, line: bytes) -> None:
    async with _Wasm().serving(tmp_path) as bench:
        attempt = bench.attempt(Program((), example("reduce")), inputs={"counts/bad.txt": line})
        assert (await bench.run(attempt)).exit_code == 1
        assert b"counts/bad.txt" in attempt.stderr.read_bytes()
