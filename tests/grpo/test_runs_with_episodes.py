"""Complete runs of a tiny model with environments, tools and a user's rollout function."""

from __future__ import annotations

import json
import random
import shutil
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from resumed import left_behind
from safetensors.torch import load_file
from tiny_runs import ROWS, metrics_of, steps_of, tiny_config
from worlds_of_runs import TURNS, BreaksAtStep, Noisy, add

from rankup import GRPOTrainer
from rankup.grpo.cli.main import main
from rankup.grpo.common.errors import TrainingStoppedError
from rankup.grpo.episodes.stream import Stream
from rankup.grpo.run.completions import read_completions
from rankup.rewards.contract import RewardError

DIALOGUES = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
LENGTHS: dict[str, Any] = {"max_prompt_length": 128, "max_completion_length": 96, "max_turn_length": 8}
Make = Callable[..., GRPOTrainer]
OF_TRAINER = (
    *("tools", "environment_factory", "rollout_func", "reward_funcs", "callbacks"),
    *("train_dataset", "eval_dataset"),
)


@pytest.fixture
def make(tiny_model_path, tmp_path: Path) -> Make:
    """A trainer with conversations; names of `GRPOTrainer` are its arguments, all others flat names of the configuration."""
    model = shutil.copytree(tiny_model_path("llama"), tmp_path / "model")
    config_file = model / "config.json"  # tools need longer prompts than other tests
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "max_position_embeddings": 2048}))

    def made(name: str = "run", **options: Any) -> GRPOTrainer:
        of_trainer = {
            key: options.pop(key)
            for key in OF_TRAINER
            if key in options
        }
        arguments: dict[str, Any] = {"train_dataset": DIALOGUES, "eval_dataset": DIALOGUES[:4], **of_trainer}
        config = tiny_config(tmp_path / name, **LENGTHS | options)
        return GRPOTrainer(model=str(model), args=config, **arguments)

    return made


def low_ids(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [sum(token < 130 for token in ids) / max(1, len(ids)) for ids in completion_ids]


# ------------------------------------------------------------------------------------------------------- environments


LETTERS = [*string.ascii_letters, *string.digits, *" .,:-"]
ENDS = {"stop": LETTERS}
"""A random model writes one of these soon: so its turns end."""


def test_an_environment_scores_the_episodes_that_it_plays(make: Make, tmp_path: Path) -> None:
    trainer = make(environment_factory=Noisy, max_steps=3, completions_steps=1, save_steps=1, **ENDS)
    assert trainer.train().global_step == 3
    first = steps_of(tmp_path / "run")[0]
    assert first["rewards/Noisy/mean"] == first["reward"]
    assert first["episodes/failed"] == 0.0 and 1.0 <= first["episodes/mean_turns"] <= TURNS
    assert first["episodes/mean_given_tokens"] > 0 and first["tools/call_frequency"] == 0.0
    evaluation = next(row for row in metrics_of(tmp_path / "run") if "eval_reward" in row)
    assert evaluation["eval_rewards/Noisy/mean"] == evaluation["eval_reward"]
    rows = read_completions(sorted((tmp_path / "run" / "completions").iterdir())[0])
    ended = [row for row in rows if row["finish_reason"] == "done"]
    assert ended and all(len(row["episode"]["messages"]) == 2 * TURNS for row in ended)
    for row in rows:
        spans = row["episode"]["sampled_spans"]
        assert sum(end - start for start, end in spans) == row["num_tokens"]
        assert len(row["completion_ids"]) == row["num_tokens"] + row["episode"]["num_given"]
        assert spans[-1][1] == len(row["completion_ids"])  # an episode ends with what was sampled
        sampled = [place for place, logprob in enumerate(row["logprobs"]) if logprob is not None]
        assert sampled == [place for start, end in spans for place in range(start, end)]


def test_reward_functions_see_messages_and_environments(make: Make) -> None:
    seen: list[tuple[Any, int]] = []

    def watches(completions: list[Any], environments: list[Any], prompts: list[Any], **kwargs: Any) -> list[float]:
        seen.extend((messages, one.said) for messages, one in zip(completions, environments, strict=True))
        assert all(prompt[-1]["content"].endswith(")") for prompt in prompts)  # with what reset said
        return [float(one.said) for one in environments]

    make(environment_factory=Noisy, reward_funcs=watches, max_steps=1, eval_before=False, **ENDS).train()
    for messages, said in seen:
        assert [message["role"] for message in messages][:2] == ["assistant", "user"][: len(messages)]
        assert said - len(messages) // 2 in (0, 1)  # an answer for which there is no room is left out


def test_check_22_killed_and_resumed_equals_uninterrupted_with_an_environment_that_reseeds(make: Make, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "environment_factory": Noisy,
        "max_steps": 6,
        "eval_steps": 2,
        "save_steps": 2,
        "completions_steps": 2,
        **ENDS,
    }

    class Killed(Exception):  # noqa: N818
        pass

    def until(step: int) -> Any:
        from transformers.trainer_callback import TrainerCallback

        class Kills(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == step:
                    raise Killed

        return Kills()

    random.seed(1)
    make("whole", **options).train()
    random.seed(1)
    broken = make("broken", callbacks=[until(3)], **options)
    with pytest.raises(Killed):
        broken.train()
    random.seed(2)  # another process has other states
    make("broken", **options).train(resume_from_checkpoint=True)
    assert left_behind(tmp_path / "whole") == left_behind(tmp_path / "broken")


def test_void_episodes_are_left_out_and_counted_once(make: Make, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("limit.txt").write_text("9")  # three of the twelve rows have no world
    trainer = make(environment_factory=BreaksAtStep, max_steps=4, prompts_per_step=6, eval_before=False, **ENDS)
    assert trainer.train().global_step == 4
    steps = steps_of(tmp_path / "run")
    assert sum(step["episodes/failed"] for step in steps) == pytest.approx(1.0)  # 3 of 12, twice over
    assert all(step["reward"] == step["reward"] for step in steps)
    assert "no world for" in capsys.readouterr().out


def test_a_run_stops_with_a_checkpoint_if_more_than_half_of_a_step_is_void(make: Make, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("limit.txt").write_text("0")
    trainer = make(environment_factory=BreaksAtStep, max_steps=3, save_steps=1, eval_before=False, **ENDS)
    with pytest.raises(TrainingStoppedError, match=r"12 of 12 episodes are void(?s:.*)no world for"):
        trainer.train()
    assert trainer.can_resume
    Path("limit.txt").write_text("99")
    again = make(environment_factory=BreaksAtStep, max_steps=3, save_steps=1, eval_before=False, **ENDS)
    assert again.train(resume_from_checkpoint=True).global_step == 3


def test_a_run_file_names_tools_and_environments_beside_it(make: Make, tmp_path: Path, monkeypatch, capsys) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "world.py").write_text(Path(__file__).parent.parent.joinpath("support", "worlds_of_runs.py").read_text())
    (folder / "data.py").write_text(f"def rows():\n    return {DIALOGUES!r}\n")
    (folder / "run.yaml").write_text(
        f"model: {tmp_path / 'model'}\n"
        "rollout: {engine: torch, environment: world.py:Noisy, tools: world.py:add, num_generations: 4, "
        f"max_prompt_length: 900, max_completion_length: 64, max_turn_length: 8, stop: {json.dumps(LETTERS)}}}\n"
        "optim: {max_steps: 2, prompts_per_step: 2}\nlora: {rank: 8}\n"
        "data: {train: data.py:rows}\nlogging: {output_dir: runs/one, completions_steps: 1}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["train", "there/run.yaml"]) == 0
    saved = read_completions(Path("runs/one/completions/step_000001.parquet"))
    assert len(saved) == 8
    (tmp_path / "mine.py").write_text(
        "def turns(completions, **kwargs):\n    return [float(sum(m['role'] == 'assistant' for m in c)) for c in completions]\n"
    )
    capsys.readouterr()
    assert main(["reward", "mine.py:turns", "--data", "runs/one"]) == 0
    assert "turns" in capsys.readouterr().out
    (folder / "world.py").write_text((folder / "world.py").read_text() + "\n# changed\n")
    assert main(["train", "there/run.yaml", "optim.max_steps=3", "--resume"]) != 0
    assert "world.py" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- tools


def adapter(run: Path) -> dict[str, Any]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_check_21_tools_that_are_never_called_change_nothing_to_the_bit(make: Make, tmp_path: Path) -> None:
    """The run without tools gets the same prompts: they are written by the run with tools."""
    options: dict[str, Any] = {"max_steps": 3, "completions_steps": 1, "max_prompt_length": 1200, "max_turn_length": None}
    with_tools = make("with", tools=[add], reward_funcs=low_ids, **options)
    with_tools.train()
    written = [prompt.content for prompt in with_tools.setup.inputs.train_prompts.rows]
    assert written[0] == DIALOGUES[0]["prompt"]
    texts = [with_tools.processing_class.decode(list(p.token_ids)) for p in with_tools.setup.inputs.train_prompts.rows]
    system = texts[0][texts[0].index("system: ") + len("system: ") : texts[0].index("<eos>")]
    rows = [{**row, "prompt": [{"role": "system", "content": system}, *row["prompt"]]} for row in DIALOGUES]
    without = make("without", reward_funcs=low_ids, train_dataset=rows, **options)
    assert [p.token_ids for p in without.setup.inputs.train_prompts.rows] == [
        p.token_ids for p in with_tools.setup.inputs.train_prompts.rows
    ]
    without.train()
    one, other = adapter(tmp_path / "with"), adapter(tmp_path / "without")
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
    for step, plain in zip(steps_of(tmp_path / "with"), steps_of(tmp_path / "without"), strict=True):
        assert {key: step[key] for key in ("loss", "reward", "entropy", "grad_norm")} == {
            key: plain[key] for key in ("loss", "reward", "entropy", "grad_norm")
        }
        assert step["tools/call_frequency"] == 0.0 and "tools/call_frequency" not in plain
    for name in ("step_000001.parquet", "step_000003.parquet"):
        mine, plain_rows = (read_completions(tmp_path / run / "completions" / name) for run in ("with", "without"))
        assert [row["completion_ids"] for row in mine] == [row["completion_ids"] for row in plain_rows]
        assert [row["completion"] for row in mine] == [row["completion"] for row in plain_rows]


def test_generate_uses_tools_and_refuses_environments(make: Make) -> None:
    trainer = make(tools=[add], reward_funcs=low_ids, max_prompt_length=1200)
    texts = trainer.generate([[{"role": "user", "content": "2 + 3?"}]], seed=1, max_completion_length=8)
    assert len(texts) == 1
    assert texts == trainer.generate([[{"role": "user", "content": "2 + 3?"}]], seed=1, max_completion_length=8)
    with pytest.raises(ValueError, match="act in an environment"):
        make(environment_factory=Noisy).generate([[{"role": "user", "content": "?"}]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tools": [lambda x: x]}, "tool"),
        ({"tools": [add, add], "reward_funcs": low_ids}, "two tools are called 'add'"),
        ({"tools": [add]}, "no reward functions"),
        ({"environment_factory": dict}, "reset"),
        ({"environment_factory": {"one": Noisy}}, "environment"),
        (
            {"tools": [add], "reward_funcs": low_ids, "rollout_func": print, "max_prompt_length": 1200},
            "rollout_func: samples everything itself",
        ),
        ({"environment_factory": Noisy, "train_dataset": ROWS}, "messages|conversation"),
        ({"tools": [add], "reward_funcs": low_ids, "train_dataset": [{"prompt": "2 + 3?"}]}, "system_prompt"),
    ],
)
def test_mistakes_are_refused_before_the_run(make: Make, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make(**arguments).train()


# -------------------------------------------------------------------------------------------------------- rollout_func


def rows_of(trainer: GRPOTrainer, prompts: list[Any]) -> dict[str, Any]:
    sampled = trainer.generate_rollout_completions(prompts, seed=trainer.state.global_step)
    return {
        "prompt_ids": [one["prompt_ids"] for one in sampled],
        "completion_ids": [one["completion_ids"] for one in sampled],
        "logprobs": [one["logprobs"] for one in sampled],
    }


def test_check_19_a_rollout_func_gets_every_prompt_num_generations_times_and_env_mask_is_honoured(
    make: Make, tmp_path: Path
) -> None:
    got: list[list[Any]] = []
    extras: list[Any] = []

    def rollout(prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        got.append(prompts)
        rows = rows_of(trainer, prompts)
        rows["env_mask"] = [[*[1] * len(ids[:2]), 0, 0, 0, *[1] * len(ids[2:])] for ids in rows["completion_ids"]]
        rows["completion_ids"] = [[*ids[:2], 40, 41, 42, *ids[2:]] for ids in rows["completion_ids"]]
        rows["logprobs"] = [[*lps[:2], 0.0, 0.0, 0.0, *lps[2:]] for lps in rows["logprobs"]]
        rows["steps"] = list(range(len(prompts)))
        return rows

    def scores(completion_ids: list[list[int]], steps: list[int], **kwargs: Any) -> list[float]:
        extras.append(steps)
        return low_ids(completion_ids)

    trainer = make(
        rollout_func=rollout, reward_funcs=scores, max_steps=2, completions_steps=1, eval_before=False, max_completion_length=20
    )
    trainer.train()
    assert len(got[0]) == 12 and got[0][0] == got[0][3] != got[0][4]
    assert extras[0] == [0, 1, 2, 3]
    for row in read_completions(tmp_path / "run" / "completions" / "step_000001.parquet"):
        assert [40, 41, 42] in (row["completion_ids"][1:4], row["completion_ids"][2:5])
        assert row["num_tokens"] == len(row["completion_ids"]) - 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: {key: value[:-1] for key, value in rows.items()}, r"got 12 prompts .* it returned 11 rows"),
        (lambda rows: {**rows, "logprobs": None}, "must return logprobs"),
        (lambda rows: {**rows, "env_mask": [[1]] * 12}, "env_mask of row 0 has 1 values"),
        (lambda rows: {**rows, "logprobs": [[0.0]] * 12}, "logprobs of row 0 has 1 values"),
        (lambda rows: {**rows, "logprobs": [[2.0] * len(ids) for ids in rows["completion_ids"]]}, "above 0"),
        (lambda rows: {**rows, "completion_ids": [[10**6]] * 12, "logprobs": [[-1.0]] * 12}, "does not know"),
        (lambda rows: list(rows.values()), "must return a mapping"),
        (lambda rows: {**rows, "prompt_ids": [[]] * 12}, "prompt_ids of row 0 is empty"),
        (lambda rows: {**rows, "prompt_ids": [[40 + row, 50] for row in range(12)]}, "row 1 and row 0 .* begin with different"),
        (lambda rows: {**rows, "completion_ids": [[40] * 999] * 12, "logprobs": [[-1.0] * 999] * 12}, "increase them"),
    ],
)
def test_check_19_wrong_rows_of_a_rollout_func_are_refused(make: Make, change: Callable[[Any], Any], message: str) -> None:
    def rollout(prompts: list[Any], trainer: GRPOTrainer) -> Any:
        return change(rows_of(trainer, prompts))

    with pytest.raises(ValueError, match=message):
        make(rollout_func=rollout, reward_funcs=low_ids, max_steps=1, eval_before=False).train()


def test_a_rollout_func_that_samples_once_is_the_plain_run(make: Make, tmp_path: Path) -> None:
    """Log-probabilities, masks and prompts arrive as they are: the sampler's gap stays that of rounding."""

    def rollout(prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        return rows_of(trainer, prompts)

    make(rollout_func=rollout, reward_funcs=low_ids, max_steps=2, eval_before=False).train()
    for step in steps_of(tmp_path / "run"):
        assert abs(step["sampling/sampling_logp_difference/max"]) < 1e-3


# ---------------------------------------------------------------------------------------------------- around the episodes


def test_environments_are_there_again_after_a_run(make: Make) -> None:
    trainer = make(environment_factory=Noisy, max_steps=1, eval_before=False, **ENDS)
    trainer.train()
    assert trainer.evaluate()["eval_episodes/failed"] == 0.0
    assert trainer.train().global_step == 1


def test_a_reward_function_that_stops_the_run_is_what_the_run_says(make: Make) -> None:
    def fails(completions: list[Any], **kwargs: Any) -> list[float]:
        raise RuntimeError("no such file")

    trainer = make(environment_factory=Noisy, reward_funcs=fails, on_error="stop", max_steps=1, eval_before=False, **ENDS)
    with pytest.raises(RewardError, match="no such file"):
        trainer.train()


def test_completions_are_saved_with_the_prompts_that_reward_functions_got(make: Make, tmp_path: Path) -> None:
    seen: list[Any] = []

    def watches(prompts: list[Any], **kwargs: Any) -> list[float]:
        seen.extend(prompts)
        return [0.0] * len(prompts)

    options: dict[str, Any] = {"max_steps": 1, "completions_steps": 1, "eval_before": False}
    make(environment_factory=Noisy, reward_funcs=watches, eval_dataset=None, **options, **ENDS).train()
    rows = read_completions(tmp_path / "run" / "completions" / "step_000001.parquet")
    assert all(json.loads(row["prompt"]) in seen for row in rows)


def test_rule_13_a_run_with_episodes_proves_one_before_it_starts(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    give = Stream.give

    def shifted(stream: Stream, token_ids: Sequence[int]) -> None:
        give(stream, token_ids)
        start, end = stream.given.pop()
        stream.given.append((start - 1, end - 1) if start > 1 else (start, end))

    monkeypatch.setattr(Stream, "give", shifted)
    with pytest.raises(RuntimeError, match="what is stored of an episode is not what the engine computes"):
        make("episodes", tools=[add], reward_funcs=low_ids, max_steps=1, max_prompt_length=1200).train()
    assert make("plain", reward_funcs=low_ids, max_steps=1, max_prompt_length=1200).train().global_step == 1
