"""Runs agent_loop.py of this folder and strikes at its Nth side effect: python struck.py kill|full N ARGUMENTS...

Side effects are what the interpreter's audit events show: files opened for writing, renamed or removed, folders made,
commands started. `kill` sends SIGKILL just before the Nth, `full` lets it and the next two fail for want of space.
"""

import errno
import os
import signal
import sys

EFFECTS = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "subprocess.Popen"}


def is_effect(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        writes = mode and set(mode) & set("wax+") or not mode and flags & (os.O_WRONLY | os.O_RDWR)
        return writes and str(path).startswith(os.getcwd())
    return event in EFFECTS


def main():
    way, number = sys.argv[1], int(sys.argv[2])
    sys.argv[:3] = ["agent_loop.py"]
    sys.path.insert(0, os.getcwd())
    import agent_loop

    agent_loop.PAUSE = 0.01
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if is_effect(event, arguments) and (way == "kill" or event != "subprocess.Popen"):
            seen += 1
            if way == "kill" and seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            if way == "full" and number <= seen < number + 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    sys.addaudithook(hook)
    sys.exit(agent_loop.main())


if __name__ == "__main__":
    main()
