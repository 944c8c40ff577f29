"""What the trainer needs of an engine. Two exist: vLLM (`engine.py`), and plain torch (`torch_engine.py`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol

from .config import SamplingConfig
from .slots import AdapterSlot
from .turns import Requests
from .types import PromptGroup


class TurnSampler(Protocol):
    """The part of an engine that episodes are played with."""

    policy_version: int

    def requests(self, sampling: SamplingConfig, *, stop_token_ids: Collection[int] = ()) -> Requests:
        """Single completions, submitted while others are sampled: turns of episodes (`turns.py`). One such block at a time.

        Args:
            stop_token_ids: tokens that end a turn, besides those of the model and of `sampling`.

        Raises:
            ValueError: the engine cannot sample like this.
        """
        ...


class Engine(TurnSampler, Protocol):
    """Samples groups of completions with the adapter that is in its slots.

    Attributes:
        slots: the adapter buffers that it samples with, by PEFT module name. The trainer multiplies with the same tensors.
        device: `cpu` or `cuda`.
        policy_version: number of publishes; 0 is the base model.
    """

    device: str

    @property
    def slots(self) -> Mapping[str, AdapterSlot]:
        """See the class's docstring."""
        ...

    def publish(self, write_slots: Callable[[], None]) -> int:
        """Sample from now on with the adapter that `write_slots` writes into the slots; returns the new policy version.

        Works in both states: a suspended engine stays suspended.

        Raises:
            RuntimeError: a rollout is in progress.
        """
        ...

    @property
    def is_suspended(self) -> bool:
        """Whether the engine is between `suspend` and `resume`."""
        ...

    def suspend(self) -> None:
        """Release the memory of the KV cache until `resume`. Whatever samples resumes by itself. Does nothing if suspended.

        Raises:
            RuntimeError: a rollout is in progress: its iterator is neither exhausted nor closed.
        """
        ...

    def resume(self) -> None:
        """Take the memory again. Does nothing if the engine is not suspended.

        Raises:
            RuntimeError: there is too little memory. The engine is still suspended.
        """
        ...

    def rollout(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        seeds: Sequence[int] | None = None,
        use_adapter: bool = True,
    ) -> Iterator[PromptGroup]:
        """Sample `sampling.num_generations` completions of each prompt (token ids); yield each group when it is finished.

        Closing the iterator ends the remaining ones.

        Args:
            seeds: one for each prompt; with them sampling is reproducible.
            use_adapter: False samples from the base model.

        Raises:
            EngineError: the engine failed.
            ValueError: it cannot sample like this.
        """
        ...

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]], *, use_adapter: bool = True) -> list[list[float]]:
        """Log-probability of every token but the first of each sequence, under the engine's policy at temperature 1."""
        ...

    def close(self) -> None:
        """Free the engine's memory. Slots become invalid."""
        ...
