import json
import lzma
from pathlib import Path

import cloudpickle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankup.rewards.answers import exact_match, exact_match_of, last_integer, last_number

GSM8K_ANSWERS = Path(__file__).parent / "data" / "gsm8k_answers.txt.xz"


@pytest.fixture(scope="module")
def gsm8k_answers() -> list[str]:
    return [json.loads(line) for line in lzma.decompress(GSM8K_ANSWERS.read_bytes()).decode().splitlines()]


@pytest.mark.parametrize(
    ("completion", "integer"),
    [
        ("42", 42),
        ("The answer is 42.", 42),
        ("17 + 25 = 42", 42),
        ("17+25=42!", 42),
        ("first 41, then 42", 42),
        ("**42**", 42),
        (r"\boxed{42}", 42),
        ("It costs $1,234.", 1234),
        ("1,234,567 people", 1234567),
        ("1,2,3", 3),
        ("007", 7),
        ("-5", -5),
        ("it is -5.", -5),
        ("(-5)", -5),
        ("=-5", -5),
        ("\u22125", -5),
        ("-$1,234", -1234),
        ("-0", 0),
        ("12-5", 5),
        ("12 - 5", 5),
        ("(x)-5", 5),
        ("pages 3-5", 5),
        ("x-5", 5),
        ("4.0", 4),
        ("$18.00.", 18),
        ("1,234.00", 1234),
        ("wait...5", 5),
        ("as above.5", 5),
        ("version 3.1, then 42", 42),
        ("5%", 5),
        ("42\n", 42),
    ],
)
def test_the_last_integer_is_found(completion, integer):
    assert last_integer([completion, completion], answer=[integer, integer + 1]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "completion",
    ["", "no number", "12.5", ".5", "0.42", "$.12", "42, or rather 42.5", "five", "1" * 10_000, "-12", "12,5", "123,42"],
)
def test_without_the_integer_at_the_end_the_reward_is_0(completion):
    assert last_integer([completion] * 3, answer=[12, 5, 42]) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("answer", [1234, "1234", "1,234", " 1234 ", "#### 1,234", 1234.0, "1234.0", "Sum\n#### 1234"])
def test_answers_of_all_kinds(answer):
    assert last_integer(["it is 1,234.", "it is 1235"], answer=[answer, answer]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("He has 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nThat makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18", 18),
        ("It takes 2/2=<<2/2=1>>1 bolt\nSo 2+1=<<2+1=3>>3 bolts\n#### 3", 3),
        ("He made 200,000-130,000=$<<200000-130000=70000>>70,000\n#### 70000", 70000),
        ("3*60=<<3*60=180>>180 meters\n#### 180", 180),
        ("The total is 20*3=<<20*3=60>>60 cups\n#### 60", 60),
        ("50% of 1,450,000 is <<.5*1450000=725000>>725,000\n#### 1,450,000", 1450000),
        ("She lost 5 - 10 = <<5-10=-5>>-5 points\n#### -5", -5),
        ("It is 0.5 * 26 = <<0.5*26=13>>13\n#### 13", 13),
        ("That is 1,250 - 250 = <<1250-250=1000>>1,000 dollars.\n#### 1,000", 1000),
        ("There are 10-10=<<10-10=0>>0 left\n#### 0", 0),
        ("10:30 is 630 minutes\n#### 630", 630),
        ("$9.50 + $0.50 = $<<9.5+.5=10>>10.00\n#### 10", 10),
    ],
)
def test_reference_texts_of_gsm8k(reference, answer):
    assert last_integer([f"The answer is {answer}.", reference], answer=[reference, reference]) == [1.0, 1.0]
    assert last_integer([f"The answer is {answer + 1}."], answer=[reference]) == [0.0]


def test_of_a_conversation_the_last_message_counts():
    completions = [
        [{"role": "assistant", "content": "42"}],
        [
            {"role": "assistant", "content": "42"},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "7"},
        ],
        [{"role": "assistant", "content": None}],
    ]
    assert last_integer(completions, answer=[42, 7, 1]) == [1.0, 1.0, 0.0]


def test_a_row_without_an_answer_is_left_out():
    assert last_integer(["1", "2"], answer=[None, 2]) == [None, 1.0]


@pytest.mark.parametrize("answer", ["yes", "", "12.5"])
def test_an_answer_that_cannot_be_matched_is_an_error_that_names_its_row(answer):
    with pytest.raises(ValueError, match="the answer of row 1 does not end with an integer"):
        last_integer(["1", "2"], answer=["1", answer])


@given(st.integers(), st.text(alphabet="abc =:*#\n", max_size=20), st.sampled_from([".", "", " ", "!", "\n", ".\n"]))
def test_every_integer_is_read_back_with_and_without_separators(integer, before, after):
    for written in (f"{integer}", f"{integer:,}"):
        completion = f"{before} {written}{after}"
        assert last_integer([completion, completion], answer=[integer, integer + 1]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("completion", "number"),
    [
        ("4.0", "4"),
        ("4", "4.000"),
        ("It is 12.50.", "12.5"),
        ("$1,234.50", "1234.5"),
        ("-$0.5", "-.5"),
        ("about .5", "0.5"),
        ("(-.25)", "-0.25"),
        ("12.5%", "12.5"),
        ("5 \u20ac", "5"),
        ("1.5, or 2.5", "2.5"),
        ("3.0-2.5", "2.5"),
        ("-0.0", "0"),
        ("0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
        ("9" * 5000 + ".5", "9" * 5000 + ".50"),
    ],
)
def test_the_last_number_is_compared_exactly(completion, number):
    assert last_number([completion] * 3, answer=[number, f"{number}1" if "." in number else f"{number}.1", "77"]) == [1, 0, 0]


@pytest.mark.parametrize(
    ("completion", "answer"), [("0.333", "0.3333"), ("12", "12.5"), ("12.5", "12"), ("no number", "1"), ("", "0"), ("5", ".5")]
)
def test_other_numbers_earn_nothing(completion, answer):
    assert last_number([completion], answer=[answer]) == [0.0]


def test_last_number_leaves_rows_out_and_names_a_bad_answer():
    assert last_number(["1", "2.5"], answer=[None, 2.5]) == [None, 1.0]
    with pytest.raises(ValueError, match="the answer of row 1 has no number: 'yes'"):
        last_number(["1", "2"], answer=["1", "yes"])


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.sampled_from([".", "", " ", "!", ".\n", "%", " euros"]))
def test_every_decimal_is_read_back(number, after):
    completions = [f"It is {number:f}{after}", f"It is {number:,f}{after}"]
    assert last_number(completions, answer=[number, f"{number:f}"]) == [1.0, 1.0]


def test_all_reference_answers_of_gsm8k_are_read(gsm8k_answers):
    assert len(gsm8k_answers) == 8792
    final = [text.rpartition("#### ")[2].replace(",", "") for text in gsm8k_answers]
    assert all(text.lstrip("-").isdigit() for text in final)
    for reward in (last_integer, last_number):
        assert reward(gsm8k_answers, answer=gsm8k_answers) == [1.0] * 8792
        assert reward(final, answer=gsm8k_answers) == [1.0] * 8792


@pytest.mark.parametrize("reward", [last_integer, last_number])
@pytest.mark.parametrize("form", ["The answer is {}.", "**{}**", r"So it is \boxed{{{}}}", "Half of 10 is 5.\n#### {}\n"])
def test_gsm8k_completions_in_usual_forms(gsm8k_answers, reward, form):
    answers = [text.rpartition("\n")[2] for text in gsm8k_answers]  # the last line; the complete texts are read above
    numbers = [int(text.removeprefix("#### ").replace(",", "")) for text in answers]
    for style in ("{}", "{:,}"):
        right = [form.format(style.format(number)) for number in numbers]
        wrong = [form.format(style.format(number + 1)) for number in numbers]
        assert reward(right, answer=answers) == [1.0] * 8792
        assert reward(wrong, answer=answers) == [0.0] * 8792


def test_exact_match_ignores_white_space_around_the_text_only():
    completions = [" Paris\n", "paris", "Par is", "42", [{"role": "assistant", "content": "Paris"}], "Paris"]
    assert exact_match(completions, answer=["Paris", "Paris", "Paris", 42, " Paris", None]) == [1, 0, 0, 1, 1, None]


@pytest.mark.parametrize(
    ("options", "scores"),
    [
        ({}, [1.0, 0.0, 0.0, 0.0, 0.0]),
        ({"ignore_case": True}, [1.0, 1.0, 0.0, 0.0, 0.0]),
        ({"ignore_whitespace": True}, [1.0, 0.0, 1.0, 0.0, 0.0]),
        ({"ignore_case": True, "ignore_whitespace": True}, [1.0, 1.0, 1.0, 1.0, 0.0]),
    ],
)
def test_options_of_exact_match(options, scores):
    reward = cloudpickle.loads(cloudpickle.dumps(exact_match_of(**options)))
    assert reward.__name__ == "exact_match"
    assert reward(completions=["New York", "new york", "New\n York", "newyork", "York"], answer=["New York"] * 5) == scores


@pytest.mark.parametrize(
    ("answer", "equal", "different"),
    [
        (True, ["true", "True", " TRUE "], ["1", "yes", "false", ""]),
        (False, ["false", "False"], ["0", "no", "true", ""]),
        ("true", ["true"], ["True", "1"]),
        (3.0, ["3", "3.0", "3.00", "+3", "3e0"], ["3.1", "three", "-3", ""]),
        (3, ["3", "3.0"], ["33", "true"]),
        ("3", ["3"], ["3.0", "03"]),
        ("3.0", ["3.0"], ["3"]),
        (0.1, ["0.1", "0.10", "1/10", "1e-1"], ["0.1000000001", "1"]),
        (1e16, ["1e16", "10000000000000000"], ["10000000000000001"]),
        ([1, 2], ["[1, 2]", "[1,2]", "[1.0, 2]"], ["1, 2", "[2, 1]", "[1, 2", "[true, 2]"]),
        ([True], ["[true]"], ["[1]", "true"]),
        (["a"], ['["a"]', "['a']"], ["a"]),
        ({"a": 1, "b": None}, ['{"b": null, "a": 1}'], ['{"a": 1}', '{"a": true, "b": null}']),
        (["7"], ['["7"]'], ["[7]"]),
    ],
)
def test_exact_match_compares_booleans_numbers_and_json_by_value_and_texts_as_texts(answer, equal, different):
    assert exact_match(equal, answer=[answer] * len(equal)) == [1.0] * len(equal)
    assert exact_match(different, answer=[answer] * len(different)) == [0.0] * len(different)
