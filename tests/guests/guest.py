"""The same verbs as guest.c, as a command for the process backend."""

from __future__ import annotations

import os
import signal
import sys
import time


def main(verb: str, *args: str) -> int:
    match verb:
        case "exit":
            return int(args[0])
        case "say":
            sys.stdout.write(args[0])
            sys.stderr.write(args[1])
        case "args":
            print(*args, sep="\n")
        case "env":
            sys.stdout.write(os.environ.get(args[0], "(unset)"))
        case "environ":
            print(*(f"{name}={value}" for name, value in os.environ.items()), sep="\n")
        case "cat":
            sys.stdout.buffer.write(sys.stdin.buffer.read())
        case "copy":
            with open(args[0], "rb") as source, open(args[1], "wb") as target:
                target.write(source.read())
        case "spin":
            while True:
                pass
        case "sleep":
            time.sleep(float(args[0]))
        case "flood":
            while True:
                os.write(2 if args else 1, b"a" * 65536)
        case "write":
            with open(args[0], "wb") as file:
                left = int(args[1])
                while left:
                    left -= file.write(bytes(min(left, 65536)))
        case "grow":
            blocks = []
            try:
                while True:
                    blocks.append(b"1" * (1 << 20))
            except MemoryError:
                return 3
        case "die":
            os.kill(os.getpid(), int(args[0]))
        case "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print("ready", flush=True)
            time.sleep(60)
        case "daemon":
            # Leaves a grandchild in a session of its own; with "wiped", one that cannot be told by its environment.
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    keep = {} if args[:1] == ("wiped",) else dict(os.environ)
                    os.execve("/bin/sleep", ["sleep", args[-1]], keep)
                os._exit(0)
            os.wait()
            print("ready", flush=True)
            time.sleep(float(args[-1]) if args[0] == "stay" else 0)
    return 0


sys.exit(main(*sys.argv[1:]))
