"""Run one Python program that a model wrote, without trusting it.

    outcome = run_python("print(input()[::-1])", stdin="abc", limits=Limits(seconds=2))
    outcome.status, outcome.stdout          # ("ok", "cba\\n")

The program runs under bubblewrap (`bwrap`) in separate namespaces, and as a separate user if the caller is root:

- files: Python, /usr and the system's libraries, read-only; a scratch folder in memory, /tmp, that is deleted afterwards;
- no network, not even to this machine; no environment variables, no terminal, no descriptors but the three standard ones;
- it sees no processes but its own, and none of these outlives the call, however it detaches itself;
- limits on wall time, CPU time, memory, processes, open files, file sizes and the length of the output (`Limits`);
- a filter of system calls (`seccomp`) blocks mounts, namespaces, ptrace, memory that no limit counts, and rare sockets.

Limitations: the memory limit applies to each process, so all processes of the program together may use `processes`
times as much while it runs; and it shares the kernel, so a vulnerability in Linux is a vulnerability of the sandbox.
"""

import contextlib
import functools
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .sandbox_process import Running, sealed
from .seccomp import seccomp_filter

Status = Literal["ok", "error", "timeout", "memory", "output"]
Sandbox = Literal["bubblewrap", "local"]

_LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")
_SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache")
# For bwrap too, as /proc/1/environ may be readable in the sandbox. The fixed seed makes rewards repeatable.
_ENVIRONMENT = {
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PATH": "/usr/bin:/bin",
    "PYTHONHASHSEED": "0",
    "PYTHONIOENCODING": "utf-8",
}
# Starting is not enough: the program must see no processes but its own, and be in separate namespaces.
_NAMESPACES = ("ipc", "mnt", "net", "pid", "uts")
_PROBE = f"""
import os
print(*sorted(int(name) for name in os.listdir("/proc") if name.isdigit()))
print(*(os.readlink("/proc/self/ns/" + name) for name in {_NAMESPACES}))
"""
_FIRST_USER, _USERS = 0x70000000, 0x0FFFFFFF  # user ids that distributions leave unassigned
_SHARED_MIB = 16  # of /dev/shm, which multiprocessing needs for its locks


@dataclass(frozen=True)
class Limits:
    """Limits on a program.

    seconds: wall time, including Python's start. Each process gets the same CPU time, rounded up, plus one second.
    memory_mib: address space of each process in MiB; Python itself takes about 30.
    processes: concurrent processes and threads (only under bubblewrap).
    open_files: descriptors of each process. output_bytes: bytes of stdout, and again of stderr.
    scratch_mib: MiB of the scratch folder, and of each file.

    Raises ValueError for values with which no program can run.
    """

    seconds: float = 5.0
    memory_mib: int = 512
    processes: int = 16
    open_files: int = 64
    output_bytes: int = 64 * 1024
    scratch_mib: int = 64

    def __post_init__(self) -> None:
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"seconds must be positive and finite, not {self.seconds}")
        minimums = {"memory_mib": 32, "processes": 1, "open_files": 16, "output_bytes": 1, "scratch_mib": 1}
        for name, minimum in minimums.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ValueError(f"{name} must be an integer of at least {minimum}, not {value!r}")


@dataclass(frozen=True)
class Outcome:
    """The result of a program.

    stdout, stderr: text, with U+FFFD for invalid UTF-8; cut off at `Limits.output_bytes`.
    exit_code: as in a shell, 128 plus the signal's number for a signal; None if the program was killed here.
    status: "ok" for exit code 0, "error" for another one; "timeout", "memory" (it ended in a MemoryError) or "output" for
    the limit that it exceeded. seconds: wall time.
    """

    stdout: str
    stderr: str
    exit_code: int | None
    status: Status
    seconds: float


def choose_sandbox(*, unsafe_local: bool = False) -> Sandbox:
    """ "bubblewrap" if it works, else "local" if `unsafe_local` allows it.

    Raises ValueError, with the reason and the package to install, if bubblewrap does not work and `unsafe_local` is false.
    """
    problem = bubblewrap_problem()
    if problem is None:
        return "bubblewrap"
    if unsafe_local:
        return "local"
    raise ValueError(
        f"no sandbox for the code that the model writes: {problem}. Install bubblewrap (apt install bubblewrap), or set "
        "unsafe_local: true to run the code without isolation from your files and the network"
    )


def bubblewrap_problem() -> str | None:
    """Why bubblewrap cannot be used here, or None if it works; the result is cached for each path of `bwrap`."""
    bwrap = shutil.which("bwrap")
    return "bwrap is not installed" if bwrap is None else _problem_with(bwrap)


@functools.cache
def _problem_with(bwrap: str) -> str | None:
    try:
        outcome = run_python(_PROBE, limits=Limits(seconds=30), sandbox="bubblewrap")
    except (ValueError, OSError, RuntimeError) as error:
        return f"{bwrap} does not work here ({error})"
    if outcome.status != "ok":
        return f"{bwrap} does not work here ({outcome.status}: {outcome.stderr.strip()[-300:]})"
    processes, _, namespaces = outcome.stdout.strip().partition("\n")
    shared = [name for name in _NAMESPACES if os.readlink(f"/proc/self/ns/{name}") in namespaces.split()]
    isolated = processes == "1 2" and len(namespaces.split()) == len(_NAMESPACES) and not shared
    return None if isolated else f"{bwrap} isolates too little (processes {processes}; shared: {', '.join(shared) or 'none'})"


def run_python(
    source: str,
    *,
    stdin: str = "",
    limits: Limits | None = None,
    site_packages: bool = False,
    sandbox: Sandbox | None = None,
) -> Outcome:
    """Run the program `source` as `__main__` with `stdin` as its input, and wait until all its processes are gone.

    Threads may call it concurrently. limits: default `Limits()`. site_packages: let the program see and import the packages of
    this Python, not only the standard library. sandbox: what `choose_sandbox` returned; None: choose now.
    "local" isolates nothing: the program has the caller's rights, files and network, a process that detaches itself outlives
    the call, and there is no limit on processes or on the scratch folder.

    Raises ValueError if there is no sandbox, RuntimeError if it does not start (because of the machine, never the program).
    """
    sandbox, limits = sandbox or choose_sandbox(), limits or Limits()
    bwrap = shutil.which("bwrap") if sandbox == "bubblewrap" else None
    if sandbox == "bubblewrap" and bwrap is None:
        raise ValueError("bwrap is not installed any more: apt install bubblewrap")
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        text, standard_input = stack.enter_context(sealed(source)), stack.enter_context(sealed(stdin))
        ready = stack.enter_context(open(os.memfd_create("ready"), "wb")).fileno()
        reader, writer = os.pipe()
        info, says_info = stack.enter_context(open(reader, "rb")), stack.enter_context(open(writer, "wb"))
        user = _unused_user() if bwrap else None
        paths = list(dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))) if site_packages else []
        rlimits = _rlimits(limits, local=bwrap is None, separate_user=user is not None)
        command = _launcher(source=text, ready=ready, user=user, paths=paths, limits=rlimits)
        passed, folder = [text, ready], "/"
        if bwrap:
            rules = stack.enter_context(sealed(seccomp_filter()))
            passed += [rules, says_info.fileno()]
            options = ["--seccomp", str(rules), "--info-fd", str(says_info.fileno())]
            command = [bwrap, *_namespaces(user), *_files(limits, paths), *options, "--", *command]
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rankup-", ignore_cleanup_errors=True))
        # start_new_session, not preexec_fn: no Python code runs between fork and exec, so this is safe with threads.
        process = subprocess.Popen(
            command,
            stdin=standard_input,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=_ENVIRONMENT,
            pass_fds=passed,
            start_new_session=True,
        )
        running = stack.enter_context(Running(process, output_bytes=limits.output_bytes, deadline=started + limits.seconds))
        says_info.close()
        running.find_init(info.fileno())
        stopped_by, code = running.finish()
        stdout, stderr = running.texts()
        if stopped_by is None and os.fstat(ready).st_size == 0:
            raise RuntimeError(f"the sandbox did not start: {stderr.strip()[-500:] or 'nothing on stderr'}")
        seconds = time.monotonic() - started
        return Outcome(stdout, stderr, None if stopped_by else code, stopped_by or _status(code, stderr), seconds)


def _namespaces(user: int | None) -> list[str]:
    """bwrap's arguments for namespaces. Root needs no user namespace, and outside of one no other process has the id `user`."""
    common = ["--die-with-parent", "--new-session", "--hostname", "sandbox"]
    if user is None:
        return ["--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL", *common]
    separate = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    rights = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]  # the launcher drops them
    return [*separate, *rights, *common]


def _files(limits: Limits, paths: list[str]) -> list[str]:
    """bwrap's arguments for the files that the program sees."""
    arguments = ["--proc", "/proc", "--dev", "/dev"]
    for folder, mib in (("/tmp", limits.scratch_mib), ("/dev/shm", _SHARED_MIB)):
        arguments += ["--perms", "1777", "--size", str(mib * 2**20), "--tmpfs", folder]
    prefixes = [path for path in (sys.base_prefix, sys.base_exec_prefix, *paths) if not path.startswith("/usr/")]
    for folder in dict.fromkeys([*_SYSTEM_FOLDERS, *prefixes]):
        for parent in reversed(Path(folder).parents[:-1]):  # bwrap itself would create them readable by the owner only
            arguments += ["--dir", str(parent)]
        arguments += ["--ro-bind-try", folder, folder]
    # The root and /dev are in memory too, without a limit on their size.
    return [*arguments, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]


def _rlimits(limits: Limits, *, local: bool, separate_user: bool) -> dict[str, tuple[int, int]]:
    memory, scratch = limits.memory_mib * 2**20, limits.scratch_mib * 2**20
    cpu = math.ceil(limits.seconds) + 1
    rlimits = {
        "RLIMIT_AS": (memory, memory),
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_CPU": (cpu, cpu + 1),  # SIGXCPU, which can be ignored; then SIGKILL
        "RLIMIT_FSIZE": (scratch, scratch),
        "RLIMIT_NOFILE": (limits.open_files, limits.open_files),
    }
    if not local:  # there the limit would count all processes of the user
        processes = limits.processes + (0 if separate_user else 1)  # bwrap itself runs in the user namespace
        rlimits["RLIMIT_NPROC"] = (processes, processes)
    return rlimits


def _unused_user() -> int | None:
    """For root, a user id that no other process has; None for other callers, or if there are no such ids."""
    user = _FIRST_USER + secrets.randbelow(_USERS)
    ranges = [[int(number) for number in line.split()] for line in Path("/proc/self/uid_map").read_text().splitlines()]
    exists = any(first <= user < first + count for first, _, count in ranges)
    return user if exists and os.geteuid() == 0 else None


def _launcher(**request: Any) -> list[str]:
    """The command that runs `sandbox_launcher.py`, which executes the program."""
    # A virtual environment's python is a link to this one, and the environment is not visible in the sandbox.
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    # -s -P -S keep `site`, the user's packages and the working directory out of `sys.path`.
    return [python, "-s", "-P", "-S", "-B", "-c", _LAUNCHER.read_text(), json.dumps(request)]


def _status(code: int, stderr: str) -> Status:
    if code == 0:
        return "ok"
    if code == 128 + signal.SIGXCPU:
        return "timeout"
    last = stderr.rstrip().rpartition("\n")[2]
    return "memory" if "MemoryError" in last.partition(":")[0] else "error"
