"""Notes for the user in addition to a run's metrics: before the first step, and after a step that had problems."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from ...kernels.device import multiplies_fp16, native_dtype
from ...rollout.texts import special_tokens
from ...rollout.types import Completion
from ..algorithm.corrections import sampling_warnings
from ..config import GRPOConfig
from ..config.trl.batch import effective_step
from ..data.groups import Group
from ..data.prompts import REMARKS, PromptData
from ..data.run_inputs import RunInputs
from ..experience.episode_metrics import void_failures
from ..experience.evaluation import Evaluation
from ..experience.step_metrics import failures, has_reward, scored_shares
from ..model.start import describe_start
from ..update.ranks import describe

SHOWN_BAD_ROWS = 3


def start_notes(config: GRPOConfig, inputs: RunInputs) -> Iterator[str]:
    """Notes about the run before it starts."""
    rollout = config.rollout
    yield from config.notes
    if config.has_trl_batch:
        yield effective_step(
            prompts=config.optim.prompts_per_step,
            generations=rollout.num_generations,
            iterations=config.algorithm.num_iterations,
            max_steps=config.optim.max_steps,
        )
    yield from describe_start(config, inputs.model_path)
    yield from describe(config)
    if config.model.dtype == "bfloat16" and native_dtype() == "float32":
        yield "this CPU has no bf16 instructions and emulates them: model.dtype=float32 is many times faster here"
    if config.model.dtype == "float16" and not multiplies_fp16():
        yield f"this CPU has no fp16 instructions and emulates them: model.dtype={native_dtype()} is many times faster here"
    yield from sampling_warnings(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        repetition_penalty=rollout.repetition_penalty,
        generation_kwargs=rollout.generation_kwargs.that_change_the_distribution,
    )
    for name, prompts in (("training", inputs.train_prompts), ("evaluation", inputs.eval_prompts)):
        if prompts is not None:
            yield from data_notes(name, prompts, rollout.max_prompt_length)


def data_notes(name: str, prompts: PromptData, max_prompt_length: int) -> Iterator[str]:
    """What a user should know about the prompts of a data set; `name`: training or evaluation."""
    if prompts.dropped:
        yield f"{prompts.dropped} of {prompts.total} {name} prompts are longer than {max_prompt_length} tokens and were dropped"
    if prompts.bad_rows:
        first, more = prompts.bad_rows[:SHOWN_BAD_ROWS], len(prompts.bad_rows) - SHOWN_BAD_ROWS
        reasons = "; ".join(first) + (f"; and {more} more" if more > 0 else "")
        yield f"{len(prompts.bad_rows)} of {prompts.total} rows of the {name} data were dropped (data.on_bad_row): {reasons}"
    for remark, count in prompts.remarks.items():
        yield f"{count} of {prompts.total} {name} prompts {REMARKS[remark]}"


def step_notes(step: int, groups: Sequence[Group]) -> Iterator[str]:
    """Which reward functions failed, and which completions have no reward. `step`: updates done before it."""
    for name, reasons in failures(groups).items():
        yield f"step {step + 1}: reward function {name!r} failed on {len(reasons)} completions: {reasons[0]}"
    unscored = sum(
        reward is None
        and not group.completions[row].is_void
        and not any(errors[row] for errors in group.scores.errors.values())
        for group in groups
        for row, reward in enumerate(group.scores.total)
    )
    names = ", ".join(groups[0].scores.by_function) or "none"
    if not any(has_reward(group) for group in groups):
        yield (
            f"step {step + 1}: no completion has a reward (functions: {names}): nothing is learned, and the step says nothing "
            "about the policy"
        )
    elif unscored:
        yield f"step {step + 1}: no reward function applied to {unscored} completions ({names}): nothing is learned from them"
    silent = [name for name, share in scored_shares(groups).items() if share == 0.0 and name not in failures(groups)]
    if silent and any(has_reward(group) for group in groups):
        yield f"step {step + 1}: no reward of {', '.join(silent)}: the sum is that of the other functions"


class SamplingNotes:
    """What a user should know about the completions as soon as it shows, and once in a run: that all of them are cut off, that
    their texts lack special tokens, and why episodes are void.

        notes = SamplingNotes(config, tokenizer)
        for note in notes.about("step 1", groups): ...
    """

    def __init__(self, config: GRPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config = config
        ends = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        skips = config.rollout.skip_special_tokens
        self._skipped = {id: text for text, id in special_tokens(tokenizer).items() if id not in ends} if skips else {}
        self._has_noted_cut_off = False
        self._num_void = 0

    def about(self, what: str, groups: Sequence[Group]) -> Iterator[str]:
        """Notes about these groups' completions. `what`: where they come from."""
        yield from self._about_void_episodes(what, groups)
        completions = [completion for group in groups for completion in group.without_void().completions]
        if not self._has_noted_cut_off and completions and all(c.is_truncated for c in completions):
            self._has_noted_cut_off = True
            yield f"{what}: all {len(completions)} completions were cut off at {self._limit(completions)}"
        if self._skipped:
            yield from self._about_special_tokens(what, completions)

    def _about_void_episodes(self, what: str, groups: Sequence[Group]) -> Iterator[str]:
        """The traceback of the first one in the run; of later steps only the number."""
        failures = void_failures(groups)
        if not failures:
            return
        is_first = self._num_void == 0
        self._num_void += len(failures)
        count = sum(completion.episode is not None for group in groups for completion in group.completions)
        text = f"{what}: {len(failures)} of {count} episodes are void, since their environment failed"
        yield f"{text}: {failures[0]}" if is_first else f"{text} ({self._num_void} so far)"

    def _limit(self, completions: Sequence[Completion]) -> str:
        """The limit that most completions reached, and what can be done about it."""
        rollout = self._config.rollout
        if 2 * sum(completion.finish_reason == "turns" for completion in completions) > len(completions):
            return (
                f"rollout.max_tool_calling_iterations, which is {rollout.max_tool_calling_iterations}: reward functions see "
                "unfinished episodes; increase it, or ask for fewer calls"
            )
        limit = rollout.max_completion_length
        text = f"rollout.max_completion_length, which is {limit}: reward functions see unfinished answers"
        if self._config.algorithm.mask_truncated_completions:
            text += ", and algorithm.mask_truncated_completions excludes all of them, so nothing is learned"
        if rollout.generation_kwargs.ignore_eos:
            return f"{text}; leave out rollout.generation_kwargs.ignore_eos"
        stop = "check rollout.stop, which none of them has" if rollout.stop else "set rollout.stop to a text that ends them"
        return f"{text}; increase it, ask for shorter answers, or {stop}"

    def _about_special_tokens(self, what: str, completions: Sequence[Completion]) -> Iterator[str]:
        """A note if any special token but end and padding was sampled. The token that ended a completion belongs to no text.

        Not about episodes: the calls and messages in them are read from the tokens.
        """
        local = [c for c in completions if c.token_ids and c.episode is None]
        bodies = [c.token_ids[:-1] if c.finish_reason == "stop" else c.token_ids for c in local]
        found = [ids for body in bodies if (ids := self._skipped.keys() & set(body))]
        if found:
            tokens = ", ".join(repr(self._skipped[id]) for id in sorted(set().union(*found))[:3])
            self._skipped = {}
            yield (
                f"{what}: {len(found)} of {len(local)} completions have special tokens ({tokens}), which are left out of the "
                "text that reward functions see: rollout.skip_special_tokens=false keeps them"
            )


def evaluation_notes(evaluation: Evaluation) -> Iterator[str]:
    """Which reward functions failed on the evaluation data."""
    for name, reasons in evaluation.failures.items():
        yield f"evaluation: reward function {name!r} failed on {len(reasons)} completions: {reasons[0]}"
