"""Run folders for reports, written in milliseconds by the recorder of real runs: made-up numbers and texts, no model.

    run = MadeRun(tmp_path / "run", tokenizer=folder)
    run.play(12)        # twelve steps with their completions
    run.finish()
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankup import GRPOConfig
from rankup.grpo.cli.report.runs import GUARDS
from rankup.grpo.config import dump_config
from rankup.grpo.run.records import RunRecorder

TEXT = "the sum of two numbers is what we need so first add the tens then the ones and carry if it is ten or more"
WORDS = TEXT.split()
PROMPTS = 5
"""Different prompts, which return every few steps."""


@dataclass
class MadeRun:
    """A run folder in the making.

    Attributes:
        tokenizer: its folder; None: the run names a model that does not exist.
        groups, completions: of a step.
        words: of a completion.
        text_of: the text of a completion by step, group and place, instead of words.
        is_episode: completions call a tool, and have given tokens.
        with_logprobs: False: as runs saved completions before they had log-probabilities.
    """

    folder: Path
    tokenizer: Path | None = None
    groups: int = 3
    completions: int = 4
    words: int = 12
    seed: int = 0
    rate: float = 1e-4
    text_of: Callable[[int, int, int], str] | None = None
    is_episode: bool = False
    with_logprobs: bool = True
    steps: int = 0
    guards: dict[str, float] = field(default_factory=lambda: dict.fromkeys(GUARDS, 0.0))

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        model = {"name": "no-such-folder/model" if self.tokenizer is None else str(self.tokenizer)}
        config = GRPOConfig(
            model=model if self.tokenizer is None else model | {"tokenizer": str(self.tokenizer)},  # type: ignore[arg-type]
            output_dir=self.folder,
            seed=self.seed,
            learning_rate=self.rate,
            max_steps=20,
        )
        self._encode = _encoder(self.tokenizer)
        self.recorder = RunRecorder(self.folder, config_yaml=dump_config(config))
        self.evaluate("before")

    def evaluate(self, when: Any = "during") -> None:
        """An evaluation, better the more steps are done."""
        reward = self._quality()
        metrics = {"eval_reward": reward, "eval_rewards/exact/mean": reward, "eval_completions/mean_length": 9.0}
        for name, mean in (("reward", reward), ("pass@1", reward), ("pass@4", min(1.0, 1.5 * reward)), ("maj@4", reward)):
            metrics |= {f"eval_{name}": mean, f"eval_{name}_low": 0.9 * mean, f"eval_{name}_high": min(1.0, 1.1 * mean)}
        self.recorder.evaluation(self.steps, metrics, when=when)

    def play(self, count: int = 1, **metrics: float) -> None:
        """Some steps; `metrics` replace those of the last one. Every fourth step is followed by an evaluation."""
        for place in range(count):
            self.steps += 1
            self.recorder.step(self.steps, self._metrics() | (metrics if place == count - 1 else {}))
            self._save_completions()
            if self.steps % 4 == 0:
                self.evaluate()

    def finish(self) -> None:
        """The end of the run."""
        self.evaluate("after")
        self.recorder.summary({"run_name": self.folder.name, "interrupted": False})
        self.recorder.close()

    def _quality(self) -> float:
        return min(1.0, 0.1 + 0.07 * self.steps)

    def _metrics(self) -> dict[str, float]:
        noise = self._random.uniform(-0.05, 0.05)
        return {
            "reward": min(1.0, max(0.0, self._quality() + noise)),
            "reward_std": 0.3,
            "frac_reward_zero_std": 0.25,
            "rewards/exact/mean": self._quality(),
            "rewards/format/mean": 0.9 + noise,
            "completions/mean_length": 20 + 40 * noise,
            "completions/clipped_ratio": 0.1,
            "entropy": 2.0 / self.steps,
            "sampling/kl": 1e-4,
            "sampling/sampling_logp_difference/mean": 1e-3,
            "grad_norm": 1.0 + noise,
            "learning_rate": self.rate,
            "loss": noise,
            **{f"guards/{name}": count for name, count in self.guards.items()},
            "memory/resident_mib": 900.0 + self.steps,
            "time/rollout": 3.0,
            "time/reward": 0.1,
            "time/train": 2.0 + noise,
            "tokens_per_second/rollout": 500.0,
            "tokens_per_second/train": 900.0,
            "mine/metric": float(self.steps),
        }

    def _save_completions(self) -> None:
        places = [(group, member) for group in range(self.groups) for member in range(self.completions)]
        made = [self._completion(group, member) for group, member in places]
        numbers = [(self.steps * self.groups + group) % PROMPTS for group, _ in places]
        table: dict[str, Sequence[Any]] = {
            "prompt": [[{"role": "user", "content": f"What is {number} + {number}?"}] for number in numbers],
            "completion_prefix": [""] * len(made),
            **{name: [one[name] for one in made] for name in made[0] if name != "exact"},
            "advantage": [one["reward"] - 0.5 for one in made],
            "policy_version": [self.steps] * len(made),
        }
        self.recorder.completions(
            self.steps,
            table,
            rewards={"exact": [one["exact"] for one in made], "format": [1.0] * len(made)},
            extras={"parsed": [f"value {member}" for _, member in places]},
            data={"answer": [2 * number for number in numbers]},
        )

    def _completion(self, group: int, member: int) -> dict[str, Any]:
        text = self.text_of(self.steps, group, member) if self.text_of else self._words()
        ids = self._encode(text)
        logprobs: list[float | None] = [-self._random.expovariate(2.0) for _ in ids]
        reward = float(self._random.random() < self._quality())
        one: dict[str, Any] = {
            "completion": text,
            "completion_ids": ids,
            "logprobs": logprobs,
            "reward": reward,
            "exact": reward,
            "finish_reason": "length" if member == 1 else "stop",
            "num_tokens": len(ids),
        }
        if self.is_episode:
            one |= self._episode(text, ids, logprobs)
        if not self.with_logprobs:
            del one["logprobs"]
        return one

    def _episode(self, text: str, ids: list[int], logprobs: list[float | None]) -> dict[str, Any]:
        start, end = len(ids) // 2, len(ids) // 2 + 3
        logprobs[start:end] = [None] * (end - start)
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
        return {
            "num_tokens": len(ids) - 3,
            "messages": [
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "name": "add", "content": "3"},
                {"role": "assistant", "content": text},
            ],
            "tool_calls": [{"name": "add", "arguments": {"a": 1, "b": 2}, "result": "3", "seconds": 0.1, "error": None}],
            "sampled_spans": [[0, start], [end, len(ids)]],
            "num_given": 3,
            "failure": None,
        }

    def _words(self) -> str:
        return " ".join(self._random.choice(WORDS) for _ in range(self.words))


def _encoder(tokenizer: Path | None) -> Callable[[str], list[int]]:
    """Token ids of a text; without a tokenizer its bytes."""
    if tokenizer is None:
        return lambda text: list(text.encode("utf-8", "replace"))
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return lambda text: loaded(text, add_special_tokens=False)["input_ids"]
