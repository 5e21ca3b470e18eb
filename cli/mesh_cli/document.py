"""From the flags of `mesh run` and `mesh submit` to a job document; they say the same as a job file, and override it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from meshd.errors import InvalidRequest, NotFound

F = TypeVar("F", bound=Callable[..., Any])

FILE_BYTES_MAX = 1 << 20
"""Of a job file; the API takes no more either."""
ATTEMPTS_MAX = 1000
"""Of a task, the first included (`retry.attempts`)."""
NO_JSON = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("timestamp", "binary", "set"))
WASM_MAGIC = b"\0asm"


def job_options(command: F) -> F:
    """Everything that describes a job."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


_OPTIONS = (
    click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[--] COMMAND [ARGS]..."),
    click.option("--file", "-f", type=click.Path(dir_okay=False), help="A job file, YAML or JSON; - is stdin."),
    click.option("--name", help="For people and selectors."),
    click.option(
        "--backend", multiple=True, metavar="NAME", help="wasm or process; several are alternatives in order."
    ),
    click.option("--cpu", metavar="CORES", help="Cores needed, as 1, 0.5 or 500m."),
    click.option("--memory", metavar="SIZE", help="Memory needed, and the limit where the backend can keep one."),
    click.option("--gpu", type=int, help="GPUs needed."),
    click.option("--disk", metavar="SIZE", help="Disk needed."),
    click.option("--need", multiple=True, metavar="NAME=N", help="An amount of another resource."),
    click.option("--need-label", metavar="EXPR", help='Which nodes: "zone in (a,b), arch=x86_64, !spot".'),
    click.option("--env", "-e", multiple=True, metavar="K[=V]", help="A variable; without =V, as it is here."),
    click.option("--label", "-l", multiple=True, metavar="K=V", help="The job's own label, for selectors."),
    click.option("--array", metavar="RANGE", help="Many tasks: 10, 1-1000, 0-100:10, 1-1000%50 (50 at once)."),
    click.option("--each-line", type=click.Path(), metavar="FILE", help="A task for each line of a file."),
    click.option("--each-file", type=click.Path(), metavar="DIR", help="A task for each file below a directory."),
    click.option("--per-task", type=int, help="With --each-file: so many files each."),
    click.option("--at-once", type=int, help="At most so many tasks at a time."),
    click.option("--max-fails", type=int, help="Cancel the rest after more than so many failed tasks."),
    click.option(
        "--input", multiple=True, metavar="PATH=SRC", help="SRC: a file, a directory, blob:, tree: or job:ID."
    ),
    click.option(
        "--output", multiple=True, metavar="PATH", help="A file, glob or directory/ to keep; see `job result`."
    ),
    click.option("--stdin", metavar="FILE", help="What the job reads on stdin."),
    click.option("--interactive", "-i", is_flag=True, help="Pass on what this command reads on stdin, to its end."),
    click.option("--retries", type=click.IntRange(0, ATTEMPTS_MAX - 1), help="Run a failed task again, so many times."),
    click.option("--backoff", metavar="D..D", help="Pause before a retry, as 2s..5m."),
    click.option("--timeout", metavar="DURATION", help="How long an attempt may run."),
    click.option("--queue-timeout", metavar="DURATION", help="How long it may wait for a node."),
    click.option("--total-timeout", metavar="DURATION", help="How long all of it may take."),
    click.option("--on-lost", metavar="WHAT", help="If its node is lost: rerun, wait (never two at once) or fail."),
    click.option("--lost-after", metavar="DURATION", help="How long a lost node may come back; auto."),
    click.option("--priority", type=int, help="0 to 100; 50."),
    click.option("--replicas", type=int, help="On how many nodes inputs and results are kept; 2."),
    click.option("--fuel", type=int, help="wasm: units of deterministic work."),
    click.option("--output-max", metavar="SIZE", help="Limit for stdout and stderr, each; 64Mi."),
    click.option("--id", "job_id", metavar="UUID", help="A fresh UUIDv7 of yours: repeating the command is then safe."),
)


def make_document(flags: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """The document, and where the paths in it start. Raises InvalidRequest, NotFound."""
    document, base = _read_file(flags["file"]) if flags["file"] else ({}, Path.cwd())
    run = _section(document, "run")
    command = list(flags["command"])
    if command:
        _set_command(run, command, flags["backend"])
    if flags["env"]:
        run["env"] = {**_mapping(run.get("env"), "run.env"), **dict(_variable(text) for text in flags["env"])}
    _put(run, "fuel", flags["fuel"])
    _put(run, "stdin", _here(flags["stdin"]))
    _put(document, "run", run)
    for key in ("name", "priority", "replicas", "on_lost", "lost_after", "output_max"):
        _put(document, key, flags[key])
    _put(document, "backend", list(flags["backend"]))
    _put(document, "outputs", list(flags["output"]))
    _update(document, "labels", dict(_pair(text, "--label") for text in flags["label"]))
    inputs = {name: _here(source) for name, source in (_pair(text, "--input") for text in flags["input"])}
    _update(document, "inputs", inputs)
    needs = {key: flags[key] for key in ("cpu", "memory", "gpu", "disk") if flags[key] is not None}
    needs |= {
        name: _number(amount, f"--need {name}") for name, amount in (_pair(text, "--need") for text in flags["need"])
    }
    if flags["need_label"]:
        needs["labels"] = flags["need_label"]
    _update(document, "needs", needs)
    retry = {} if flags["retries"] is None else {"attempts": flags["retries"] + 1}
    _update(document, "retry", retry | ({"backoff": flags["backoff"]} if flags["backoff"] else {}))
    timeouts = {"run": flags["timeout"], "queue": flags["queue_timeout"], "total": flags["total_timeout"]}
    _update(document, "timeout", {key: value for key, value in timeouts.items() if value is not None})
    _set_array(document, flags)
    if not document.get("run"):
        raise InvalidRequest(
            "nothing to run", hint="mesh run -- COMMAND [ARGS], mesh run MODULE.wasm, or --file job.yaml"
        )
    return document, base


def _read_file(name: str) -> tuple[dict[str, Any], Path]:
    if name == "-":
        data, base = sys.stdin.buffer.read(FILE_BYTES_MAX + 1), Path.cwd()
    else:
        path = Path(name)
        if not path.exists():
            raise NotFound(f"there is no job file {name}")
        with path.open("rb") as file:
            data, base = file.read(FILE_BYTES_MAX + 1), path.resolve().parent
    if len(data) > FILE_BYTES_MAX:
        raise InvalidRequest(f"job file {name} is over {FILE_BYTES_MAX} bytes", hint="long lists go into a file of their own: array.each_line")  # fmt: skip
    return parse_file(data, name), base


def parse_file(data: bytes, name: str) -> dict[str, Any]:
    """What a job file says, as YAML or JSON. Raises InvalidRequest."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Of what JSON can say too: a date is text, as it is written; bytes and sets are refused."""

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in NO_JSON]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.yaml_constructors = {
        tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag not in NO_JSON
    }
    try:
        document = Loader(data).get_single_data()
    except Exception as error:  # its constructors raise whatever their own calls do: KeyError, AttributeError, …
        where = getattr(error, "problem_mark", None)
        place = f", line {where.line + 1}" if where else ""
        raise InvalidRequest(f"job file {name}{place}: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(document, dict):
        raise InvalidRequest(f"job file {name} is not a mapping", hint="it begins like `run: {args: [echo, hello]}`")
    return document


def _set_command(run: dict[str, Any], command: list[str], backends: tuple[str, ...]) -> None:
    """`x.wasm args`: a module, told by its magic number, or its name; anything else is a command of the host."""
    first = Path(command[0])
    is_named = first.suffix == ".wasm"
    if "process" in backends or command[0].startswith("blob:"):
        pass
    elif first.is_file() and _begins_with_magic(first):
        run["module"], run["args"] = str(first.resolve()), command[1:]
        return
    elif (is_named or "wasm" in backends) and first.is_file():
        raise InvalidRequest(f"{first} is not a WebAssembly module", hint="compile it for wasm32-wasi; or --backend process")  # fmt: skip
    elif is_named or "wasm" in backends:
        raise NotFound(f"there is no module {first}")
    if command[0].startswith("blob:"):
        run["module"], run["args"] = command[0], command[1:]
    else:
        run["args"] = command


def _begins_with_magic(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == WASM_MAGIC


def _set_array(document: dict[str, Any], flags: dict[str, Any]) -> None:
    forms = {"--array": flags["array"], "--each-line": flags["each_line"], "--each-file": flags["each_file"]}
    given = [flag for flag, value in forms.items() if value is not None]
    if len(given) > 1:
        raise InvalidRequest(f"{' and '.join(given)} exclude each other")
    if flags["per_task"] is not None and given != ["--each-file"]:
        raise InvalidRequest("--per-task goes with --each-file")
    array: dict[str, Any] = {}
    if flags["array"] is not None:
        text, _, limit = flags["array"].partition("%")
        array["range"] = int(text) if text.isdecimal() and len(text) < 10 else text
        if limit:
            array["at_once"] = _number(limit, "--array %")
    elif flags["each_line"] is not None:
        array["each_line"] = _here(flags["each_line"])
    elif flags["each_file"] is not None:
        array["files"] = _here(flags["each_file"])
        _put(array, "per_task", flags["per_task"])
    for key in ("at_once", "max_fails"):
        _put(array, key, flags[key])
    if array and not given and "array" not in document:
        raise InvalidRequest("--at-once and --max-fails go with an array")
    _update(document, "array", array)


def _section(document: dict[str, Any], key: str) -> dict[str, Any]:
    return dict(_mapping(document.get(key), key))


def _mapping(value: object, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where}: expected a mapping")
    return value


def _put(target: dict[str, Any], key: str, value: object) -> None:
    if value not in (None, [], {}, ""):
        target[key] = value


def _update(document: dict[str, Any], key: str, values: dict[str, Any]) -> None:
    if values:
        present = document.get(key)
        document[key] = {**(present if isinstance(present, dict) else {}), **values}


def _here(source: str | None) -> str | None:
    """Paths in flags start where the command is called, not where the job file lies."""
    if source is None or source.startswith(("blob:", "tree:", "job:")):
        return source
    return str(Path(source).expanduser().absolute())


def _pair(text: str, flag: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise InvalidRequest(f"{flag} {text!r} is not {'PATH=SRC' if flag == '--input' else 'NAME=VALUE'}")
    return key, value


def _variable(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if separator:
        return key, value
    if key not in os.environ:
        raise InvalidRequest(f"--env {key}: there is no such variable here", hint=f"--env {key}=VALUE")
    return key, os.environ[key]


def _number(text: str, where: str) -> int:
    if not text.isdecimal() or len(text) > 15:
        raise InvalidRequest(f"{where}: {text!r} is not a whole number")
    return int(text)
