"""Requests to vLLM, each with a key of the caller's.

    queue = VllmQueue(llm_engine, opened)
    with VllmRequests(queue, lora_request) as requests:
        requests.add(0, prompt_token_ids, params)
        while requests.has_unfinished:
            for key, output in requests.step():
                ...

Leaving the block aborts the requests that are not finished. Several blocks may be open at the same time, such as when a reward
function samples: a step of one advances the requests of all. `VllmTurns` are the requests of episodes (`turns.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import count
from typing import TYPE_CHECKING, Any, Self

from ..kernels.fp16_on_cpu import fp16_products
from .config import SamplingConfig
from .engine_errors import NOT_FINITE
from .sampling_params import sampling_params, text_of
from .texts import Texts
from .turns import Request, Turn
from .types import EngineError

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest

_NAMES = count(1)
"""Names of requests, unique in the process."""


class VllmQueue:
    """The requests of an engine, as several blocks share them.

    Args:
        opened: makes the context in which a block is open.
    """

    def __init__(self, engine: Any, opened: Callable[[], AbstractContextManager[None]]) -> None:
        self.opened = opened
        self._engine: Any | None = engine
        self._owners: dict[str, VllmRequests] = {}
        self._to_abort: list[str] = []
        self._is_busy = False

    def add(self, owner: VllmRequests, prompt: Sequence[int], params: SamplingParams, lora: LoRARequest | None) -> str:
        """Submit a request; returns its name. See `VllmRequests.add`."""
        from vllm.exceptions import VLLMError

        engine, name = self._live_engine(), str(next(_NAMES))
        self._is_busy = True
        try:
            engine.add_request(name, {"prompt_token_ids": list(prompt)}, params, lora_request=lora)
        except VLLMError as error:
            raise ValueError(f"vLLM refuses to sample like this: {error}") from error
        finally:
            self._is_busy = False
        self._owners[name] = owner
        return name

    def step(self) -> None:
        """One step of the engine. Requests that have ended with it are given to their owners. See `VllmRequests.step`."""
        engine = self._live_engine()
        self.abort(())
        self._is_busy = True
        try:
            with fp16_products(engine.model_config.dtype):
                outputs = engine.step()
        except Exception as error:  # vLLM documents none; whatever it raises becomes the cause
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EngineError(f"vLLM failed while sampling: {reason}") from error
        finally:
            self._is_busy = False
        for one in outputs:
            owner = self._owners.pop(one.request_id, None) if one.finished else self._owners.get(one.request_id)
            if owner is not None:
                owner.take(one)

    def abort(self, names: Iterable[str]) -> None:
        """End requests. Not within a step, at which an abandoned iterator may be collected as garbage: then before the next."""
        self._to_abort += [name for name in names if self._owners.pop(name, None) is not None]
        if self._to_abort and not self._is_busy and self._engine is not None:
            aborted, self._to_abort = self._to_abort, []
            self._engine.abort_request(aborted)

    def close(self) -> None:
        """Forget the engine, which is about to be shut down. Blocks that are still open raise EngineError when they go on."""
        self._engine = None
        self._owners.clear()

    def _live_engine(self) -> Any:
        if self._engine is None:
            raise EngineError("the engine was closed in the middle of this rollout")
        return self._engine


class VllmRequests:
    """See the module's docstring. `lora_request`: of the adapter, for requests that use it."""

    def __init__(self, queue: VllmQueue, lora_request: LoRARequest) -> None:
        self._queue = queue
        self._lora_request = lora_request
        self._keys: dict[str, int] = {}
        self._finished: list[tuple[int, RequestOutput]] = []
        self._stack = ExitStack()
        self._is_open = False

    def __enter__(self) -> Self:
        self._stack.enter_context(self._queue.opened())
        self._is_open = True
        return self

    def __exit__(self, *error: object) -> None:
        self._is_open = False
        with self._stack:
            self._queue.abort(list(self._keys))

    @property
    def has_unfinished(self) -> bool:
        """Whether a request was added and has not been returned by `step`."""
        return bool(self._keys or self._finished)

    def add(self, key: int, prompt: Sequence[int], params: SamplingParams, *, use_adapter: bool) -> None:
        """Sample from the next step on, from the policy or from the base model.

        Raises:
            EngineError: the engine was closed.
            ValueError: vLLM refuses the request.
        """
        assert self._is_open, "requests are added within the block"
        self._keys[self._queue.add(self, prompt, params, self._lora_request if use_adapter else None)] = key

    def step(self) -> list[tuple[int, RequestOutput]]:
        """One step of the engine; the requests that have ended with it, or with the steps of other blocks before.

        Raises:
            EngineError: vLLM failed, the engine was closed, or the policy's logits are not finite.
        """
        if not self._finished:
            self._queue.step()
        finished, self._finished = self._finished, []
        if any(_has_nan(completion) for _, output in finished for completion in output.outputs):
            raise EngineError(f"vLLM failed while sampling: {NOT_FINITE}")
        return finished

    def take(self, output: RequestOutput) -> None:
        """One of these requests has ended; or it streams, and has one token more."""
        if output.finished:
            self._finished.append((self._keys.pop(output.request_id), output))


def _has_nan(completion: Any) -> bool:
    """Whether a token was sampled from logits that are not finite: its log-probability is NaN then."""
    return completion.logprobs is not None and math.isnan(sum(completion.logprobs.logprobs))


class VllmTurns(VllmRequests):
    """Turns of episodes: `turns.Requests`."""

    def __init__(
        self,
        queue: VllmQueue,
        lora_request: LoRARequest,
        sampling: SamplingConfig,
        texts: Texts,
        *,
        stop_token_ids: Sequence[int],
        policy_version: int,
    ) -> None:
        super().__init__(queue, lora_request)
        self._sampling, self._texts, self._policy_version = sampling, texts, policy_version
        self._stop_token_ids = stop_token_ids
        self._prompts: dict[int, tuple[int, ...]] = {}
        self._sampled: dict[int, tuple[int, ...]] = {}

    def submit(self, key: int, request: Request) -> None:
        """See `turns.Requests`."""
        params = sampling_params(
            self._sampling,
            request.seed,
            stop_token_ids=self._stop_token_ids,
            max_tokens=request.max_tokens,
            streams=request.streams,
        )
        self._prompts[key], self._sampled[key] = request.prompt_token_ids, ()
        self.add(key, request.prompt_token_ids, params, use_adapter=request.use_adapter)

    def release(self, key: int) -> None:
        """See `turns.Requests`. vLLM drops blocks by itself."""

    def step(self) -> list[tuple[int, Turn]]:  # type: ignore[override]
        """See `turns.Requests`."""
        ended = super().step()
        for key, _ in ended:
            del self._sampled[key]
        return [(key, self._turn(output, self._prompts.pop(key))) for key, output in ended]

    def sampled(self, key: int) -> tuple[int, ...]:
        """See `turns.Requests`."""
        return self._sampled[key]

    def take(self, output: RequestOutput) -> None:
        """See `VllmRequests`."""
        if not output.finished:
            self._sampled[self._keys[output.request_id]] = tuple(output.outputs[0].token_ids)
        super().take(output)

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
            routed_experts=completion.routed_experts,
        )
