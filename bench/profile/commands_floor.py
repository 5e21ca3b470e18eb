"""Starts /bin/true and waits for it, nothing else: `python -I -S commands_floor.py COUNT AT_ONCE`, in as small a process as can be.

Prints JSON: wall seconds, user and system seconds of its own and of the commands.
"""

import json
import os
import sys
import time

COMMAND = "/bin/true"


def run(count: int, at_once: int) -> None:
    for number in range(count + at_once):
        if number >= at_once:
            os.waitpid(-1, 0)
        if number < count:
            os.posix_spawn(COMMAND, [COMMAND], {})


if __name__ == "__main__":
    before, began = os.times(), time.perf_counter()
    run(int(sys.argv[1]), int(sys.argv[2]))
    took, after = time.perf_counter() - began, os.times()
    own = [after.user - before.user, after.system - before.system]
    commands = [after.children_user - before.children_user, after.children_system - before.children_system]
    print(json.dumps({"wall_s": took, "own": own, "commands": commands}))
