"""Episodes whose turns are written in the test: what `turns.play` does with them is real, only nothing is sampled.

    played = script([["<tool_call>...</tool_call><|im_end|>", "5.<|im_end|>"]], tools=[add])
    played[0].completion.episode.calls
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

from dialects import CHATML, dialect_tokenizer

from rankup.grpo.config import GRPOConfig
from rankup.grpo.data.prompts import prepare_prompts
from rankup.grpo.episodes.actions import Actions
from rankup.grpo.episodes.dialogues import Dialogues
from rankup.grpo.episodes.groups import PlayedGroup
from rankup.rollout.turns import Request, Turn

Text = str | Sequence[int]
"""A turn: a text that is encoded, or its token ids."""


class Script:
    """An engine that samples what is written: turn t of episode i is `turns[i][t]`; -0.5 is every log-probability.

    Attributes:
        requests: by episode.
    """

    policy_version = 7

    def __init__(self, tokenizer: Any, turns: Sequence[Sequence[Text]], ends: Sequence[int], stop: str | None = None) -> None:
        self._tokenizer, self._turns, self._ends, self._stop = tokenizer, turns, ends, stop
        self._waiting: list[tuple[int, Turn]] = []
        self.asked: dict[int, list[Request]] = {}
        self.released: list[int] = []

    def requests(self, sampling: Any, *, stop_token_ids: Sequence[int] = ()) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting)

    def submit(self, key: int, request: Request) -> None:
        earlier = self.asked.setdefault(key, [])
        written = self._turns[key][len(earlier)]
        earlier.append(request)
        self._waiting.append((key, self._turn(written, request)))

    def release(self, key: int) -> None:
        self.released.append(key)

    def step(self) -> list[tuple[int, Turn]]:
        """One at a time, in the order in which they were asked for."""
        return [self._waiting.pop(0)]

    def _turn(self, written: Text, request: Request) -> Turn:
        ids = self._tokenizer.encode(written, add_special_tokens=False) if isinstance(written, str) else list(written)
        cut = ids[: request.max_tokens]
        by_token = bool(cut) and cut[-1] in self._ends
        by_string = not by_token and self._stop is not None and self._tokenizer.decode(cut).endswith(self._stop)
        text = self._tokenizer.decode(cut, skip_special_tokens=True)
        return Turn(
            token_ids=tuple(cut),
            logprobs=(-0.5,) * len(cut),
            text=text.removesuffix(self._stop) if by_string and self._stop else text,
            finish_reason="stop" if by_token or by_string else "length",
            ended_by_token=by_token,
            policy_version=self.policy_version,
            cached_tokens=0,
        )


class Played:
    """The groups of a script, with what was asked of the engine."""

    def __init__(self, engine: Script, groups: Mapping[int, PlayedGroup], tokenizer: Any) -> None:
        self.engine, self.groups, self.tokenizer = engine, groups, tokenizer
        self.completions = [one for index in sorted(groups) for one in groups[index].completions]

    def text(self, index: int = 0) -> str:
        """All tokens of a completion."""
        return self.tokenizer.decode(list(self.completions[index].token_ids))

    def given(self, index: int = 0) -> list[str]:
        """The texts that were given in a completion."""
        one = self.completions[index]
        return [self.tokenizer.decode(list(one.token_ids[start:end])) for start, end in one.given]

    def results(self, index: int = 0) -> list[str]:
        episode = self.completions[index].episode
        assert episode is not None
        return [call.result for call in episode.calls]


def script(
    turns: Sequence[Sequence[Text]],
    *,
    tools: Sequence[Any] | None = None,
    environment: Any = None,
    template: str = CHATML,
    rows: Sequence[Mapping[str, Any]] | None = None,
    seeds: Sequence[int] | None = None,
    stop: str | None = None,
    tokenizer: Any = None,
    more_ends: Sequence[str] = (),
    between: Callable[[PlayedGroup], None] = lambda group: None,
    **options: Any,
) -> Played:
    """Play the episodes: those of one prompt unless there are `rows`."""
    tokenizer = tokenizer or dialect_tokenizer(template)
    rows = rows or [{"prompt": [{"role": "user", "content": "What is 2 + 3?"}]}]
    size = len(turns) // len(rows)
    defaults: dict[str, Any] = {"num_generations": max(2, size), "max_completion_length": 400, "max_prompt_length": 2000}
    config = GRPOConfig(**defaults | options)
    actions = Actions.load(config, tools=tools, environments=environment)
    assert actions is not None
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", *more_ends)]
    dialogues = Dialogues(actions, config, tokenizer, eos_token_ids=ends)
    prompts = prepare_prompts(
        rows, tokenizer, config.data, max_prompt_length=config.rollout.max_prompt_length, tools=actions.schemas
    ).rows
    engine = Script(tokenizer, turns, ends, stop)
    sampling = config.rollout.as_in_training(size)
    try:
        return Played(engine, dict(_groups(dialogues, engine, prompts, sampling, seeds, between)), tokenizer)
    finally:
        dialogues.close()


def _groups(
    dialogues: Dialogues, engine: Any, prompts: Any, sampling: Any, seeds: Any, between: Callable[[PlayedGroup], None]
) -> Iterator[tuple[int, PlayedGroup]]:
    for group in dialogues.play(engine, prompts, sampling, seeds=seeds):
        between(group)
        group.release()
        yield group.index, group


def call(name: str, **arguments: Any) -> str:
    """A call in Hermes' form."""
    import json

    return f'<tool_call>\n{json.dumps({"name": name, "arguments": arguments})}\n</tool_call>'
