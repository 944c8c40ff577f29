"""A chat without a terminal: an engine, the adapters that it can sample with, and the conversation of each side.

    with open_chat(find_target("runs/quickstart", [], context=None)) as session:
        exchange = session.ask("What is 12 + 30?")
        exchange.answers["base"].text, exchange.answers["trained"].text
        session.select("best")

The base model and the trained policy answer from one engine, in the same steps. Each side has a conversation of its own, with
the answers that it gave itself: behind the words of the other one, an answer would be that of neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from ....rollout.engine import request_seed
from ....rollout.protocol import Engine
from ....rollout.texts import Texts
from ...data.messages import Message
from ...episodes.dialogues import Dialogues
from ...update.device import prepared_device
from ...update.session import sampling_engine
from .adapters import BASE, StoredAdapter
from .answers import Answer, played_answers, sampled_answers
from .prompting import Prompter, make_dialogues
from .settings import Settings, sampling_of
from .target import Target
from .watching import Tokens, WatchedSampler

Side = Literal["base", "trained"]
SIDES: tuple[Side, ...] = ("base", "trained")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A user's message and its answers. `checkpoint`: the label of the trained side."""

    message: str
    answers: Mapping[Side, Answer]
    checkpoint: str
    settings: Settings


@dataclass(frozen=True, slots=True)
class Progress:
    """Answers that are being sampled."""

    sides: tuple[Side, ...]
    turns: Mapping[int, Sequence[Tokens]]
    decode: Callable[[Tokens], str]

    def text(self, side: Side) -> str:
        """The turns of a side so far."""
        turns = self.turns.get(self.sides.index(side), ()) if side in self.sides else ()
        return "\n\n".join(self.decode(turn).rstrip("\ufffd") for turn in turns)  # the first bytes of a character


Watch = Callable[[Progress], None]
"""Called after every step of the engine. It may raise, which ends the answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """The checkpoint that was selected, and the seconds that reading it and publishing it took. None: it was in memory."""

    label: str
    read_seconds: float | None
    publish_seconds: float


class ChatSession:
    """See the module's docstring.

    Attributes:
        shown: the sides that answer.
        settings: of the next answers.
        system: the system prompt.
        exchanges: all since the start, or the last `reset`.
    """

    def __init__(self, target: Target, engine: Engine, dialogues: Dialogues | None) -> None:
        self.target = target
        self._engine = engine
        self._dialogues = dialogues
        self._prompter = Prompter(target, dialogues)
        self._selected: StoredAdapter | None = None
        config = target.config
        self.settings = Settings(
            temperature=config.rollout.temperature, top_p=config.rollout.top_p, max_tokens=target.max_tokens
        )
        self.system = config.data.system_prompt
        self.shown: tuple[Side, ...] = SIDES if target.adapters is not None else ("base",)
        self.exchanges: list[Exchange] = []

    # ------------------------------------------------------------------------------------------------------ settings

    @property
    def checkpoint(self) -> str:
        """The label of the trained side's adapter: `final`, `step 20`, or `base` for none."""
        return BASE if self._selected is None else self._selected.label

    @property
    def context(self) -> int:
        """Tokens that the engine has room for, of conversation and answer."""
        return self.target.config.rollout.max_model_length

    @property
    def tools(self) -> list[str]:
        """Names of the tools that both sides may call."""
        return [] if self._dialogues is None else [tool.name for tool in self._dialogues.actions.tools]

    def select(self, name: str) -> Switch:
        """Let the trained side answer with this checkpoint from now on. Conversations stay.

        Raises:
            ValueError: there is no such checkpoint, or it is damaged; the selected one stays.
        """
        if self.target.adapters is None:
            raise ValueError(f"{self.target.name} is a model without an adapter: there is nothing to switch to")
        started = time.perf_counter()
        if name == BASE:
            self._selected = None
            return Switch(label=BASE, read_seconds=None, publish_seconds=0.0)
        found = self.target.adapters.find(name)
        was_read = self.target.adapters.is_read(found)
        weights = self.target.adapters.read(found, self._engine.slots)
        read = time.perf_counter()
        self._engine.publish(lambda: weights.write(self._engine.slots))
        self._selected = found
        return Switch(
            label=found.label,
            read_seconds=None if was_read else read - started,
            publish_seconds=time.perf_counter() - read,
        )

    def change(self, **values: float | None) -> None:
        """Change settings by name.

        Raises:
            ValueError: the engine cannot sample like this; nothing changes then.
        """
        changed = replace(self.settings, **values)  # type: ignore[arg-type]
        if changed.max_tokens >= self.context:
            raise ValueError(f"max: must be less than {self.context}, what the engine has room for (--context)")
        sampling_of(changed, self.target.config.rollout)
        self.settings = changed

    def set_system(self, text: str | None) -> None:
        """Set the system prompt, and start a new conversation.

        Raises:
            ValueError: prompts are plain text.
        """
        if self.target.text_reason is not None:
            raise ValueError(f"a system prompt needs a conversation, and {self.target.text_reason}")
        self._prompter.check_system(text)
        self.system = text
        self.reset()

    def reset(self) -> None:
        """Start a new conversation."""
        self.exchanges.clear()

    # ------------------------------------------------------------------------------------------------------- answers

    def history(self, side: Side) -> list[Message]:
        """The conversation of a side."""
        messages: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        for exchange in self.exchanges:
            if side in exchange.answers:
                messages += [{"role": "user", "content": exchange.message}, *exchange.answers[side].messages]
        return messages

    def ask(self, message: str, watch: Watch | None = None) -> Exchange:
        """The answers of all sides that are shown. What `watch` raises leaves the conversations as they were.

        Raises:
            ValueError: the conversation of a side leaves no room for an answer, or the chat template refuses it.
            EngineError: the engine failed.
        """
        sides, settings = self.shown, self.settings
        prompts = [self._prompter.prompt(self.history(side), message, of=side) for side in sides]
        sampling = sampling_of(settings, self.target.config.rollout)
        decode = Texts(self.target.tokenizer, sampling).decode
        show = watch or (lambda progress: None)
        sampler = WatchedSampler(self._engine, lambda turns: show(Progress(sides, turns, decode)))
        seed = None
        if settings.seed is not None and settings.temperature > 0:
            seed = request_seed(settings.seed, 0, len(self.exchanges))  # both sides draw the same numbers
        uses_adapter = [side == "trained" and self._selected is not None for side in sides]
        if self._dialogues is None:
            answers = sampled_answers(sampler, prompts, sampling, seed, uses_adapter, context=self.context)
        else:
            answers = played_answers(self._dialogues, sampler, prompts, sampling, seed, uses_adapter)
        exchange = Exchange(
            message=message,
            answers=dict(zip(sides, answers, strict=True)),
            checkpoint=self.checkpoint,
            settings=settings,
        )
        self.exchanges.append(exchange)
        return exchange


@contextmanager
def open_chat(target: Target) -> Iterator[ChatSession]:
    """Start the engine and select the first adapter; the engine is closed at the end.

    Raises:
        ValueError: see `sampling_engine` and `ChatSession.select`; or the chat template cannot write the tools.
    """
    dialogues = make_dialogues(target)
    with prepared_device(target.config), sampling_engine(target.config, target.model_path) as engine:
        session = ChatSession(target, engine, dialogues)
        try:
            if target.adapters is not None:
                session.select(target.first)
            yield session
        finally:
            if dialogues is not None:
                dialogues.close()
