import asyncio
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_server import JudgeServer, completion, judge_server
from scored import scorer_of

from rankup.rewards import Inputs, RewardError
from rankup.rewards.judge import DEFAULT_TEMPLATE, JudgeError, judge

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a request is sent again, openai waits for half a second, then for twice as long."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.02)


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judge_server() as state:
        yield state


@pytest.fixture(scope="module")
def echo() -> Iterator[JudgeServer]:
    with judge_server() as state:
        yield state


def make(server: JudgeServer, **options: Any) -> Any:
    return judge(**{"model": "m", "base_url": server.url, "prompt": "{completion}", **options})


def ask(reward: Any, completions: list[Any], prompts: list[Any] | None = None, **columns: Any) -> SimpleNamespace:
    """Rewards, logged columns and metrics of one call."""
    extras: dict[str, list[Any]] = {}
    metrics: dict[str, float] = {}
    rewards = asyncio.run(
        reward(
            prompts=prompts or ["p"] * len(completions),
            completions=completions,
            completion_ids=[[1]] * len(completions),
            trainer_state=SimpleNamespace(global_step=1),
            log_extra=extras.__setitem__,
            log_metric=metrics.__setitem__,
            **columns,
        )
    )
    return SimpleNamespace(rewards=rewards, extras=extras, metrics=metrics)


# ------------------------------------------------------------------------------------------ scores

READ = {
    "7": 0.7,
    "Score: 7": 0.7,
    "Clear, but wrong. Score: 7/10": 0.7,
    "**7**/10": 0.7,
    "7 / 10.": 0.7,
    "7 out of 10": 0.7,
    "7 (out of 10)": 0.7,
    "Two of 3 facts are right.\nScore: 4": 0.4,
    "First 3, then 8.5.": 0.85,
    "Score: .5": 0.05,
    "Score:0": 0.0,
    "10": 1.0,
    "a 7-8": 0.8,
}
UNREADABLE = {
    "no number": "has no number",
    "": "is empty",
    "11": "'11' is not on the scale from 0 to 10",
    "-1": "'-1' is not on the scale",
    "4/5": "'4/5' is not on the scale",
    "model-v2.1": "has no number",
}


def test_the_last_number_of_the_reply_is_the_score(echo):
    answers = ask(make(echo), list(READ))
    assert dict(zip(READ, answers.rewards, strict=True)) == pytest.approx(READ)
    assert answers.metrics == {"judge/failed_ratio": 0.0}
    assert answers.extras == {"judge_reply": list(READ)}


def test_a_reply_that_cannot_be_read_gives_none(echo):
    answers = ask(make(echo), [*UNREADABLE, "8", "9"])
    assert answers.rewards == [None] * 6 + [0.8, 0.9]
    assert answers.metrics == {"judge/failed_ratio": 6 / 8}
    for reply, shown in zip(UNREADABLE, answers.extras["judge_reply"], strict=False):
        assert shown.startswith(f"{reply} [no score: ".lstrip()) and UNREADABLE[reply] in shown


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (completion("Score: 7", finish_reason="length"), "Score: 7 [no score: the reply was cut off: raise max_tokens"),
        (completion(None), "[no score: the reply is empty]"),
        ({**completion("7"), "choices": []}, "[no score: the endpoint sent no reply]"),
        ((400, "too long for the model"), "[no score: the endpoint refused the request: "),
    ],
)
def test_a_failure_of_one_row_gives_none(server, answer, shown):
    server.answer = lambda question: answer if question == "bad" else question
    answers = ask(make(server), ["8", "bad"])
    assert answers.rewards == [0.8, None]
    assert answers.extras["judge_reply"][0] == "8"
    assert answers.extras["judge_reply"][1].startswith(shown)
    assert len(server.questions) == 2  # not sent again


@pytest.mark.parametrize(("scale", "score", "reward"), [((0, 1), "0.25", 0.25), ((1, 5), "2", 0.25), ([-1, 1], "-1", 0.0)])
def test_scales(echo, scale, score, reward):
    assert ask(make(echo, scale=scale), [score]).rewards == [reward]


def test_a_judge_that_never_gives_a_score_stops_the_run(echo):
    reward = make(echo)
    assert ask(reward, ["x"] * 31).rewards == [None] * 31
    with pytest.raises(JudgeError, match="has scored none of 32 completions; the last failed because the reply has no number"):
        ask(reward, ["x"])
    assert ask(make(echo, on_failure="none"), ["x"] * 32).rewards == [None] * 32


def test_a_judge_that_has_scored_before_continues(echo):
    reward = make(echo)
    assert ask(reward, ["1"]).rewards == [0.1]
    assert ask(reward, ["x"] * 40).rewards == [None] * 40


def test_the_request(server):
    ask(make(server), ["1"])
    ask(make(server, max_tokens=None, temperature=None, extra_body={"max_completion_tokens": 9}), ["1"])
    message = {"messages": [{"role": "user", "content": "1"}], "model": "m"}
    assert server.bodies == [{**message, "max_tokens": 512, "temperature": 0.0}, {**message, "max_completion_tokens": 9}]


def test_two_judges_in_one_run(echo):
    rewards = [make(echo, name="helpful"), make(echo, name="polite", prompt="{completion} 1")]
    scores = scorer_of(rewards).score(Inputs(prompts=["p"], completions=["7"], completion_ids=[[1]]))
    assert scores.by_function == {"helpful": [0.7], "polite": [0.1]}
    assert scores.extras == {"helpful_reply": ["7"], "polite_reply": ["7 1"]}
    assert scores.metrics == {"helpful/failed_ratio": 0.0, "polite/failed_ratio": 0.0}


# ------------------------------------------------------------------------------------------ the template


def test_the_template_is_filled(server):
    template = "{prompt}|{completion}|{answer}|{level}|{low:}|{high}|{{kept}}|{answer}"
    ask(make(server, prompt=template, scale=(1, 5)), ["c"], ["p"], answer=[4.5], level=["easy"], unused=[0])
    assert server.questions == ["p|c|4.5|easy|1|5|{kept}|4.5"]


def test_conversations_are_written_out(server):
    prompts = [
        [{"role": "user", "content": "hello"}],
        [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}],
    ]
    completions = [[{"role": "assistant", "content": "hi 1"}], [{"role": "assistant", "content": "hi 2"}]]
    assert ask(make(server, prompt="{prompt}|{completion}"), completions, prompts).rewards == [0.1, 0.2]
    assert sorted(server.questions) == ["hello|hi 1", "system: be kind\n\nuser: hello|hi 2"]


def test_the_default_template_works(server):
    server.answer = lambda question: "Fine. Score: 6"
    assert ask(make(server, prompt=DEFAULT_TEMPLATE), ["the answer"], ["the request"]).rewards == [0.6]
    for part in ("the answer", "the request", "from 0 to 10"):
        assert part in server.questions[0]


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def three_texts(echo) -> Any:
    return make(echo, prompt="{prompt}|{completion}|{answer} 1")


@settings(max_examples=15, deadline=None)
@given(st.lists(st.text(alphabet="{}ab0!:.[]\n", max_size=12), min_size=1, max_size=6))
def test_braces_in_the_texts_are_not_interpreted(echo, runner, three_texts, texts):
    before = len(echo.questions)
    runner.run(three_texts(prompts=texts, completions=texts, answer=texts))
    assert sorted(echo.questions[before:]) == sorted(f"{text}|{text}|{text} 1" for text in texts)


def test_a_column_that_is_missing_is_named():
    reward = judge(model="m", base_url="http://localhost:1/v1", prompt="{completion} {solution}")
    with pytest.raises(ValueError, match=r"'judge' requires 'solution'.* \(columns: answer\)"):
        scorer_of(reward).check_columns(["answer"])
    scorer_of(reward).check_columns(["solution", "answer"])


def test_a_row_whose_column_is_none_is_not_judged(server):
    answers = ask(make(server, prompt="{completion} {answer}"), ["a", "b"], answer=[None, 3])
    assert answers.rewards == [None, 0.3]
    assert (answers.extras["judge_reply"], answers.metrics) == ([None, "b 3"], {"judge/failed_ratio": 0.0})
    assert server.questions == ["b 3"]
    assert ask(make(server, prompt="{completion} {answer}"), ["a"], answer=[None]).metrics == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "{prompt}"}, r"has no \{completion\}"),
        ({"prompt": '{completion} as {"score": 1}'}, "other braces doubled"),
        ({"prompt": "{completion} {"}, "other braces doubled"),
        ({"prompt": "{completion} {}"}, "other braces doubled"),
        ({"prompt": "{completion.text}"}, "other braces doubled"),
        ({"prompt": "{completion!r}"}, "other braces doubled"),
        ({"prompt": "{completion} {completions}"}, r"has \{completions\}, which is not a column of the data: use \{prompt\}"),
        ({"scale": (10, 0)}, "the lowest score and the highest"),
        ({"scale": (1, 2, 3)}, "the lowest score and the highest"),
        ({"model": ""}, "has no model"),
        ({"on_failure": "ignore"}, "none or stop, not 'ignore'"),
        ({"concurrency": 0}, "concurrency >= 1"),
        ({"retries": -1}, "retries >= 0"),
        ({"timeout": 0}, "timeout > 0"),
        ({"base_url": "localhost:8000/v1"}, "must begin with http"),
    ],
)
def test_invalid_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        judge(**{"model": "m", "base_url": "http://localhost:1/v1", **options})


# ------------------------------------------------------------------------------------------ keys


def test_the_key_comes_from_the_configured_variable(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    for options in ({"api_key_variable": "JUDGE_KEY"}, {}, {"api_key_variable": None}):
        ask(make(server, **options), ["1"])
    assert server.keys == ["Bearer secret", "Bearer other", "Bearer none"]


@pytest.mark.parametrize("url", ["http://localhost:1/v1", "http://127.0.0.1:1", "http://[::1]:1/v1", "http://10.0.0.7/v1"])
def test_a_local_endpoint_needs_no_key(url, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert judge(model="m", base_url=url).__name__ == "judge"


@pytest.mark.parametrize("url", [None, "https://api.example.com/v1", "https://8.8.8.8/v1"])
def test_any_other_endpoint_needs_one(url, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="the environment variable OPENAI_API_KEY is not set"):
        judge(model="m", base_url=url)
    assert judge(model="m", base_url=url, api_key_variable=None).__name__ == "judge"


def test_a_key_in_place_of_the_name_is_not_shown():
    with pytest.raises(ValueError, match="name of an environment variable") as raised:
        judge(model="m", api_key_variable="sk-secret")
    assert "secret" not in str(raised.value)


# ------------------------------------------------------------------------------------------ concurrent requests


def test_the_limit_on_concurrent_requests_is_reached_and_holds_across_calls(server):
    together = threading.Barrier(3)

    def answer(question):
        together.wait(timeout=20)  # breaks, and fails the request, unless three run concurrently
        time.sleep(0.05)  # a fourth would arrive now
        return question

    server.answer = answer
    reward = make(server, concurrency=3, retries=0)

    async def two_calls():
        calls = (reward(prompts=["p"] * 6, completions=["5"] * 6) for _ in range(2))
        return await asyncio.gather(*calls)

    assert asyncio.run(two_calls()) == [[0.5] * 6] * 2
    assert server.max_concurrent == 3


def test_connections_are_reused_across_calls(server):
    scorer = scorer_of(make(server, concurrency=1))
    for _ in range(3):
        scores = scorer.score(Inputs(prompts=["p"] * 2, completions=["4", "5"], completion_ids=[[1]] * 2))
        assert scores.total == [0.4, 0.5]
    assert (len(server.questions), len(server.connections)) == (6, 1)


def test_the_function_works_on_another_event_loop(server):
    reward = make(server)
    assert [ask(reward, ["4"]).rewards for _ in range(3)] == [[0.4]] * 3


def test_it_can_be_pickled_after_use(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "very secret")
    reward = make(server, scale=(0, 5))
    assert ask(reward, ["4"]).rewards == [0.8]
    data = cloudpickle.dumps(reward)
    assert b"very secret" not in data
    assert ask(cloudpickle.loads(data), ["4"]).rewards == [0.8]
    assert set(server.keys) == {"Bearer very secret"}


# ------------------------------------------------------------------------------------------ an endpoint that fails


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_failed_request_is_sent_again(server, status):
    server.answer = lambda question: question if len(server.questions) > 2 else (status, "busy")
    assert ask(make(server, retries=2), ["4"]).rewards == [0.4]
    assert server.questions == ["4"] * 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, "bad key"), "refused the key in OPENAI_API_KEY (401): .*bad key"),
        ((403, "not yours"), "refused the key in OPENAI_API_KEY (403): .*not yours"),
        ((404, "no such model"), "does not know 'm', or base_url lacks its /v1: .*no such model"),
        ((429, "slow down"), "failed in 2 tries: .*slow down.*: lower concurrency"),
        ((500, "broken"), "failed in 2 tries: .*broken"),
        ({"status": "fine"}, "not as a chat endpoint does: does base_url end in /v1"),
    ],
)
def test_a_failing_endpoint_stops_the_run_by_default(server, answer, message):
    server.answer = lambda question: answer
    with pytest.raises(JudgeError, match=message.replace("(", r"\(").replace(")", r"\)")):
        ask(make(server, retries=1), ["4"])
    answers = ask(make(server, retries=0, on_failure="none"), ["4"] * 5)
    assert (answers.rewards, answers.metrics) == ([None] * 5, {"judge/failed_ratio": 1.0})
    assert all(reply.startswith("[no score: ") for reply in answers.extras["judge_reply"])


def test_after_a_failure_the_other_rows_are_not_judged(server):
    server.answer = lambda question: (401, "bad key")
    with pytest.raises(JudgeError):
        ask(make(server, concurrency=1), ["4"] * 20)
    assert 1 <= len(server.questions) < 5


def test_an_answer_that_takes_too_long(server):
    server.answer = lambda question: "4" if server.released.wait(timeout=60 if question == "hang" else 0) else "5"
    reward = make(server, timeout=0.3, retries=0)
    with pytest.raises(JudgeError, match=r"no answer within 0\.3 s in 1 tries: raise timeout, or lower concurrency"):
        ask(reward, ["hang"])
    assert ask(make(server, timeout=1, retries=0, on_failure="none"), ["hang", "5"]).rewards == [None, 0.5]


def test_a_wrong_path_and_a_closed_port():
    with judge_server() as gone, pytest.raises(JudgeError, match="base_url lacks its /v1"):
        ask(make(gone, base_url=gone.url.removesuffix("/v1")), ["4"])
    with pytest.raises(JudgeError, match=r"cannot be reached \(1 tries\)"):
        ask(make(gone, retries=0), ["4"])


def test_the_failure_reaches_the_caller_of_a_scorer(server):
    server.answer = lambda question: (401, "bad key")
    scorer = scorer_of(make(server))
    with pytest.raises(RewardError, match=r"(?s)'judge' failed .*refused the key in OPENAI_API_KEY"):
        scorer.score(Inputs(prompts=["p"], completions=["4"], completion_ids=[[1]]))
