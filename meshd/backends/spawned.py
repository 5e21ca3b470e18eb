"""One command and all that comes of it, as the spawner sees it.

    running ──limit, leash, order──▶ ending (TERM, then KILL) ──┐
       └──────────────── main process ends ──────────────────────┴─▶ sweeping ──nothing left──▶ ended

Its main process leads a process group of its own, in the spawner's session, which has no terminal. What leaves the
group (a daemon) becomes the spawner's child when its parent dies, and is known by a mark in its environment.

Not a session of its own: after setsid(2) Linux wakes the spawner, which vfork made wait, only when the command leaves
its processor, as a rule at its end. Starting a command then took 620 us instead of 70, and no two started at once.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from meshd.backends.output import Capture, Output

MARK = "MESHD_SPAWN"
"""In the environment of all that is spawned: `token:id`, the token naming the agent's directory and which spawner of it."""

SWEEP_S_MAX = 5.0
"""How long the remains of a job may take to die of SIGKILL; what is stuck in the kernel longer is reported."""

OWN_DATA_BYTES = 64 << 20
"""For the moment in which it starts a command the memory limit holds for the spawner too, which needs some 10 MiB.

So a command with a lower limit begins with this one.
"""

FILES_OPEN = 1024
"""Soft limit, whatever the spawner and its agent have raised their own to: old programs use select(2)."""

OOM_SCORE_ADJUST = "500"
"""When the machine runs out of memory the kernel should take a job, not the agent."""

ROOT = "/"
"""Where the spawner is between two commands: it can always go back there, and needs no descriptor to."""

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Refused(Exception):
    """The command could not be started. `reason` says whose fault that is: invalid or backend."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Spawned:
    def __init__(
        self, request: Mapping[str, Any], token: str, term_grace_s: float, capture: Capture | None = None
    ) -> None:
        """Starts the command. Its output goes to `capture`, or to the files that the request names. Raises Refused."""
        self.id: int = request["id"]
        self._capture = capture
        self.mark = f"{MARK}={token}:{self.id}".encode()
        self.leash_s: float | None = request["leash_s"]
        self._run_s: float | None = request["run_s"]
        self._memory: int | None = request["memory"]
        self._file_bytes_max: int | None = request["file_bytes_max"]
        self._term_grace_s = term_grace_s
        if capture is None:
            self._output = Output(request["stdout"], request["stderr"], request["output_bytes_max"])
        else:
            self._output = Output(capture.stdout, capture.stderr, request["output_bytes_max"])
        self._kill_at_s: float | None = None
        self._give_up_at_s = 0.0
        self._end: tuple[str, int | None, str] | None = None
        self._run_ms = 0
        self._is_group_gone = False
        self.pid = self._start(request, token)
        self._started_s = time.monotonic()

    # --- while it runs -----------------------------------------------------------------------------------------------

    def enforce(self, now_s: float) -> None:
        """Begin to stop what must stop; kill what was asked to end and did not."""
        if self._end is None:
            self._look_for_reason(now_s)
        elif self._kill_at_s is not None and (now_s >= self._kill_at_s or self._output.flooded()):
            self._kill_at_s = None
            self.kill()

    def stop(self, reason: str, message: str, now_s: float, *, grace_s: float | None = None) -> None:
        if self._end is not None:
            return
        self._end = (reason, None, message)
        self._kill_at_s = now_s + (self._term_grace_s if grace_s is None else grace_s)
        _signal(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Only before its main process is reaped: later its number may be a stranger's."""
        _signal(self.pid, signal.SIGKILL)

    def next_at_s(self, now_s: float) -> float:
        """When `enforce` is due at the latest, output aside."""
        times = [self._kill_at_s]
        if self._end is None:
            if self._run_s is not None:
                times.append(self._started_s + self._run_s)
            if self.leash_s is not None:
                times.append(now_s + self.leash_s - time.clock_gettime(time.CLOCK_BOOTTIME))
        return min((at for at in times if at is not None), default=float("inf"))

    def _look_for_reason(self, now_s: float) -> None:
        if self.leash_s is not None and time.clock_gettime(time.CLOCK_BOOTTIME) >= self.leash_s:
            self.stop("lost", "stopped by its own node, which was cut off from the mesh for too long", now_s)
        elif self._run_s is not None and now_s >= self._started_s + self._run_s:
            self.stop("timeout", f"still running after {self._run_s:g} s, its limit", now_s)
        elif (flooded := self._output.flooded()) is not None:
            # Every moment of grace would fill the disk further.
            self.stop("output_limit", flooded, now_s, grace_s=0)

    # --- after its main process ended --------------------------------------------------------------------------------

    def main_ended(self, status: int, peak_bytes: int, now_s: float) -> None:
        self._run_ms = int((now_s - self._started_s) * 1000)
        self._kill_at_s = None
        self._give_up_at_s = now_s + SWEEP_S_MAX
        if self._end is None:
            self._end = self._judge(status, peak_bytes)

    def kill_remains(self) -> bool:
        """Kill what is left of its group; whether there was anything."""
        if not self._is_group_gone:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                self._is_group_gone = True  # from now on the number may be a stranger's
            except PermissionError:
                pass  # it holds a process of another user (sudo); all that can be said is that it is there
        return not self._is_group_gone

    def is_hopeless(self, now_s: float) -> bool:
        return now_s >= self._give_up_at_s

    def describe_end(self, *, is_clean: bool) -> tuple[str, int | None, str, int]:
        """Reason, exit code, message, and for how long it ran."""
        assert self._end is not None, "its main process has ended"
        reason, code, message = self._end
        flooded = self._output.flooded()
        if flooded is not None:
            self._output.cut()
            if reason not in ("timeout", "lost", "cancelled"):
                reason, code, message = "output_limit", None, flooded
        if not is_clean:
            reason, code = "backend", None
            message = f"a process of it survives SIGKILL (process group {self.pid}); {message}"
        return reason, code, message, self._run_ms

    def _judge(self, status: int, peak_bytes: int) -> tuple[str, int | None, str]:
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return "exit", 0, ""
        if self._memory is not None and self._ran_out_of(self._memory, peak_bytes):
            return "memory_limit", None, f"it used {peak_bytes} of at most {self._memory} bytes, and ended badly"
        if code > 0:
            return "exit", code, ""
        if -code == signal.SIGXFSZ:
            return (
                "output_limit",
                None,
                f"a file grew past {self._file_bytes_max} bytes, the disk that the job asked for",
            )
        killed = f"killed by {_signal_name(-code)}"
        if -code == signal.SIGKILL:
            killed += ", not by meshd: perhaps by the kernel, for want of memory"
        # As a shell would report it, for whoever passes the code on.
        return "signal", 128 - code, killed

    def _ran_out_of(self, memory: int, peak_bytes: int) -> bool:
        """Refused memory cannot be seen from outside: a bad end with over seven eighths of the limit resident counts.

        The peak contains the spawner's own size from before exec, so a limit below that tells nothing.
        """
        return peak_bytes > _own_peak_bytes() and peak_bytes >= memory // 8 * 7

    # --- starting ----------------------------------------------------------------------------------------------------

    def _start(self, request: Mapping[str, Any], token: str) -> int:
        args, workdir = request["args"], request["workdir"]
        environment = {
            MARK: f"{token}:{self.id}",
            "PATH": PATH,
            "HOME": workdir,
            "LANG": "C.UTF-8",
            **dict(request["env"]),
        }
        # Given again: a job may not take the mark away from its children by naming it.
        environment[MARK] = f"{token}:{self.id}"
        with ExitStack() as files:
            try:
                # Closed again after the start, so that a full table always has room for a look at /proc.
                stdin = files.enter_context(open(request["stdin"] or os.devnull, "rb")).fileno()
                if self._capture is None:
                    stdout = files.enter_context(open(request["stdout"], "ab")).fileno()
                    stderr = files.enter_context(open(request["stderr"], "ab")).fileno()
                else:
                    stdout, stderr = self._capture.stdout, self._capture.stderr
            except OSError as error:
                raise Refused("backend", f"the attempt's files cannot be opened: {error}") from error
            files.enter_context(_inherited(resource.RLIMIT_NOFILE, FILES_OPEN))
            files.enter_context(_inherited(resource.RLIMIT_FSIZE, self._file_bytes_max))
            files.enter_context(
                _inherited(resource.RLIMIT_DATA, None if self._memory is None else max(self._memory, OWN_DATA_BYTES))
            )
            pid = _execute(args, workdir, environment, (stdin, stdout, stderr))
        self._bound(pid)
        return pid

    def _bound(self, pid: int) -> None:
        """Make its limits hard, and a very low one exact: it began with soft ones."""
        try:
            # DATA, not AS: what counts is what can be written to, not addresses that runtimes merely reserve.
            for limit, value in ((resource.RLIMIT_DATA, self._memory), (resource.RLIMIT_FSIZE, self._file_bytes_max)):
                if value is not None:
                    value = _at_most_hard(limit, value)
                    resource.prlimit(pid, limit, (value, value))
            with open(f"/proc/{pid}/oom_score_adj", "w") as file:
                file.write(OOM_SCORE_ADJUST)
        except OSError:
            pass  # it has ended already, or became another user: then these are not ours to set


def _execute(args: list[str], workdir: str, environment: Mapping[str, str], streams: tuple[int, int, int]) -> int:
    """Its process id. Raises Refused.

    posix_spawn, not Popen, whose way there is 60 us longer. It cannot change the directory, so the spawner itself is
    in it meanwhile; and it closes nothing, so no descriptor of the spawner may be inheritable.
    """
    try:
        _enter(workdir)
        return _spawn_first(_places_of(args[0], environment), args, environment, streams)
    except OSError as error:
        raise _refused(error, args[0], workdir) from error
    except ValueError as error:
        raise Refused("backend", f"{args[0]!r} could not be started: {error}") from error
    finally:
        os.chdir(ROOT)


def _enter(workdir: str) -> None:
    """Raises Refused."""
    try:
        os.chdir(workdir)
    except OSError as error:
        raise Refused("invalid", f"the working directory {workdir} cannot be entered: {error.strerror}") from error


def _spawn_first(
    paths: Iterable[str], args: list[str], environment: Mapping[str, str], streams: tuple[int, int, int]
) -> int:
    """The first that can be executed. Raises OSError: the first failure that says more than that it is not there."""
    failure: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    for path in paths:
        try:
            return os.posix_spawn(
                path,
                args,
                environment,
                file_actions=[_hand_on(ours, theirs) for theirs, ours in enumerate(streams)],
                setpgroup=0,
                # Python ignores these; a command expects them.
                setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
            )
        except OSError as error:
            if isinstance(failure, FileNotFoundError | NotADirectoryError):
                failure = error
    raise failure


def _hand_on(ours: int, theirs: int) -> tuple[Any, ...]:
    """glibc copies no descriptor that is over the command's limit; so such a file is opened once more."""
    if ours < FILES_OPEN:
        return os.POSIX_SPAWN_DUP2, ours, theirs
    flags = fcntl.fcntl(ours, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_APPEND)
    return os.POSIX_SPAWN_OPEN, theirs, f"/proc/self/fd/{ours}", flags, 0


def _places_of(command: str, environment: Mapping[str, str]) -> list[str]:
    """Where it may be; of many directories those that do not have it are left out."""
    if "/" in command:
        return [command]
    paths = [os.path.join(directory, command) for directory in environment["PATH"].split(os.pathsep)]
    return [path for path in paths if os.path.lexists(path)]


def _refused(error: OSError, command: str, workdir: str) -> Refused:
    match error.errno:
        case errno.ENOENT if "/" in command and Path(workdir, command).exists():
            return Refused("invalid", f"the interpreter that {command!r} names is not on this machine")
        case errno.ENOENT:
            return Refused("invalid", f"command not found: {command!r}")
        case errno.EACCES:
            return Refused("invalid", f"not executable: {command!r}")
        case errno.ENOEXEC:
            return Refused(
                "invalid", f"not a program that this machine can run (a script needs a #! line): {command!r}"
            )
        case errno.E2BIG:
            return Refused("invalid", "arguments and environment are larger than this machine allows")
        case errno.EISDIR | errno.ENOTDIR | errno.ELOOP | errno.ENAMETOOLONG:
            return Refused("invalid", f"{error.strerror}: {command!r}")
        case _:
            return Refused("backend", f"{command!r} could not be started: {error}")


@contextmanager
def _inherited(limit: int, value: int | None) -> Iterator[None]:
    """The soft limit that a process started meanwhile begins with; None leaves it as it is."""
    if value is None:
        yield
        return
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (_at_most_hard(limit, value), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(limit, before)


def _at_most_hard(limit: int, value: int) -> int:
    _, hard = resource.getrlimit(limit)
    return value if hard == resource.RLIM_INFINITY else min(value, hard)


def _signal(pid: int, number: signal.Signals) -> None:
    """To its group, and to itself in case it moved to another."""
    for send in (os.killpg, os.kill):
        try:
            send(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _own_peak_bytes() -> int:
    """Of this process image alone: getrusage would count the agent's size too, from before this program was executed."""
    with open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
