import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankup.rewards.answers import last_integer


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
        ("12345,678", 678),
        ("1,2,3", 3),
        ("1,2345", 2345),
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
        ("version 3.1, then 42", 42),
        ("5%", 5),
        ("42\n", 42),
    ],
)
def test_the_last_integer_is_found(completion, integer):
    assert last_integer([completion, completion], answer=[integer, integer + 1]) == [1.0, 0.0]


@pytest.mark.parametrize("completion", ["", "no number", "12.5", "42, or rather 42.5", "five", "1" * 10_000, "-12"])
def test_without_the_integer_at_the_end_there_is_no_reward(completion):
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
