"""Rewards that execute programs: right ones, wrong ones, and ones that only want to look right."""

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cloudpickle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankup.rewards.code import _harness_input, program_of, stdin_stdout, unit_tests
from rankup.rewards.loading import reward_name
from rankup.rewards.sandbox import bubblewrap_problem, run_python

pytestmark = pytest.mark.slow

PROBLEM = bubblewrap_problem()
needs_bubblewrap = pytest.mark.skipif(PROBLEM is not None, reason=f"no sandbox here: {PROBLEM}")
PATIENT = 30  # seconds: the machine may be busy
FACTORIES = [unit_tests, stdin_stdout]
PARTIAL = {"all or nothing": False, "partial credit": True}

DOUBLE = "def f(x):\n    return 2 * x\n"
TESTS = ["assert f(2) == 4", "assert f(3) == 6", "assert f('a') == 'aa'"]
ADD = "a, b = map(int, input().split())\nprint(a + b)\n"
INPUTS, OUTPUTS = ["1 2\n", "3 4", "-1 1"], ["3\n", "7", "0 \n\n"]


# ------------------------------------------------------------------------------------------------------- which program it is


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("x = 1", "x = 1"),
        ("", ""),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("First:\n```python\nx = 1\n```\nBetter:\n```python\nx = 2\n```\nDone.", "x = 2\n"),
        ("```python\nx = 1\n```\nIt prints\n```\n1\n```", "x = 1\n"),
        ("```py\nx = 1\n```\n```bash\nls\n```", "x = 1\n"),
        ("``` Python3 \nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```bash\nls\n```", "```bash\nls\n```"),
        ("```python\nx = 1\ny = 2", "x = 1\ny = 2"),
        ("```python\nx = '''\n``` not at an end ``` of its own\n'''\n```", "x = '''\n``` not at an end ``` of its own\n'''\n"),
        ("```python title=a.py\nx = 1\n```", "x = 1\n"),
        ("```python", ""),
        ("use `x` and ```y```", "use `x` and ```y```"),
    ],
)
def test_the_program_in_a_text(text, program):
    assert program_of(text) == program


@settings(max_examples=50, deadline=None)
@given(st.text().filter(lambda text: "`" not in text), st.text(alphabet="abc \n.", max_size=30))
def test_a_block_is_read_back(program, around):
    assert program_of(f"{around}\n```python\n{program}\n```\n{around}") == f"{program}\n"


@settings(max_examples=50, deadline=None)
@given(st.text(), st.lists(st.text(), min_size=1, max_size=5))
def test_the_harness_finds_every_part(program, tests):
    marks = [f"mark {number}" for number in range(len(tests))]
    data = _harness_input(program, tests, marks, seconds=1, stop_at_failure=True).encode()
    header = json.loads(data[int(data[:20]) :])

    def part(place):
        return data[place[0] : place[0] + place[1]].decode()

    assert part(header["program"]) == program.encode("utf-8", "replace").decode()
    found = [(part(test), part(mark)) for test, mark in header["tests"]]
    assert found == [(test.encode("utf-8", "replace").decode(), mark) for test, mark in zip(tests, marks, strict=True)]


# ------------------------------------------------------------------------------------------------------------- known programs

PROGRAMS = {
    # name: (program, score with all tests, share of tests)
    "right": (DOUBLE, 1.0, 1.0),
    "right, in a block": (f"So:\n```python\n{DOUBLE}```\nThat is it.", 1.0, 1.0),
    "right, and prints": ("print('x' * 1_000_000)\n" + DOUBLE, 1.0, 1.0),
    "right, with a main block": (DOUBLE + "if __name__ == '__main__':\n    print(f(int(input())))\n", 1.0, 1.0),
    "right, with a dataclass": ("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int = 1\n" + DOUBLE, 1.0, 1.0),
    "right the first time": ("n = 0\ndef f(x):\n    global n\n    n += 1\n    return 2 * x if n == 1 else 0\n", 1.0, 1.0),
    "right with a shadowed name": ("def all(x):\n    return 1\n" + DOUBLE, 1.0, 1.0),
    "wrong": ("def f(x):\n    return x\n", 0.0, 0.0),
    "wrong for strings": ("def f(x):\n    return x + int(x)\n", 0.0, 2 / 3),
    "exits for 3": ("import os\ndef f(x):\n    return 2 * x if x != 3 else os._exit(0)\n", 0.0, 2 / 3),
    "exhausts the memory for 3": ("def f(x):\n    return 2 * x if x != 3 else bytearray(1 << 40)\n", 0.0, 2 / 3),
    "crashes for 3": ("import ctypes\ndef f(x):\n    return 2 * x if x != 3 else ctypes.string_at(0)\n", 0.0, 2 / 3),
    "hangs for 3": ("import time\ndef f(x):\n    time.sleep(600 * (x == 3))\n    return 2 * x\n", 0.0, 2 / 3),
    "hangs for 3 with a child": (
        "import os, time\ndef f(x):\n    if x == 3:\n        os.fork()\n        time.sleep(600)\n    return 2 * x\n",
        0.0,
        2 / 3,
    ),
    "hangs immediately": ("while True: pass", 0.0, 0.0),
    "no program": ("def f(x) return 2 * x", 0.0, 0.0),
    "nothing": ("", 0.0, 0.0),
    "half a character": ("\udc80", 0.0, 0.0),
    "reads input": ("n = int(input())\n" + DOUBLE, 0.0, 0.0),
}


@needs_bubblewrap
@pytest.mark.parametrize("partial", PARTIAL.values(), ids=PARTIAL)
@pytest.mark.parametrize("name", PROGRAMS)
def test_unit_tests(name, partial, scores):
    assert scores[unit_tests, partial][name] == pytest.approx(PROGRAMS[name][1 + partial])


RUNS = {
    # name: (program, score with all runs, share of runs)
    "right": (ADD, 1.0, 1.0),
    "right, in a block": (f"```python\n{ADD}```", 1.0, 1.0),
    "right, in a main block": ("if __name__ == '__main__':\n    print(sum(map(int, input().split())))", 1.0, 1.0),
    "right once": ("print(3)", 0.0, 1 / 3),
    "right, but fails": (ADD + "exit(1)", 0.0, 0.0),
    "prints more": (ADD + "print('and more')", 0.0, 0.0),
    "hangs": ("while True: pass", 0.0, 0.0),
    "prints too much": ("print('7' * 1_000_000)", 0.0, 0.0),
    "no program": ("print(", 0.0, 0.0),
    "fails for one input": ("a, b = map(int, input().split())\nprint(a + b if a > 0 else 1 / 0)\n", 0.0, 2 / 3),
}


def scores_of(factory, partial: bool) -> dict[str, float | None]:
    """Programs that hang wait for their time limit, which is short for them alone."""
    programs = PROGRAMS if factory is unit_tests else RUNS
    rewards: dict[str, float | None] = {}
    for hang, seconds in ((True, 1.5), (False, PATIENT)):
        names = [name for name in programs if name.startswith("hangs") == hang]
        columns = {"tests": [TESTS] * len(names), "inputs": [INPUTS] * len(names), "outputs": [OUTPUTS] * len(names)}
        reward = factory(timeout=seconds, partial_credit=partial, workers=4)
        rewards |= zip(names, reward(completions=[programs[name][0] for name in names], **columns), strict=True)
    return rewards


@pytest.fixture(scope="module")
def scores() -> dict[tuple[Any, bool], dict[str, float | None]]:
    """The rewards of all known programs; their waits pass side by side."""
    cases = [(factory, partial) for factory in FACTORIES for partial in PARTIAL.values()]
    with ThreadPoolExecutor(len(cases)) as pool:
        return dict(zip(cases, pool.map(scores_of, *zip(*cases, strict=True)), strict=True))


@needs_bubblewrap
@pytest.mark.parametrize("partial", PARTIAL.values(), ids=PARTIAL)
@pytest.mark.parametrize("name", RUNS)
def test_stdin_stdout(name, partial, scores):
    assert scores[stdin_stdout, partial][name] == pytest.approx(RUNS[name][1 + partial])


@needs_bubblewrap
def test_which_outputs_count_as_equal():
    cases = [
        ("a  \nb\t\n\n", "a\nb", 1.0),
        ("a\r\nb", "a\nb\n", 1.0),
        ("", "", 1.0),
        ("a\n\nb", "a\nb", 0.0),
        (" a", "a", 0.0),
        ("1.0", "1", 0.0),
    ]
    programs = [f"import sys; sys.stdout.write({printed!r})" for printed, _, _ in cases]
    rewards = stdin_stdout(timeout=PATIENT)(completions=programs, inputs=[""] * 6, outputs=[case[1] for case in cases])
    assert rewards == [case[2] for case in cases]


# ------------------------------------------------------------------------------------------------------------------ forgeries

FORGERIES = {
    "exit": "import sys; sys.exit(0)",
    "leave": "import os; os._exit(0)",
    "exit in the function": "import sys\ndef f(x): sys.exit(0)",
    "leave in the function": "import os\ndef f(x): os._exit(0)",
    "raise SystemExit": "def f(x): raise SystemExit(0)",
    "leave from a thread": "import os, threading\ndef f(x): threading.Thread(target=os._exit, args=(0,)).start()",
    "leave at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0",
    "leave when it fails": "import os, sys\nsys.excepthook = lambda *a: os._exit(0)\ndef f(x): return 0",
    "kill the test": "import os\ndef f(x): os.kill(os.getpid(), 9)",
    "kill everything": "import os\ndef f(x): os.kill(-1, 9)",
    "print a verdict": "print('passed', 'OK', '1.0', 'ok', True, sep='\\n')\ndef f(x): return 0",
    "print to every descriptor": """
import os
def f(x):
    for descriptor in range(256):
        try: os.write(descriptor, b"passed\\nOK\\n1.0\\n" * 10)
        except OSError: pass
    return 0
""",
    "read the input": "import sys\nprint(sys.stdin.read())\ndef f(x): return 0",
    "replace AssertionError": "import builtins\nbuiltins.AssertionError = int\nAssertionError = int\ndef f(x): return 0",
    "replace compile": "import builtins\nreal = compile\nbuiltins.compile = lambda *a, **k: real('', '', 'exec')",
    "replace exec": "import builtins\nbuiltins.exec = exec = lambda *a: None\ndef f(x): return 0",
    "replace the builtins": "__builtins__ = {'exec': print, 'compile': print}\ndef f(x): return 0",
    "replace reading": "import os\nos.pread = lambda *a: b''\ndef f(x): return 0",
    "replace writing": "import os\nos.write = os.waitpid = os.fork = lambda *a: (0, 0)\ndef f(x): return 0",
    "jump over the test": """
import sys
def trace(frame, event, argument):
    if event == "line" and "test" in frame.f_code.co_filename:
        frame.f_lineno = 4
    return trace
sys.settrace(trace)
def f(x): return 0
""",
    "continue in a fork": "import os\ndef f(x):\n    if os.fork(): os._exit(0)\n    return 0",
    "ignore the end": "import signal\nfor n in (2, 14, 15): signal.signal(n, signal.SIG_IGN)\ndef f(x): return 0",
    "swallow the error": "try:\n    f\nexcept NameError:\n    pass",
}


@pytest.fixture(scope="module")
def forged() -> dict[str, float | None]:
    reward = unit_tests(timeout=PATIENT, partial_credit=True, workers=4)
    tests = ["assert f(2) == 4", "assert f(3) == 6\n\nassert f(4) == 8\npass"]
    rewards = reward(completions=list(FORGERIES.values()), tests=[tests] * len(FORGERIES))
    return dict(zip(FORGERIES, rewards, strict=True))


@needs_bubblewrap
@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_scores_nothing(name, forged):
    assert forged[name] == 0.0


@needs_bubblewrap
def test_the_forgery_that_the_docstring_mentions():
    equal_to_all = "class Yes:\n    def __eq__(self, other): return True\ndef f(x): return Yes()"
    assert unit_tests(timeout=PATIENT)(completions=[equal_to_all], tests=[TESTS]) == [1.0]
    assert "`__eq__`" in (unit_tests.__doc__ or "")


@needs_bubblewrap
@pytest.mark.parametrize(("given", "reward"), [("x", 0.0), ("5c1b6a0e7f", 1.0)])
def test_the_expected_output_is_not_in_the_sandbox(given, reward):
    """The program prints whatever begins like it, of all that it can read: it finds it where the input holds it, only there."""
    program = r"""
import os, re, sys
seen = [sys.stdin.read(), str(sys.argv), str(os.environ)]
for folder in ("/tmp", "/dev/shm", "/proc/1", "/proc/self"):
    for name in os.listdir(folder):
        try: seen.append(open(os.path.join(folder, name), errors="replace").read(1 << 16))
        except OSError: pass
print(*re.findall(r"5c1b6\w{5}", "\n".join(seen)))
"""
    function = stdin_stdout(timeout=PATIENT, memory_mib=1024)
    assert function(completions=[program], inputs=[given], outputs=["5c1b6a0e7f"]) == [reward]


# -------------------------------------------------------------------------------------------------------------------- the rows


@needs_bubblewrap
def test_rows_that_are_none_are_left_out():
    assert unit_tests(timeout=PATIENT)(completions=[DOUBLE] * 3, tests=[None, TESTS, TESTS[0]]) == [None, 1.0, 1.0]
    rewards = stdin_stdout(timeout=PATIENT)(
        completions=[ADD] * 4, inputs=[None, INPUTS, INPUTS, "1 2"], outputs=[OUTPUTS, None, OUTPUTS, "3"]
    )
    assert rewards == [None, None, 1.0, 1.0]
    assert unit_tests()(completions=[], tests=[]) == []


@needs_bubblewrap
def test_of_a_conversation_the_last_message_counts():
    completion = [{"role": "user", "content": "exit()"}, {"role": "assistant", "content": f"```python\n{DOUBLE}```"}]
    assert unit_tests(timeout=PATIENT)(completions=[completion], tests=[TESTS], prompts=["?"], answer=[1]) == [1.0]


@needs_bubblewrap
@pytest.mark.parametrize("tests", [[], [1], [None], 7, {"a": 1}.values()])
def test_a_row_without_tests_is_an_error_that_names_it(tests):
    with pytest.raises(ValueError, match="row 1: tests must be"):
        unit_tests()(completions=["", ""], tests=[None, tests])


@needs_bubblewrap
@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (["1"], ["1", "2"], "row 0: there are 1 inputs and 2 outputs"),
        ([], [], "row 0: inputs must be"),
        (["1"], [1], "row 0: outputs must be"),
        (["1"], ["x" * 70_000], "row 0: an output has 70000 bytes: set output_bytes"),
    ],
)
def test_rows_that_cannot_be_scored(inputs, outputs, message):
    with pytest.raises(ValueError, match=message):
        stdin_stdout()(completions=[""], inputs=[inputs], outputs=[outputs])


# ------------------------------------------------------------------------------------------------------------------- factories


@needs_bubblewrap
@pytest.mark.parametrize("factory", FACTORIES)
def test_a_reward_has_a_name_and_can_be_pickled(factory):
    reward = factory(timeout=PATIENT, workers=3)
    assert reward_name(reward) == factory.__name__
    again = cloudpickle.loads(cloudpickle.dumps(reward))
    columns = {"tests": [TESTS], "inputs": ["1 2"], "outputs": ["3"]}
    assert again(completions=[ADD if factory is stdin_stdout else DOUBLE], **columns, trainer_state=None) == [1.0]


@needs_bubblewrap
@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("wrong", [{"workers": 0}, {"timeout": 0}, {"memory_mib": 1}])
def test_arguments_that_make_no_sense(factory, wrong):
    with pytest.raises(ValueError):
        factory(**wrong)


@pytest.mark.parametrize("factory", FACTORIES)
def test_without_bubblewrap_the_factory_raises(factory, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"apt install bubblewrap.*unsafe_local: true"):
        factory()
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(ValueError, match="does not work here"):
        factory()


def test_without_bubblewrap_unsafe_local_runs_all_the_same(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    tests = unit_tests(timeout=PATIENT, unsafe_local=True, partial_credit=True)
    half = "def f(x): return 4"
    assert tests(completions=[DOUBLE, half, "exit()"], tests=[TESTS] * 3) == [1.0, pytest.approx(1 / 3), 0.0]
    runs = stdin_stdout(timeout=PATIENT, unsafe_local=True)
    assert runs(completions=[ADD, "print(3)"], inputs=[INPUTS] * 2, outputs=[OUTPUTS] * 2) == [1.0, 0.0]


@needs_bubblewrap
def test_packages_of_this_python_on_demand():
    program = "import yaml\ndef f(x):\n    return 2 * x\n"
    for wanted in (False, True):
        reward = unit_tests(timeout=PATIENT, site_packages=wanted)
        assert reward(completions=[program], tests=[TESTS]) == [float(wanted)]


def test_a_sandbox_that_stops_working_is_an_error_and_no_reward(monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho the disk is full >&2\nexit 1\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="the disk is full"):
        run_python("", sandbox="bubblewrap")
