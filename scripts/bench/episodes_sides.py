"""What `episodes.py` measures: episodes and single turns on one vLLM engine, and episodes whose turns are replayed.

    engine = CalculatorEngine()
    waits = engine.respond_episodes(Waits)
    waits.play(engine.vllm)                 # 64 episodes of three turns
    sums = engine.calculator_episodes()
    recorded = sums.play(engine.vllm)
    sums.play(Replay(recorded))             # the same turns without an engine: only the Python code of episodes
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from common import ROOT

from rankup.grpo.common.model_files import resolve_model
from rankup.grpo.common.quiet import quiet_stderr
from rankup.grpo.config import GRPOConfig, load_config
from rankup.grpo.data.prompts import Prompt, prepare_prompts
from rankup.grpo.data.sources import load_rows
from rankup.grpo.data.tokenizers import load_tokenizer
from rankup.grpo.episodes.actions import Actions
from rankup.grpo.episodes.dialogues import Dialogues
from rankup.grpo.update.resolve import engine_settings
from rankup.grpo.update.session import make_policy
from rankup.kernels.cpu_memory import keep_freed_memory
from rankup.rollout.config import SamplingConfig
from rankup.rollout.engine import RolloutEngine, request_seed
from rankup.rollout.generation_kwargs import GenerationKwargs
from rankup.rollout.protocol import Engine
from rankup.rollout.torch_engine import TorchEngine, eos_token_ids
from rankup.rollout.turns import Request, Requests, Turn

CALCULATOR = ROOT / "configs" / "calculator.yaml"
PROMPTS, COMPLETIONS = 16, 8
TURNS, TURN_TOKENS = 3, 16
"""Of an episode whose environment responds: `TURN_TOKENS` are sampled in each turn."""
WAIT_S = 1.0
OBSERVATION = "Go on, please."


class Immediate:
    """An environment that responds at once, and is done after `TURNS` turns."""

    def reset(self) -> None:
        self.turns = 0

    def respond(self, text: str) -> str:
        self.turns += 1
        return OBSERVATION

    @property
    def done(self) -> bool:
        return self.turns == TURNS


class Waits:
    """The same with `WAIT_S` seconds in which nothing is computed."""

    def reset(self) -> None:
        self.turns = 0

    async def respond(self, text: str) -> str:
        await asyncio.sleep(WAIT_S)
        self.turns += 1
        return OBSERVATION

    @property
    def done(self) -> bool:
        return self.turns == TURNS


@dataclass(slots=True)
class Recorded:
    """A rollout of episodes.

    Attributes:
        turns: of each episode.
        prompts: what each turn was sampled behind.
        seconds: of the rollout. In the engine are `step_seconds`, and `submit_seconds` to add the requests.
        steps: of the engine.
    """

    turns: dict[int, list[Turn]] = field(default_factory=dict)
    prompts: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)
    seconds: float = 0.0
    step_seconds: float = 0.0
    submit_seconds: float = 0.0
    steps: int = 0

    @property
    def num_turns(self) -> int:
        """Of all episodes."""
        return sum(map(len, self.turns.values()))

    @property
    def sampled_tokens(self) -> int:
        """Of all episodes."""
        return sum(len(turn.token_ids) for turns in self.turns.values() for turn in turns)

    def later_turns(self) -> Iterator[tuple[int, int, Turn]]:
        """Each turn but the first of an episode, behind the number of tokens that had been computed before, and of its prompt.

        The last token that was sampled has not been through the model.
        """
        for key, turns in self.turns.items():
            lengths = [len(prompt) for prompt in self.prompts[key]]
            for number, turn in enumerate(turns[1:], start=1):
                yield lengths[number - 1] + len(turns[number - 1].token_ids) - 1, lengths[number], turn


class _RecordedRequests:
    """Requests of an engine, with what they cost."""

    def __init__(self, requests: Requests, record: Recorded) -> None:
        self._requests, self._record = requests, record

    def __enter__(self) -> Self:
        self._requests.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._requests.__exit__(*error)

    @property
    def has_unfinished(self) -> bool:
        return self._requests.has_unfinished

    def submit(self, key: int, request: Request) -> None:
        started = time.perf_counter()
        self._requests.submit(key, request)
        self._record.submit_seconds += time.perf_counter() - started
        self._record.prompts.setdefault(key, []).append(request.prompt_token_ids)

    def release(self, key: int) -> None:
        self._requests.release(key)

    def step(self) -> list[tuple[int, Turn]]:
        started = time.perf_counter()
        ended = self._requests.step()
        self._record.step_seconds += time.perf_counter() - started
        self._record.steps += 1
        for key, turn in ended:
            self._record.turns.setdefault(key, []).append(turn)
        return ended


class _RecordedEngine:
    """The part of an engine that episodes use."""

    def __init__(self, engine: Any, record: Recorded) -> None:
        self._engine, self._record = engine, record
        self.policy_version: int = engine.policy_version

    def requests(self, sampling: SamplingConfig, *, stop_token_ids: Collection[int] = ()) -> _RecordedRequests:
        requests = self._engine.requests(sampling, stop_token_ids=stop_token_ids)
        return _RecordedRequests(requests, self._record)


class Replay:
    """An engine that takes no time: it returns the turns of a rollout."""

    policy_version = 0

    def __init__(self, recorded: Recorded) -> None:
        self._turns = recorded.turns
        self._next: dict[int, int] = {}
        self._ended: list[tuple[int, Turn]] = []

    def requests(self, sampling: SamplingConfig, *, stop_token_ids: Collection[int] = ()) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...

    @property
    def has_unfinished(self) -> bool:
        return bool(self._ended)

    def submit(self, key: int, request: Request) -> None:
        number = self._next.get(key, 0)
        self._next[key] = number + 1
        self._ended.append((key, self._turns[key][number]))

    def release(self, key: int) -> None: ...

    def step(self) -> list[tuple[int, Turn]]:
        ended, self._ended = self._ended, []
        return ended


class EpisodesOf:
    """Episodes of some prompts, with what a run prepares for them."""

    def __init__(
        self, config: GRPOConfig, actions: Actions, tokenizer: Any, *, ends: Collection[int], rows: Sequence[dict[str, Any]]
    ) -> None:
        self.actions = actions
        self.sampling = config.rollout
        self.dialogues = Dialogues(actions, config, tokenizer, eos_token_ids=ends)
        longest = config.rollout.max_prompt_length
        prepared = prepare_prompts(rows, tokenizer, config.data, max_prompt_length=longest, tools=actions.schemas)
        self.prompts: Sequence[Prompt] = prepared.rows
        self.seeds = [request_seed(1, 0, index) for index in range(len(self.prompts))]

    def play(self, engine: Any, *, prompts: int | None = None) -> Recorded:
        """Play the episodes of all prompts, or of the first few. Their seeds are the same each time."""
        record = Recorded()
        recorded: Any = _RecordedEngine(engine, record)
        started = time.perf_counter()
        for group in self.dialogues.play(recorded, self.prompts[:prompts], self.sampling, seeds=self.seeds[:prompts]):
            assert not any(completion.is_void for completion in group.completions), "no environment fails"
            group.release()
        record.seconds = time.perf_counter() - started
        return record


class CalculatorEngine:
    """vLLM as the calculator's run has it, with an adapter of zeros."""

    def __init__(self) -> None:
        keep_freed_memory()
        self.config = load_config(CALCULATOR, [f"optim.prompts_per_step={PROMPTS}", f"rollout.num_generations={COMPLETIONS}"])
        with quiet_stderr():
            self._model_path = resolve_model(self.config.model.name)
            self.vllm = RolloutEngine(engine_settings(self.config, self._model_path))
            self._policy = make_policy(self.config, self._model_path, self.vllm)
        self._tokenizer: Any = load_tokenizer(self.config, self._model_path)
        self._ends = eos_token_ids(self._model_path, self._tokenizer)

    def clear_prefix_cache(self) -> None:
        """By publishing, as training does before every step."""
        self.vllm.publish(self._policy.write_slots)

    def torch(self) -> Engine:
        """The engine in plain torch, with the same adapter."""
        rollout = self.config.rollout
        rows, longest = PROMPTS * COMPLETIONS, rollout.max_model_length
        return TorchEngine(self._policy, self._model_path, max_num_seqs=rows, max_model_length=longest)

    def calculator_episodes(self) -> EpisodesOf:
        """`PROMPTS` sums, `COMPLETIONS` episodes of each."""
        actions = Actions.load(self.config)
        assert actions is not None and self.config.data.train is not None
        rows = load_rows(self.config.data.train, split="train")[:PROMPTS]
        return EpisodesOf(self.config, actions, self._tokenizer, ends=self._ends, rows=rows)

    def respond_episodes(self, environment: type) -> EpisodesOf:
        """64 episodes in an environment, each of `TURNS` turns of `TURN_TOKENS` tokens.

        Before the last token of a turn nothing can end it (`min_tokens`), and then nothing but its closing token is sampled.
        """
        closing = self._tokenizer.convert_tokens_to_ids("<|im_end|>")
        kwargs = GenerationKwargs(min_tokens=TURN_TOKENS - 1, logit_bias={closing: 100.0})
        rollout = self.config.rollout.model_copy(update={"tools": [], "generation_kwargs": kwargs, "max_completion_length": 96})
        config = self.config.model_copy(update={"rollout": rollout})
        actions = Actions.load(config, environments=environment)
        assert actions is not None
        rows = [{"prompt": [{"role": "user", "content": f"What is {7 * index} + {index}?"}]} for index in range(8)]
        return EpisodesOf(config, actions, self._tokenizer, ends=self._ends, rows=rows)

    def single_turns(self, episodes: EpisodesOf, lengths: Sequence[int]) -> float:
        """Seconds of single answers to the same prompts, with the same seeds and these numbers of tokens."""
        sampling = self.config.rollout.model_copy(update={"generation_kwargs": GenerationKwargs(ignore_eos=True)})
        started = time.perf_counter()
        with self.vllm.requests(sampling) as requests:
            for key, length in enumerate(lengths):
                group, place = divmod(key, COMPLETIONS)
                prompt, seed = episodes.prompts[group].token_ids, episodes.seeds[group] + place
                requests.submit(key, Request(prompt_token_ids=prompt, max_tokens=length, seed=seed, group=group))
            sampled = 0
            while requests.has_unfinished:
                sampled += sum(len(turn.token_ids) for _, turn in requests.step())
        assert sampled == sum(lengths), "nothing ends early"
        return time.perf_counter() - started
