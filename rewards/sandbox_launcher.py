"""What runs first inside the sandbox: it drops rights, sets the limits, and then executes the program.

    python -s -P -S -B -c "<this file>" '{"source": 5, "ready": 6, "user": 1879048200, "limits": {...}, "paths": []}'

It is passed to Python as text and imports only the standard library: no file of the project is visible in the sandbox.

source: descriptor of the program's text. ready: descriptor of a file that gets one byte before the program starts. user: the
user id to become, or null. limits: pairs (soft, hard) by the names of `resource`. paths: folders to append to `sys.path`.
"""

import ctypes
import json
import os
import resource
import site
import sys
import types

PR_SET_DUMPABLE = 4


def main() -> None:
    request = json.loads(sys.argv[1])
    with open(request["source"], encoding="utf-8") as file:
        source = file.read()
    if request["user"] is not None:
        become(request["user"])
    site.setquit()  # defines exit() and quit(), which are missing without `site`
    sys.path += request["paths"]
    sys.argv[:] = ["program.py"]
    for name, wanted in request["limits"].items():
        set_limit(getattr(resource, name), *wanted)
    os.write(request["ready"], b"1")
    os.close(request["ready"])
    os.closerange(3, 256)
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = module
    exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)


def become(user: int) -> None:
    """Become an ordinary user, to whom the limit on processes applies, and drop all capabilities."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    # A process that changed its user cannot read its own /proc/self, and so no /dev/stdin.
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)


def set_limit(name: int, soft: int, hard: int) -> None:
    """Set a limit, or keep the current one if that is lower: raising it takes rights that we may not have."""
    ceiling = resource.getrlimit(name)[1]
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(name, (soft, hard))


if __name__ == "__main__":
    main()
