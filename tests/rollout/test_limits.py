"""What cannot be sampled is refused before an engine starts, with the limits of the installed vLLM."""

from __future__ import annotations

from typing import Any

import pytest

from rankup.grpo.config import GRPOConfig
from rankup.rollout.config import MAX_COMPLETIONS, RolloutConfig, SamplingConfig
from rankup.rollout.generation_kwargs import (
    DECIDED_HERE,
    IGNORED_BY_VLLM,
    OPTIONS,
    UNSUPPORTED,
    GenerationKwargs,
    StructuredOutputs,
)
from rankup.rollout.limits import TORCH_MIN_TEMPERATURE, VLLM_TEMPERATURES, check_engine_limits


def error_of(**options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        GRPOConfig(**options)
    return str(caught.value)


@pytest.mark.parametrize("temperature", [2.5, 2.0000001, 0.005, 0.0099999, 1e-6, 1e300])
def test_a_temperature_that_vllm_does_not_sample_at_is_refused(temperature: float) -> None:
    assert error_of(temperature=temperature).startswith("rollout.temperature: must be 0.01 to 2 with vLLM")
    assert "(got 2)" not in error_of(temperature=temperature)
    assert error_of(generation_kwargs={"temperature": temperature}).startswith("rollout.temperature: must be 0.01 to 2")


@pytest.mark.parametrize("temperature", [0.01, 0.7, 2.0])
def test_the_ends_of_the_range_are_allowed(temperature: float) -> None:
    assert GRPOConfig(temperature=temperature).rollout.temperature == temperature


@pytest.mark.parametrize("temperature", [0.001, 0.005, 2.5, 1e300])
def test_the_torch_engine_samples_at_other_temperatures(temperature: float) -> None:
    assert GRPOConfig(temperature=temperature, engine="torch").rollout.temperature == temperature


def test_rounding_would_decide_at_a_lower_temperature() -> None:
    message = error_of(temperature=TORCH_MIN_TEMPERATURE * 0.99, engine="torch")
    assert message.startswith("rollout.temperature: must be at least 0.001 (got 0.00099)")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"stop": ["a", ""]}, "rollout.stop.1: must not be empty (got '')"),
        ({"num_generations": MAX_COMPLETIONS + 1}, "rollout.num_generations: must be at most 16384 (got 16385)"),
        ({"num_generations_eval": MAX_COMPLETIONS + 1}, "data.eval_samples: must be at most 16384 (got 16385)"),
        ({"top_p": 0.0}, "rollout.top_p: must be above 0"),
        ({"repetition_penalty": 0.0}, "rollout.repetition_penalty: must be above 0"),
        (
            {"generation_kwargs": {"min_tokens": 9}, "max_completion_length": 8},
            "rollout.generation_kwargs.min_tokens: must be at most max_completion_length, which is 8 (got 9)",
        ),
        ({"generation_kwargs": {"presence_penalty": 2.5}}, "rollout.generation_kwargs.presence_penalty: must be at most 2"),
        ({"generation_kwargs": {"frequency_penalty": -3}}, "rollout.generation_kwargs.frequency_penalty: must be at least -2"),
        ({"generation_kwargs": {"bad_words": [""]}}, "rollout.generation_kwargs.bad_words.0: must not be empty"),
        ({"generation_kwargs": {"logit_bias": {-1: 2.0}}}, "rollout.generation_kwargs.logit_bias.-1"),
        ({"generation_kwargs": {"logit_bias": {3: 101}}}, "rollout.generation_kwargs.logit_bias.3: must be at most 100"),
        (
            {"generation_kwargs": {"structured_outputs": {"regex": "a"}, "min_tokens": 2, "ignore_eos": True}},
            "rollout.generation_kwargs: structured_outputs does not go with min_tokens and ignore_eos: let the expression or ",
        ),
        (
            {"generation_kwargs": {"allowed_token_ids": []}},
            "rollout.generation_kwargs.allowed_token_ids: must have 1 or more items (got [])",
        ),
        (
            {"generation_kwargs": {"structured_outputs": "a+"}},
            "rollout.generation_kwargs.structured_outputs: must be a mapping (got 'a+')",
        ),
        (
            {"generation_kwargs": {"structured_outputs": {"json": True}}},
            "rollout.generation_kwargs.structured_outputs.json: must be a JSON schema, as a mapping or as text (got True)",
        ),
        ({"generation_kwargs": {"min_tokns": 3}}, "rollout.generation_kwargs: min_tokns is unknown; did you mean min_tokens?"),
        (
            {"generation_kwargs": {"max_new_token": 3}},
            "rollout.generation_kwargs: max_new_token is unknown; did you mean rollout.max_completion_length?",
        ),
        (
            {"generation_kwargs": {"n": 3}},
            "rollout.generation_kwargs: n is an option of its own: set rollout.num_generations",
        ),
        ({"generation_kwargs": {"seed": 3}}, "rollout.generation_kwargs: seed is an option of its own: set seed"),
        ({"generation_kwargs": {"logprobs": 3}}, "rollout.generation_kwargs: logprobs cannot be set"),
        (
            {"generation_kwargs": {"repetition_detection": {}}},
            "rollout.generation_kwargs: repetition_detection is not supported: ",
        ),
        (
            {"generation_kwargs": {"structured_outputs": {"regex": "a", "choice": ["b"]}}},
            "rollout.generation_kwargs.structured_outputs: needs exactly one of json, regex, choice, grammar, json_object, "
            "structural_tag (got regex and choice)",
        ),
        (
            {"generation_kwargs": {"structured_outputs": {"regx": "a"}}},
            "rollout.generation_kwargs.structured_outputs: regx is unknown; did you mean regex?",
        ),
        (
            {"generation_kwargs": {"structured_outputs": {"json": {}, "disable_any_whitespace": True}}},
            "rollout.generation_kwargs.structured_outputs: disable_any_whitespace has no effect on a request in vLLM: leave it",
        ),
    ],
)
def test_the_error_names_the_option(options: dict[str, Any], error: str) -> None:
    assert error_of(**options).startswith(error)


def test_the_torch_engine_names_everything_that_it_has_not() -> None:
    kwargs = {"min_tokens": 2, "bad_words": ["x"], "stop_token_ids": [5], "ignore_eos": True}
    assert error_of(engine="torch", repetition_penalty=1.2, generation_kwargs=kwargs) == (
        "rollout.engine: torch has no repetition_penalty and no generation_kwargs.min_tokens and no "
        "generation_kwargs.bad_words: leave it out, or use vllm"
    )
    GRPOConfig(engine="torch", generation_kwargs={"stop_token_ids": [5], "ignore_eos": True})


def test_evaluation_keeps_what_changes_the_likelihoods_and_not_what_truncates_them() -> None:
    kwargs = GenerationKwargs(min_tokens=2, stop_token_ids=[7])
    rollout = RolloutConfig(
        repetition_penalty=1.5, top_p=0.5, top_k=3, min_p=0.1, skip_special_tokens=False, include_stop_str_in_output=True,
        generation_kwargs=kwargs, stop=["x"],
    )  # fmt: skip
    expected = SamplingConfig(
        num_generations=1, temperature=0.0, repetition_penalty=1.5, skip_special_tokens=False, include_stop_str_in_output=True,
        generation_kwargs=kwargs, stop=["x"],
    )  # fmt: skip
    assert rollout.greedy() == expected


def test_a_section_of_python_and_an_object_of_a_script_are_the_same_as_mappings() -> None:
    mapping = GRPOConfig(generation_kwargs={"structured_outputs": {"json": {"type": "object"}}}).rollout
    section = GRPOConfig(generation_kwargs=GenerationKwargs(structured_outputs=StructuredOutputs(json={"type": "object"})))
    assert section.rollout == mapping
    assert RolloutConfig.model_validate(mapping.model_dump()) == mapping
    assert RolloutConfig.model_validate_json(mapping.model_dump_json()) == mapping


# ---------------------------------------------------------------------------------------------------------------- vLLM


@pytest.mark.slow
def test_every_argument_of_vllm_is_known() -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    of_vllm = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    assert of_vllm == {*OPTIONS, *DECIDED_HERE, *UNSUPPORTED, *GenerationKwargs.model_fields}
    fields = [field.alias or name for name, field in StructuredOutputs.model_fields.items()]
    outputs = {name for name in StructuredOutputsParams.__dataclass_fields__ if not name.startswith("_")}
    assert outputs == {*fields, *IGNORED_BY_VLLM}
    kwargs = GenerationKwargs.model_validate({"structured_outputs": StructuredOutputsParams(regex="a+")})
    assert kwargs.structured_outputs == StructuredOutputs(regex="a+")


def is_taken_as_it_is(**arguments: Any) -> bool:
    """Whether vLLM's parameters have these values, and neither refuse nor change them."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMError

    try:
        params = SamplingParams(**{"seed": 1, **arguments})
    except VLLMError:
        return False
    return all(getattr(params, name) == value for name, value in arguments.items())


@pytest.mark.slow
def test_the_limits_are_those_of_vllm() -> None:
    lowest, highest = VLLM_TEMPERATURES
    assert all(is_taken_as_it_is(temperature=value) for value in (0.0, lowest, highest))
    assert not any(is_taken_as_it_is(temperature=value) for value in (lowest * 0.999, highest * 1.001))
    assert is_taken_as_it_is(n=MAX_COMPLETIONS) and not is_taken_as_it_is(n=MAX_COMPLETIONS + 1)
    for name, least, most in (("presence_penalty", -2, 2), ("frequency_penalty", -2, 2), ("min_p", 0, 1)):
        assert is_taken_as_it_is(**{name: least}) and is_taken_as_it_is(**{name: most})
        assert not is_taken_as_it_is(**{name: least - 1e-6}) and not is_taken_as_it_is(**{name: most + 1e-6})
    assert is_taken_as_it_is(top_p=1e-9) and not is_taken_as_it_is(top_p=0.0) and not is_taken_as_it_is(top_p=1.001)
    assert is_taken_as_it_is(top_k=-1) and is_taken_as_it_is(top_k=1) and not is_taken_as_it_is(top_k=-2)
    assert is_taken_as_it_is(repetition_penalty=1e-6) and not is_taken_as_it_is(repetition_penalty=0.0)
    assert is_taken_as_it_is(max_tokens=1) and not is_taken_as_it_is(max_tokens=0)
    assert is_taken_as_it_is(min_tokens=8, max_tokens=8) and not is_taken_as_it_is(min_tokens=9, max_tokens=8)
    assert not is_taken_as_it_is(stop=[""]) and not is_taken_as_it_is(bad_words=[""])


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.01, 0.1, 1.0, 2.0])
def test_what_passes_the_check_reaches_vllm_unchanged(temperature: float) -> None:
    from rankup.rollout.sampling_params import sampling_params

    sampling = SamplingConfig(
        num_generations=1, temperature=temperature, stop=["a"], repetition_penalty=1.1, max_completion_length=9,
        generation_kwargs=GenerationKwargs(
            presence_penalty=-2, frequency_penalty=2, min_tokens=9, bad_words=["b"], logit_bias={5: -100},
            allowed_token_ids=[5, 6], ignore_eos=True,
        ),
    )  # fmt: skip
    check_engine_limits(sampling, "vllm")
    params = sampling_params(sampling, 3, stop_token_ids=[8])
    assert (params.temperature, params.repetition_penalty, params.max_tokens) == (temperature, 1.1, 9)
    assert (params.presence_penalty, params.frequency_penalty, params.min_tokens) == (-2, 2, 9)
    assert (params.bad_words, params.logit_bias, params.allowed_token_ids) == (["b"], {5: -100}, [5, 6])
    assert (params.stop, params.stop_token_ids, params.ignore_eos, params.seed) == (["a"], [8], True, 3)
