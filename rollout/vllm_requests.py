"""Requests to vLLM, each with a key of the caller's.

    with VllmRequests(llm_engine, lora_request) as requests:
        requests.add(0, prompt_token_ids, params)
        while requests.has_unfinished:
            for key, output in requests.step():
                ...

Leaving the block aborts the requests that are not finished. `VllmTurns` are the requests of episodes (`turns.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, Self

from ..kernels.fp16_on_cpu import fp16_products
from .config import SamplingConfig
from .sampling_params import sampling_params, text_of
from .texts import Texts
from .turns import Request, Turn
from .types import EngineError

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest

_NAMES = count(1)
"""Names of requests, unique in the process."""


class VllmRequests:
    """See the module's docstring. `lora_request`: None samples from the base model."""

    def __init__(self, engine: Any, lora_request: LoRARequest | None) -> None:
        self._engine = engine
        self._lora_request = lora_request
        self._keys: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._keys:
            self._engine.abort_request(list(self._keys))

    @property
    def has_unfinished(self) -> bool:
        """Whether a request was added and has not ended."""
        return bool(self._keys)

    def add(self, key: int, prompt: Sequence[int], params: SamplingParams) -> None:
        """Sample from the next step on.

        Raises:
            ValueError: vLLM refuses the request.
        """
        from vllm.exceptions import VLLMError

        name = str(next(_NAMES))
        try:
            self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, params, lora_request=self._lora_request)
        except VLLMError as error:
            raise ValueError(f"vLLM refuses to sample like this: {error}") from error
        self._keys[name] = key

    def step(self) -> list[tuple[int, RequestOutput]]:
        """One step of the engine; the requests that have ended with it.

        Raises:
            EngineError: vLLM failed.
        """
        try:
            with fp16_products(self._engine.model_config.dtype):
                outputs = self._engine.step()
        except Exception as error:  # vLLM documents none; whatever it raises becomes the cause
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EngineError(f"vLLM failed while sampling: {reason}") from error
        return [(self._keys.pop(one.request_id), one) for one in outputs if one.finished]


class VllmTurns(VllmRequests):
    """Turns of episodes: `turns.Requests`."""

    def __init__(
        self,
        engine: Any,
        lora_request: LoRARequest | None,
        sampling: SamplingConfig,
        texts: Texts,
        *,
        stop_token_ids: Sequence[int],
        policy_version: int,
    ) -> None:
        super().__init__(engine, lora_request)
        self._sampling, self._texts, self._policy_version = sampling, texts, policy_version
        self._stop_token_ids = stop_token_ids
        self._prompts: dict[int, tuple[int, ...]] = {}

    def submit(self, key: int, request: Request) -> None:
        """See `turns.Requests`."""
        params = sampling_params(
            self._sampling,
            request.seed,
            stop_token_ids=self._stop_token_ids,
            max_tokens=request.max_tokens,
        )
        self._prompts[key] = request.prompt_token_ids
        self.add(key, request.prompt_token_ids, params)

    def release(self, key: int) -> None:
        """See `turns.Requests`. vLLM drops blocks by itself."""

    def step(self) -> list[tuple[int, Turn]]:  # type: ignore[override]
        """See `turns.Requests`."""
        return [(key, self._turn(output, self._prompts.pop(key))) for key, output in super().step()]

    def _turn(self, output: RequestOutput, prompt: tuple[int, ...]) -> Turn:
        if tuple(output.prompt_token_ids or ()) != prompt:
            raise EngineError("vLLM sampled from other tokens than those of the episode: please report this")
        completion: Any = output.outputs[0]
        flat = completion.logprobs
        assert tuple(flat.token_ids) == tuple(completion.token_ids), "one log-probability for each sampled token"
        return Turn(
            token_ids=tuple(completion.token_ids),
            logprobs=tuple(flat.logprobs),
            text=text_of(completion, self._texts),
            finish_reason=completion.finish_reason,
            ended_by_token=completion.finish_reason == "stop" and not isinstance(completion.stop_reason, str),
            policy_version=self._policy_version,
            cached_tokens=output.num_cached_tokens or 0,
        )
