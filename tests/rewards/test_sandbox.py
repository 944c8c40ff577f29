"""The sandbox with ordinary programs, and where there is none; test_sandbox_attacks.py has the others."""

import gc
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from rankup.rewards.sandbox import Limits, bubblewrap_problem, choose_sandbox, run_python
from rankup.rewards.seccomp import seccomp_filter

PROBLEM = bubblewrap_problem()
needs_bubblewrap = pytest.mark.skipif(PROBLEM is not None, reason=f"no sandbox here: {PROBLEM}")
PATIENT = Limits(seconds=60)  # for programs that end by themselves: the machine may be busy


def test_a_bwrap_that_works_is_trusted() -> None:
    """Otherwise a mistake in its arguments would only skip these tests."""
    bwrap = shutil.which("bwrap")
    if bwrap is None or subprocess.run([bwrap, "--unshare-all", "--ro-bind", "/", "/", "true"], capture_output=True).returncode:
        pytest.skip("bwrap does not work on this machine")
    assert PROBLEM is None


@pytest.fixture(params=[pytest.param("bubblewrap", marks=needs_bubblewrap), "local"])
def where(request) -> str:
    return request.param


@pytest.mark.parametrize(
    ("program", "stdout", "status", "exit_code"),
    [
        ("print(input()[::-1])", "cba\n", "ok", 0),
        ("print(open('/dev/stdin').read(), end='')", "abc\nd\u00e9f", "ok", 0),
        ("import sys; sys.stdout.buffer.write(b'a\\xff')", "a\ufffd", "ok", 0),
        ("if __name__ == '__main__': print(1)", "1\n", "ok", 0),
        ("exit(3)", "", "error", 3),
        ("print(1); raise KeyError", "1\n", "error", 1),
        ("print(1", "", "error", 1),
        ("import os; os.kill(os.getpid(), 15)", "", "error", 143),
        ("print('x' * 100_000)", "x" * 65_536, "output", None),
        ("import subprocess; print(subprocess.check_output(['echo', 'hi'], text=True))", "hi\n\n", "ok", 0),
        ("import dataclasses, decimal, heapq, numbers, typing; print(decimal.Decimal(1) / 4)", "0.25\n", "ok", 0),
        ("open('file', 'w').write('text'); print(open('file').read())", "text\n", "ok", 0),
        ("class A: pass\nimport pickle; print(type(pickle.loads(pickle.dumps(A()))) is A)", "True\n", "ok", 0),
    ],
)
def test_program(where, program, stdout, status, exit_code, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    outcome = run_python(program, stdin="abc\nd\u00e9f", limits=PATIENT, sandbox=where)
    assert (outcome.stdout, outcome.status, outcome.exit_code) == (stdout, status, exit_code), outcome
    assert list(tmp_path.iterdir()) == []


def test_memory_is_limited(where):
    outcomes = [run_python("x = bytearray(40 << 20)", limits=Limits(memory_mib=m, seconds=60), sandbox=where) for m in (50, 99)]
    assert [outcome.status for outcome in outcomes] == ["memory", "ok"], outcomes
    assert "MemoryError" in outcomes[0].stderr


def test_a_large_input_arrives(where):
    outcome = run_python("import sys; print(len(sys.stdin.read()))", stdin="x" * 5_000_000, limits=PATIENT, sandbox=where)
    assert outcome.stdout == "5000000\n"


def test_the_same_program_prints_the_same(where):
    program = "print({str(number) for number in range(50)}, hash('a'))"
    first, second = (run_python(program, limits=PATIENT, sandbox=where).stdout for _ in range(2))
    assert first == second != ""


def test_packages_are_visible_on_demand(where):
    program = "import importlib.util; print(importlib.util.find_spec('yaml') is not None)"
    found = [run_python(program, limits=PATIENT, sandbox=where, site_packages=wanted).stdout for wanted in (False, True)]
    assert found == ["False\n", "True\n"]


@needs_bubblewrap
def test_threads_may_call_concurrently():
    gc.collect()  # other tests' descriptors
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(lambda n: run_python("print(int(input()) * 2)", stdin=str(n), limits=PATIENT), range(12)))
    # A pipe or descriptor that leaks into another program would block it, or mix up their output.
    assert [outcome.stdout for outcome in outcomes] == [f"{2 * n}\n" for n in range(12)]
    assert len(os.listdir("/proc/self/fd")) <= before


# --------------------------------------------------------------------------------------------------- limits, and no bubblewrap


@pytest.mark.parametrize(
    "wrong",
    [
        {"seconds": 0},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"memory_mib": 1},
        {"memory_mib": 100.0},
        {"processes": 0},
        {"processes": True},
        {"open_files": 3},
        {"output_bytes": -1},
        {"scratch_mib": 0},
    ],
)
def test_limits_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Limits(**wrong)


def test_without_bubblewrap_the_error_names_the_package_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"bwrap is not installed.*apt install bubblewrap.*unsafe_local: true"):
        run_python("print(1)")
    assert choose_sandbox(unsafe_local=True) == "local"
    assert run_python("print(1)", sandbox="local", limits=PATIENT).stdout == "1\n"


def test_a_bubblewrap_that_fails_is_not_used(monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text(f"#!{sys.executable}\nraise SystemExit('no permission to make namespaces')\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no permission to make namespaces"):
        choose_sandbox()
    assert choose_sandbox(unsafe_local=True) == "local"
    with pytest.raises(RuntimeError, match="the sandbox did not start: no permission"):
        run_python("print(1)", sandbox="bubblewrap", limits=PATIENT)


@needs_bubblewrap
def test_bubblewrap_is_taken_where_it_works():
    assert choose_sandbox() == choose_sandbox(unsafe_local=True) == "bubblewrap"


def test_the_filter_is_for_known_machines():
    filters = {machine: seccomp_filter(machine) for machine in ("x86_64", "aarch64")}
    assert all(len(code) % 8 == 0 for code in filters.values()) and len(set(filters.values())) == 2
    with pytest.raises(ValueError, match="not of riscv64"):
        seccomp_filter("riscv64")
