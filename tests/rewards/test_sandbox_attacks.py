"""Programs that try to leave the sandbox, or to use it up.

The attacks of ATTEMPTS each try one forbidden thing and fail; they run in one program. Those of ATTACKS are destructive
and have a run each, side by side. None is run before it is certain that the sandbox separates anything at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import random
import resource
import secrets
import socket
import tempfile
import textwrap
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from rankup.rewards import sandbox
from rankup.rewards.sandbox import Limits, Outcome, bubblewrap_problem, run_python

pytestmark = pytest.mark.slow

PROBLEM = bubblewrap_problem()
needs_bubblewrap = pytest.mark.skipif(PROBLEM is not None, reason=f"no sandbox here: {PROBLEM}")
PATIENT = Limits(seconds=60)  # for programs that end by themselves: the machine may be busy
SECRET = secrets.token_hex(16)


@pytest.fixture(scope="module")
def separated() -> None:
    """Fails where the sandbox separates nothing, so that no attack is let loose on the machine."""
    outcome = run_python("import os; print(*(name for name in os.listdir('/proc') if name.isdigit()))", limits=PATIENT)
    assert outcome.stdout.split() == ["1", "2"], outcome


def marked_limits(mark: int, seconds: float) -> Limits:
    """An unusual limit, by which to find the sandbox's processes: it is part of each command line."""
    return Limits(seconds=seconds, scratch_mib=8, memory_mib=128, open_files=mark)


def processes_under(limits: Limits) -> list[str]:
    mark = f'"RLIMIT_NOFILE": [{limits.open_files}, '.encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (folder / "cmdline").read_bytes():
                found.append((folder / "stat").read_text())
    return found


# ---------------------------------------------------------------------------------------------- attempts that fail

# name: an expression that raises OSError, or is false, if the sandbox works. It may use the names that `attempts` defines.
ATTEMPTS = {
    "read a secret in the home folder": "read(HOME_SECRET)",
    "read a secret in a temporary folder": "read(TMP_SECRET)",
    "read /etc/shadow": "read('/etc/shadow')",
    "read /etc/passwd": "read('/etc/passwd')",
    "read the project": "read(PROJECT)",
    "list the home folder": "[name for name in os.listdir(HOME) if not sys.base_prefix.startswith(HOME + '/' + name)]",
    "read a process's environment": "read(f'/proc/{PARENT}/environ')",
    "find the secret in the first process's environment": "SECRET in read('/proc/1/environ')",
    "read the environment": "SECRET in str(os.environ)",
    "inherit a descriptor": "INHERITED in os.listdir('/proc/self/fd')",
    "see other processes": "[name for name in os.listdir('/proc') if name.isdigit() and name not in ('1', '2')]",
    "read memory of the machine": "read('/dev/mem')",
    "read the disk": "[name for name in os.listdir('/dev') if name.startswith(('sd', 'vd', 'nvme', 'dm-'))]",
    "follow a symbolic link": "os.symlink(TMP_SECRET, '/tmp/link') or read('/tmp/link')",
    "follow a link upwards": "os.symlink('../../../../../../' + TMP_SECRET, '/tmp/up') or read('/tmp/up')",
    "follow a link into /proc/1/root": "read('/proc/1/root' + TMP_SECRET)",
    "hard link to a file of Python": "os.link(os.__file__, '/tmp/hard')",
    "write to /": "write('/escaped')",
    "write to /usr": "write('/usr/escaped')",
    "write to /dev": "write('/dev/escaped')",
    "write to /etc": "write('/etc/escaped')",
    "write to Python": "write(os.__file__)",
    "write to a temporary folder": "write(TMP_SECRET)",
    "write to the kernel's settings": "write('/proc/sys/kernel/core_pattern')",
    "overwrite standard input": "os.write(0, b'x')",
    "reopen standard input to write": "write('/proc/self/fd/0')",
    "truncate standard input": "os.ftruncate(0, 1 << 40)",
    "make a huge file": "os.truncate(open('/tmp/huge', 'w').name, 1 << 40)",
    "connect to a server on this machine": "connect(socket.AF_INET, ('127.0.0.1', PORT))",
    "connect over IPv6": "connect(socket.AF_INET6, ('::1', PORT))",
    "connect to an address outside": "connect(socket.AF_INET, ('192.0.2.1', 80))",
    "send a datagram": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
    "connect to a Unix socket": "connect(socket.AF_UNIX, TMP_SECRET + '.socket')",
    "connect to an abstract Unix socket": "connect(socket.AF_UNIX, ABSTRACT)",
    "open a socket to the virtual machine's host": "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
    "open a netlink socket": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "open a raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)",
    "open a packet socket": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "signal the process that asked": "os.kill(PARENT, 0)",
    "signal its group": "os.killpg(PARENT, 0)",
    "become root": "os.setuid(0)",
    "regain rights by a set-user-ID program": "'uid=0' in subprocess.getoutput('exec /usr/bin/su -c id')",
    "raise the limit on processes": "resource.setrlimit(resource.RLIMIT_NPROC, (1 << 20, 1 << 20))",
    "raise the limit on memory": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "trace": "call('ptrace', 16, 1, 0, 0)",
    "mount": "call('mount', b'none', b'/tmp', b'tmpfs', 0, 0)",
    "unmount": "call('umount2', b'/tmp', 2)",
    "make a user namespace": "call('unshare', 0x10000000)",
    "enter a namespace": "call('setns', os.open('/proc/1/ns/net', os.O_RDONLY), 0)",
    "change the root": "os.chroot('/tmp')",
    "make a device": "os.mknod('/tmp/disk', 0o060666, os.makedev(254, 0))",
    "hide memory in a memfd": "os.memfd_create('hidden')",
    "hide memory in shared segments": "call('shmget', 0, 1 << 30, 0o1600) + 1",
    "set the clock": "time.clock_settime(time.CLOCK_REALTIME, 0)",
    "rename the machine": "socket.sethostname('escaped')",
    "lower its nice value": "os.setpriority(os.PRIO_PROCESS, 0, -20)",
}

PRELUDE = """
import ctypes, json, os, resource, socket, subprocess, sys, time

def read(path):
    with open(path, errors="replace") as file:
        return file.read()

def write(path):
    with open(path, "a") as file:
        return file.write("escaped")

def connect(family, address):
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(2)
    sock.connect(address)
    return True

def call(name, *arguments):
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
    return True

def attempt(expression):
    try:
        result = eval(expression)
    except OSError as error:
        return f"refused: {error}"
    except (ValueError, subprocess.SubprocessError) as error:
        return f"refused: {error}"
    # many calls return None on success
    return "nothing there" if result is False or result == [] else f"ESCAPED: {result!r:.100}"
"""


@pytest.fixture(scope="module")
def attempts(separated, tmp_path_factory) -> dict[str, str]:
    """The result of each of ATTEMPTS, all from one run with servers and secrets for it to find."""
    folder = tmp_path_factory.mktemp("secrets")
    secret = folder / "secret"
    secret.write_text(SECRET)
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKUP_TEST_SECRET", SECRET)
        at_home = stack.enter_context(tempfile.NamedTemporaryFile("w", dir=Path.home(), prefix=".rankup-test-"))
        at_home.write(SECRET)
        at_home.flush()
        inherited = os.open(secret, os.O_RDONLY)
        stack.callback(os.close, inherited)
        os.set_inheritable(inherited, True)
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        abstract = f"\0{SECRET}"
        servers = [tcp]
        for address in (f"{secret}.socket", abstract):
            servers.append(stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)))
            servers[-1].bind(address)
            servers[-1].listen()
        known = {
            "HOME": str(Path.home()),
            "HOME_SECRET": at_home.name,
            "TMP_SECRET": str(secret),
            "PROJECT": sandbox.__file__,
            "PARENT": os.getpid(),
            "INHERITED": str(inherited),
            "PORT": tcp.getsockname()[1],
            "ABSTRACT": abstract,
            "SECRET": SECRET,
        }
        lines = [PRELUDE, *(f"{name} = {value!r}" for name, value in known.items())]
        lines += [f"print(json.dumps({{name: attempt(code) for name, code in {ATTEMPTS!r}.items()}}))"]
        outcome = run_python("\n".join(lines), stdin="given", limits=PATIENT)
        assert outcome.status == "ok", outcome
        for server in servers:
            server.settimeout(0)
            with pytest.raises(BlockingIOError):  # no connection was attempted
                server.accept()
        assert secret.read_text() == SECRET
    return json.loads(outcome.stdout)


@needs_bubblewrap
@pytest.mark.parametrize("name", ATTEMPTS)
def test_attempt_fails(name, attempts):
    assert attempts[name].startswith(("refused", "nothing there")), attempts[name]


# ------------------------------------------------------------------------------------------------- attacks with a run each

IGNORE_SIGNALS = """
import signal
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
    signal.signal(number, signal.SIG_IGN)
"""
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        if {closes}:
            os.closerange(0, 64)
        time.sleep(600)
    os._exit(0)
os.wait()
print("started")
"""
FILL = """
import os
written = 0
for number in range(1000):
    try:
        with open(f"{folder}/{{number}}", "wb", buffering=0) as file:
            while True:
                written += file.write(bytes(1 << 20))
    except OSError:
        pass
    if os.statvfs("{folder}").f_bfree == 0:
        break
print(written >> 20)
"""

# name: (program, seconds, the statuses that are right)
ATTACKS = {
    "run for ever": ("while True: pass", 1.5, {"timeout"}),
    "sleep for ever": ("import time; time.sleep(600)", 1.5, {"timeout"}),
    "run for ever and ignore all signals": (IGNORE_SIGNALS + "while True: pass", 1.5, {"timeout"}),
    "fork without end": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", 3, {"timeout"}),
    "start threads without end": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
        60,
        {"error", "memory"},
    ),
    "allocate in one call": ("x = bytearray(1 << 40)", 60, {"memory"}),
    "allocate without end": ("x = []\nwhile True: x.append(bytearray(1 << 22))", 60, {"memory"}),
    "map memory": ("import mmap\nx = [mmap.mmap(-1, 1 << 28) for _ in range(100)]", 60, {"error", "memory"}),
    "open files without end": ("x = []\nwhile True: x.append(open('/dev/null'))", 60, {"error"}),
    "print without end": ("import sys\nwhile True: sys.stdout.write('x' * (1 << 20))", 60, {"output"}),
    "complain without end": ("import sys\nwhile True: sys.stderr.write('x' * (1 << 20))", 60, {"output"}),
    "print without end from a child": ("import os\nos.fork()\nwhile True: os.write(1, bytes(1 << 20))", 60, {"output"}),
    "kill the parent": ("import os; os.kill(os.getppid(), 9)", 60, {"ok", "error"}),
    "kill everything": ("import os; os.kill(-1, 9)", 60, {"ok", "error"}),
    "kill the group": ("import os; os.killpg(0, 9)", 60, {"error"}),
    "stop itself": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", 1.5, {"timeout"}),
    "recurse without end": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return [f()]\nf()",
        3,
        {"error", "memory", "timeout"},
    ),
    "crash the interpreter": ("import ctypes; ctypes.string_at(0)", 60, {"error"}),
    "crash the compiler": ("x = " + "(" * 10_000, 60, {"error", "memory"}),
    "close all descriptors": ("import os; os.closerange(0, 64)", 60, {"ok", "error"}),
    "close all descriptors and stay": ("import os, time; os.closerange(0, 64); time.sleep(600)", 1.5, {"timeout"}),
    "detach a daemon": (DAEMON.format(closes=True), 60, {"ok"}),
    "detach a daemon that holds the output": (DAEMON.format(closes=False), 60, {"ok"}),
    "detach a daemon that ignores signals": (IGNORE_SIGNALS + DAEMON.format(closes=True), 60, {"ok"}),
    "fill the scratch folder": (FILL.format(folder="/tmp"), 60, {"ok"}),
    "fill the shared memory": (FILL.format(folder="/dev/shm"), 60, {"ok"}),
    "hold text that is no program": ("\0\udc80", 60, {"error"}),
}


@dataclasses.dataclass
class Attacked:
    """Outcomes by name, and what this process holds after all attacks: the changes in descriptors and in KiB of memory."""

    runs: dict[str, Future[Run]]
    descriptors: int
    memory_kib: int


@dataclasses.dataclass
class Run:
    """One attack: `left` are the processes that outlive it, `late` the seconds after its time limit."""

    outcome: Outcome
    limits: Limits
    left: list[str]
    late: float


def attack(name: str, limits: Limits) -> Run:
    started = time.monotonic()
    outcome = run_python(ATTACKS[name][0], limits=limits)
    return Run(outcome, limits, processes_under(limits), time.monotonic() - started - limits.seconds)


@pytest.fixture(scope="module")
def attacked(separated) -> Attacked:
    """All attacks, side by side, since most of them wait for their time limit. The longest begin first."""
    marks = random.sample(range(64, 1000), len(ATTACKS))
    limits = {name: marked_limits(mark, ATTACKS[name][1]) for mark, name in zip(marks, ATTACKS, strict=True)}
    gc.collect()  # other tests' descriptors
    open_before = len(os.listdir("/proc/self/fd"))
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with ThreadPoolExecutor(8) as pool:
        waiting_first = sorted(ATTACKS, key=lambda name: ATTACKS[name][1] >= PATIENT.seconds)
        runs = {name: pool.submit(attack, name, limits[name]) for name in waiting_first}
    memory_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before
    return Attacked(runs, len(os.listdir("/proc/self/fd")) - open_before, memory_kib)


@needs_bubblewrap
@pytest.mark.parametrize("name", ATTACKS)
def test_attack_fails_and_nothing_is_left(name: str, attacked: Attacked):
    run = attacked.runs[name].result()
    outcome = run.outcome
    assert outcome.status in ATTACKS[name][2], outcome
    assert run.late < 30  # far less than the program would take
    assert run.left == []
    assert max(len(outcome.stdout), len(outcome.stderr)) <= run.limits.output_bytes
    assert (outcome.exit_code is None) == (outcome.status in ("timeout", "output"))
    if "fill" in name:
        assert 0 < int(outcome.stdout) <= 16


@needs_bubblewrap
def test_attacks_leave_no_descriptor_and_no_memory_in_this_process(attacked: Attacked):
    assert attacked.descriptors <= 0
    assert attacked.memory_kib < 64 * 1024


@pytest.mark.parametrize("where", [pytest.param("bubblewrap", marks=needs_bubblewrap), "local"])
def test_a_program_that_takes_too_long_is_killed(where, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = "import os, time; print('before', flush=True); os.fork(); time.sleep(600)"
    limits = marked_limits(64 + secrets.randbelow(900), seconds=2)
    outcome = run_python(program, limits=limits, sandbox=where)
    assert (outcome.stdout, outcome.status, outcome.exit_code) == ("before\n", "timeout", None)
    assert 2 <= outcome.seconds < 32
    deadline = time.monotonic() + 30
    while where == "local" and processes_under(limits) and time.monotonic() < deadline:
        time.sleep(0.05)  # killed, but no child of ours that could be waited for
    assert processes_under(limits) == [] and list(tmp_path.iterdir()) == []


@needs_bubblewrap
def test_the_number_of_processes_is_limited(separated):
    program = """
    import os, time
    started = 0
    try:
        while True:
            if os.fork() == 0:
                time.sleep(600)
            started += 1
    except BlockingIOError:
        print(started)
    """
    outcome = run_python(textwrap.dedent(program), limits=Limits(seconds=60, processes=5))
    assert outcome.stdout == "4\n", outcome  # and itself


@pytest.mark.parametrize("count", [len(ATTEMPTS) + len(ATTACKS)], ids=lambda count: f"{count} attacks that fail")
def test_number_of_attempts(count, record_property):
    """The number is part of the test's name, for reports."""
    record_property("attacks that have to fail", count)
    assert len(ATTEMPTS) >= 50 and len(ATTACKS) >= 25
