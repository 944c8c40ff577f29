import signal
import threading
import time

import cloudpickle
import pytest

from rankup.rewards.mathematics import math_verify, math_verify_of

PATIENT = math_verify_of(time_limit=120)  # known answers must not depend on how busy the machine is


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("42", ["The answer is 42.", r"\boxed{42}", "42.0", "It is **42**"], ["43", "4.2", "-42", "", "no idea", r"\boxed{"]),
        ("-5", ["-5", r"$-5$"], ["5"]),
        ("1,234", ["1234", "It is 1,234.", r"\boxed{1{,}234}"], ["234", "1"]),
        ("1/2", ["0.5", "1/2", r"$\frac{2}{4}$", ".5"], ["0.6", "1", "2"]),
        (r"$\frac{1}{2}$", ["1/2", r"\boxed{\dfrac12}"], ["2/1"]),
        (r"\frac{1}{2}", [r"so $\frac{1}{2}$."], ["12"]),
        (r"It is \boxed{3}.", ["3"], ["4"]),
        ("1/3", ["0.333333", r"\boxed{\frac{2}{6}}"], ["0.33"]),
        ("50%", ["50%", "50", "0.5", r"\boxed{50\%}"], ["5%", "51"]),
        (r"\{1, 2\}", [r"$\{2, 1\}$", r"\boxed{1, 2}"], [r"$\{1, 3\}$", "$1$"]),
        ("3, 4", [r"\boxed{4, 3}"], [r"\boxed{4}", "4", "3"]),
        ("[0, 1)", ["$[0, 1)$", r"\boxed{[0, 1)}"], ["$[0, 1]$", "$[0, 2)$"]),
        (r"(-\infty, 2] \cup [3, \infty)", [r"$[3, \infty) \cup (-\infty, 2]$"], [r"$[3, \infty)$", "2"]),
        (r"5\text{ cm}", [r"\boxed{5\text{ cm}}", "5 cm", "5"], ["6 cm"]),
        (r"12\text{ apples}", ["12 apples"], ["21 apples"]),
        (r"\$18.90", ["$18.90", "18.9"], ["18"]),
        ("$5", ["5", "$5"], ["6"]),
        (r"2\sqrt{3}", [r"$\sqrt{12}$"], [r"$2$", r"$\sqrt{3}$"]),
        ("2x", [r"$x + x$"], ["2", "$3x$"]),
        ("x^2 + 2x + 1", [r"$(x + 1)^2$"], [r"$(x - 1)^2$"]),
        ("x = 3", ["$x = 3$", "3"], ["$y = 3$"]),
        (r"\text{Tuesday}", [r"\boxed{\text{Tuesday}}"], [r"\boxed{\text{Monday}}"]),
        ("1 + 1 = $<<1+1=2>>2\n#### 1,234", ["1234"], ["2"]),
        (42, ["42"], ["41"]),
        (0.5, ["1/2"], ["1"]),
        (1e20, ["1" + "0" * 20], ["1"]),
    ],
)
def test_known_answers(answer, right, wrong):
    completions = [*right, *wrong]
    assert PATIENT(completions=completions, answer=[answer] * len(completions)) == [1.0] * len(right) + [0.0] * len(wrong)


def test_conversations_and_rows_without_an_answer():
    completions = [[{"role": "assistant", "content": "1/2"}], [{"role": "assistant", "content": None}], "3"]
    assert math_verify(completions=completions, answer=["0.5", "0.5", None], prompts=["p"] * 3) == [1.0, 0.0, None]


@pytest.mark.parametrize("answer", ["", "????", r"\frac{1}{", "#### "])
def test_an_answer_that_cannot_be_read_is_an_error_that_names_its_row(answer):
    with pytest.raises(ValueError, match=r"the answer of row 1 cannot be read as mathematics.*exact_match"):
        math_verify(completions=["1", "1"], answer=["1", answer])


@pytest.mark.parametrize(
    "endless", ["10**10**10", r"\boxed{10^{10^{10}}}", r"\boxed{\sum_{i=1}^{100000000} i^{3}}", r"\boxed{" + "x+" * 1000 + "1}"]
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the alarm may come inside a weak reference
def test_an_endless_completion_times_out(endless):
    reward = math_verify_of(time_limit=1)
    reward(completions=["1"], answer=["1"])  # the library is loaded
    start = time.monotonic()
    assert reward(completions=[endless, "42"], answer=["42", "42"]) == [0.0, 1.0]
    assert time.monotonic() - start < 60


def test_the_alarm_is_off_afterwards_and_its_handler_as_before():
    before = signal.getsignal(signal.SIGALRM)
    math_verify(completions=["1"], answer=["1"])
    assert signal.alarm(0) == 0
    assert signal.getsignal(signal.SIGALRM) is before


def test_off_the_main_thread_it_raises():
    outcome = []

    def score():
        try:
            outcome.append(math_verify(completions=["42"], answer=["42"]))
        except RuntimeError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=score)
    thread.start()
    thread.join()
    assert "math_verify needs the main thread" in outcome[0]
    assert "`isolation: process`" in outcome[0]


@pytest.mark.parametrize("time_limit", [0, -1, 0.5, None])
def test_time_limits_that_an_alarm_cannot_keep(time_limit):
    with pytest.raises(ValueError, match="integer of at least 1"):
        math_verify_of(time_limit=time_limit)


def test_it_can_be_pickled():
    reward = cloudpickle.loads(cloudpickle.dumps(math_verify_of(time_limit=120)))
    assert reward.__name__ == "math_verify"
    assert reward(completions=["0.5"], answer=["1/2"]) == [1.0]
