"""Attack the decoders: `python -m fuzz TARGET --seconds 600`, or `--all`. Needs atheris, which `make fuzz` installs.

--replay   the corpus only, without atheris        --seconds N  for each target
--all      every target, --jobs at a time          --input F    one input, as a crash left it
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from fuzz.registry import CORPUS_INPUTS_MAX, INPUT_BYTES_MAX, NAMES, load
from fuzz.world import be_quiet

RSS_MB_MAX = 1024
"""An agent is bounded far below; what takes more for one input of a few KiB is a bomb."""
INPUT_S_MAX = 20
"""Per input, on a machine that does much else."""
INSTRUMENTED = ["meshd", "h11", "mesh_cli"]
CRASHES = Path("fuzz-crashes")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("target", nargs="*", choices=[[], *NAMES], help=", ".join(NAMES))
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--replay", action="store_true")
    parser.add_argument("--input", type=Path)
    arguments = parser.parse_args()
    names = list(NAMES) if arguments.all else list(arguments.target)
    if not names:
        parser.error("name a target, or say --all")
    be_quiet()
    if arguments.replay or arguments.input:
        for name in names:
            target = load(name)
            inputs = [arguments.input.read_bytes()] if arguments.input else target.corpus()
            began_s = time.process_time()
            for data in inputs:
                target.fuzz(data)
            print(f"{name}: {len(inputs)} inputs, {time.process_time() - began_s:.2f} s of CPU")
    elif len(names) == 1:
        _attack(names[0], arguments.seconds)
    else:
        sys.exit(_attack_all(names, arguments.seconds, arguments.jobs))


def _attack_all(names: list[str], seconds: int, jobs: int) -> int:
    """A process for each, `jobs` at a time; a line for each as it ends. How many crashed."""
    waiting, running, crashed = list(names), dict[str, subprocess.Popen[bytes]](), 0
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            command = [sys.executable, "-m", "fuzz", name, "--seconds", str(seconds)]
            running[name] = subprocess.Popen(command)
        for name, process in list(running.items()):
            if process.poll() is not None:
                crashed += process.returncode != 0
                del running[name]
        time.sleep(0.2)
    return crashed


def _attack(name: str, seconds: int) -> None:
    """libFuzzer ends the process that it runs in, so it gets one of its own; its findings go into the corpus here."""
    target = load(name)
    known = target.corpus()
    CRASHES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-") as directory:
        corpus, smaller = Path(directory, "corpus"), Path(directory, "smaller")
        corpus.mkdir()
        smaller.mkdir()
        for number, data in enumerate(known):
            (corpus / f"known-{number}").write_bytes(data)
        starter = _starter(name, Path(directory))
        began_s = time.monotonic()
        run = _libfuzzer(starter, [f"-max_total_time={seconds}", f"-artifact_prefix={CRASHES}/{name}-", str(corpus)])
        ran_s = time.monotonic() - began_s
        _libfuzzer(starter, ["-merge=1", str(smaller), str(corpus)])
        if run.returncode == 0:
            target.keep(file.read_bytes() for file in smaller.iterdir())
    log = run.stderr.decode(errors="replace")
    (CRASHES / f"{name}.log").write_text(log)
    executions = re.findall(r"^#(\d+)", log, re.MULTILINE)
    coverage = re.findall(r"cov: (\d+) ft: (\d+)", log)
    verdict = "no crash" if run.returncode == 0 else f"CRASHED ({run.returncode}), see {CRASHES}/{name}.log"
    print(
        f"{name}: {ran_s:.0f} s, {executions[-1] if executions else 0} executions, "
        f"coverage {'/'.join(coverage[-1]) if coverage else '?'} (edges/features), "
        f"corpus {len(target.corpus())} of at most {CORPUS_INPUTS_MAX}: {verdict}",
        flush=True,
    )
    sys.exit(run.returncode)


def _starter(name: str, directory: Path) -> Path:
    """A program, since libFuzzer starts itself again by its name when it merges."""
    starter = directory / "target"
    code = f"import sys; sys.argv[0] = {str(starter)!r}; from fuzz.__main__ import instrumented; instrumented({name!r})"
    starter.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    starter.chmod(0o700)
    return starter


def _libfuzzer(starter: Path, options: list[str]) -> subprocess.CompletedProcess[bytes]:
    limits = [f"-rss_limit_mb={RSS_MB_MAX}", f"-timeout={INPUT_S_MAX}", f"-max_len={INPUT_BYTES_MAX}", "-len_control=0"]
    command = [str(starter), *options, *limits]
    return subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, check=False)


def instrumented(name: str) -> None:
    """In a process of its own: everything of ours that the target imports is counted, then attacked."""
    import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

    be_quiet()
    with atheris.instrument_imports(include=INSTRUMENTED):
        target = load(name)
    others = target.corpus()

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)  # noqa: S311
        if random.random() < 0.25:
            return atheris.Mutate(data, max_size)  # type: ignore[no-any-return]
        from fuzz.mutate import mutated

        return mutated(data, random, is_framed=target.is_framed, others=others)[:max_size]

    _setup(atheris.Setup, target.fuzz, mutate)
    atheris.Fuzz()


def _setup(setup: Callable[..., object], fuzz: Callable[[bytes], None], mutate: Callable[..., bytes]) -> None:
    setup(sys.argv, fuzz, custom_mutator=mutate)


if __name__ == "__main__":
    main()
