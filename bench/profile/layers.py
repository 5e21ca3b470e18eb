"""Which layer of meshd a sampled stack counts for: the innermost frame that the table knows decides.

So what a layer calls of the standard library is that layer's time, what it calls of another layer is that other
layer's, and what trio does for whoever called it is trio's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

OTHER = "other"

POLL = "the loop's poll of the kernel"
SYNC = "the journal's sync"
HAND_OVER = "the journal's thread: handing over, waking"
THREADS = "trio's threads"
SOCKET = "reading a socket"
SPAWNERS_POLL = "the spawner's poll"
FORK = "fork and exec"

WAKING = (POLL, SYNC, HAND_OVER, THREADS, SOCKET, SPAWNERS_POLL, FORK)
"""Where threads sleep. One that was woken and has no core yet is there too, and a sampler cannot tell it from one that runs."""

LAYERS: Mapping[str, str] = {
    # --- an agent
    "trio/_core/_io_epoll.py:EpollIOManager.get_events": POLL,
    "trio/_core/_thread_cache.py": THREADS,
    "trio/_threads.py": THREADS,
    "trio/_socket.py": "sockets",
    "trio/_highlevel_socket.py": "sockets",
    "trio/": "trio",
    "meshd/raft/storage/disk.py:_File.sync": SYNC,
    "meshd/raft/storage/": "the journal",
    "meshd/raft/disk_thread.py": HAND_OVER,
    "meshd/raft/state/": "the state machine",
    "meshd/raft/wire.py": "Raft's frames",
    "meshd/raft/": "Raft",
    "meshd/codec.py": "msgpack",
    "meshd/net/libp2p/": "libp2p's streams: Noise, yamux",
    "libp2p/": "libp2p's streams: Noise, yamux",
    "meshd/net/": "calls between nodes",
    "meshd/work/keeper.py": "the leader's sessions",
    "meshd/agent.py": "worker",
    "meshd/work/attempts.py": "worker",
    "meshd/work/executor.py": "worker",
    "meshd/work/pace.py": "worker",
    "meshd/work/planned.py": "worker",
    "meshd/shell.py": "worker",
    "meshd/work/worker": "worker",
    "meshd/backends/": "backend: messages to runners and spawners",
    "meshd/api/": "HTTP",
    "h11/": "HTTP",
    "meshd/node.py": "HTTP",
    "meshd/views.py": "HTTP",
    "meshd/gossip/": "gossip, upkeep",
    "meshd/admission/greetings.py": "gossip, upkeep",
    "meshd/upkeep.py": "gossip, upkeep",
    "meshd/neighbours.py": "gossip, upkeep",
    "meshd/directory.py": "gossip, upkeep",
    "meshd/history/": "blobs, history",
    "meshd/blobs/": "blobs, history",
    "structlog/": "logging",
    "meshd/": OTHER,
    # --- a runner of wasm
    "wasmtime/_bindings.py:wasmtime_func_call": "wasmtime: the guest's call",
    "wasmtime/_bindings.py:wasmtime_instance": "wasmtime: an instance",
    "wasmtime/_bindings.py:wasmtime_store": "wasmtime: a store, and its end",
    "wasmtime/_bindings.py:wasi_config": "wasmtime: files and variables",
    "wasmtime/": "wasmtime: other calls",
    "meshd/backends/wasm_guest.py": "the runner's interpreter",
    "meshd/backends/wasm_modules.py": "the runner's interpreter",
    "meshd/backends/wasm_runner.py": "the runner's interpreter",
    "meshd/backends/wasm_runner.py:Runner._answer": SOCKET,
    "socket.py:SocketIO.": SOCKET,
    "meshd/backends/wasm_runner.py:Runner._tidy": "output of tasks",
    "meshd/backends/output.py": "output of tasks",
    # --- a spawner of commands
    "subprocess.py": FORK,
    "meshd/backends/spawned.py:_spawn_first": FORK,
    "meshd/backends/spawned.py": "the spawner's interpreter",
    "meshd/backends/spawner": "the spawner's interpreter",
    "meshd/backends/spawner.py:Spawner.serve": SPAWNERS_POLL,
    "meshd/backends/spawners.py": "backend: messages to runners and spawners",
    "meshd/backends/spawner.py:Spawner._reap": "wait and sweep",
    "meshd/backends/spawner.py:Spawner._sweep": "wait and sweep",
    "meshd/backends/spawner.py:_children": "wait and sweep",
    # --- whoever asks
    "meshd/client/": "client",
}
"""By the beginning of "file:function"; the longest that fits. A frame that none fits is unknown: its caller is asked."""

ASKED_BY_MANY = ("meshd/errors.py", "meshd/ids.py", "meshd/model.py", "meshd/placement.py", "meshd/units.py")
"""Of ours, and no layer of their own: their callers decide."""


@dataclass(frozen=True, slots=True)
class Stack:
    frames: tuple[str, ...]
    """`file:function`, outermost first."""
    samples: int


def parse(raw: str) -> list[Stack]:
    """Of py-spy's `raw` format: `function (file:line);… COUNT`, a stack in each line."""
    stacks = []
    for line in raw.splitlines():
        frames, _, samples = line.rpartition(" ")
        stacks.append(Stack(tuple(_key(frame) for frame in frames.split(";")), int(samples)))
    return stacks


def layer_of(frames: Sequence[str]) -> str:
    for frame in reversed(frames):
        if frame.startswith(ASKED_BY_MANY):
            continue
        if fitting := [beginning for beginning in LAYERS if frame.startswith(beginning)]:
            return LAYERS[max(fitting, key=len)]
    return OTHER


def shares(stacks: Iterable[Stack], waiting: float) -> dict[str, float]:
    """Of the CPU time, by layer; empty without samples.

    `waiting` is the part of the samples that were no CPU time, as the kernel counted: threads that waited for a core.
    They are taken from where threads sleep, for most begin to wait when they are woken, and what those do not have,
    from all alike.
    """
    samples: Counter[str] = Counter()
    for stack in stacks:
        samples[layer_of(stack.frames)] += stack.samples
    waking = sum(samples[layer] for layer in WAKING)
    if not waking:
        return {layer: count / samples.total() for layer, count in samples.items()}
    kept = max(0.0, 1 - waiting * samples.total() / waking)
    weights = {layer: count * (kept if layer in WAKING else 1) for layer, count in samples.items()}
    total = sum(weights.values())
    return {layer: weight / total for layer, weight in weights.items() if weight}


def _key(frame: str) -> str:
    function, _, place = frame.removesuffix(")").rpartition(" (")
    return f"{place.rpartition(':')[0]}:{function}"
