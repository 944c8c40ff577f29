"""How a request to vLLM is sampled, and the text of what it returns.

    params = sampling_params(config.rollout, seed=7, stop_token_ids=texts.stop_token_ids)
    check_sampling_params(args, config.rollout)         # before an engine with these arguments is built
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .config import SamplingConfig
from .generation_kwargs import GenerationKwargs, StructuredOutputs
from .texts import Texts

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import StructuredOutputsParams


def sampling_params(
    sampling: SamplingConfig,
    seed: int | None,
    *,
    stop_token_ids: Sequence[int],
    max_tokens: int | None = None,
    streams: bool = False,
) -> SamplingParams:
    """vLLM's parameters for the completions of a prompt.

    Args:
        stop_token_ids: tokens that end a completion besides those of the model.
        max_tokens: for a single one, which is a turn of an episode; None: for `sampling.num_generations`, of
            `sampling.max_completion_length`.
        streams: vLLM returns all tokens so far after every step, and not only once the request has ended.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    kwargs = sampling.generation_kwargs
    longest = sampling.max_completion_length if max_tokens is None else max_tokens
    return SamplingParams(
        n=sampling.num_generations if max_tokens is None else 1,
        max_tokens=longest,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=kwargs.presence_penalty,
        frequency_penalty=kwargs.frequency_penalty,
        min_tokens=min(kwargs.min_tokens, longest),
        bad_words=kwargs.bad_words,
        logit_bias=kwargs.logit_bias or None,
        allowed_token_ids=kwargs.allowed_token_ids,
        structured_outputs=_structured_outputs(kwargs.structured_outputs),
        stop=sampling.stop or None,
        stop_token_ids=list(stop_token_ids),
        ignore_eos=kwargs.ignore_eos,
        include_stop_str_in_output=sampling.include_stop_str_in_output,
        skip_special_tokens=sampling.skip_special_tokens,
        seed=seed,
        logprobs=0,
        flat_logprobs=True,
        output_kind=RequestOutputKind.CUMULATIVE if streams else RequestOutputKind.FINAL_ONLY,
        # Needed for stop strings only. Detokenizing token by token takes 5 % of a rollout.
        detokenize=bool(sampling.stop),
    )


def _structured_outputs(wanted: StructuredOutputs | None) -> StructuredOutputsParams | None:
    from vllm.sampling_params import StructuredOutputsParams

    if wanted is None:
        return None
    return StructuredOutputsParams(
        json=wanted.json_schema,
        regex=wanted.regex,
        choice=wanted.choice,
        grammar=wanted.grammar,
        json_object=wanted.json_object,
        structural_tag=wanted.structural_tag,
    )


def check_sampling_params(args: EngineArgs, sampling: SamplingConfig) -> None:
    """Whether an engine with these arguments takes such requests: it would refuse them only once it has started.

    Raises:
        ValueError: it does not, such as a grammar that cannot be compiled, or a token id outside of the vocabulary.
    """
    if sampling.generation_kwargs == GenerationKwargs():
        return
    from vllm.exceptions import VLLMValidationError
    from vllm.tokenizers import cached_tokenizer_from_config

    params = sampling_params(sampling, None, stop_token_ids=sampling.generation_kwargs.stop_token_ids)
    config = args.create_engine_config()
    tokenizer = cached_tokenizer_from_config(config.model_config)
    assert tokenizer is not None, "an engine has one unless skip_tokenizer_init is set"
    try:
        params.update_from_tokenizer(tokenizer)
        params.verify(config.model_config, None, config.structured_outputs_config, tokenizer)
    except (VLLMValidationError, ValueError) as error:
        raise ValueError(f"rollout.generation_kwargs: {str(error).strip()}") from error


def text_of(output: Any, texts: Texts) -> str:
    """The text of a completion that vLLM returned."""
    if output.finish_reason != "stop":
        return texts.decode(output.token_ids)
    if not isinstance(output.stop_reason, str):
        return texts.ended_by_token(output.token_ids)
    # vLLM's text ends there too. But it continues the text of the prompt token by token, so it can differ at its start: by a
    # space that tokenizers of some models drop there, or by a character whose first bytes are the prompt's.
    text = texts.ended_by_string(output.token_ids, output.stop_reason)
    return output.text if text is None else text
