"""What the start of a session says; sessions themselves are in `test_trainer_between_calls.py`."""

from rankup.grpo.sessions import start_text


def test_the_start_says_what_is_slow_about_it() -> None:
    assert start_text(starts_vllm=False, compiles=True) == "loading the model"
    assert start_text(starts_vllm=True, compiles=False) == "starting vLLM and loading the model"
    assert "captures CUDA graphs, which takes minutes the first time" in start_text(starts_vllm=True, compiles=True)
