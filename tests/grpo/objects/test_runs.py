"""Runs that were configured with objects, on the torch engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_runs import ROWS, many_low_ids, steps_of, tiny_config
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from rankup import GRPOTrainer
from rankup.grpo.common.quiet import quiet_stderr
from rankup.grpo.objects.given import from_objects
from rankup.grpo.objects.rewards import reward_functions

pytestmark = pytest.mark.runs


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Path]:
    """A function that makes a run with these arguments of TRL's trainer, and returns its folder."""

    def run(name: str, *, rewards: Any = many_low_ids, resume: bool = False, **objects: Any) -> Path:
        options = {"rank": 8, "alpha": 8} if "peft_config" in objects else {}
        changes = objects.pop("changes", {})
        given = from_objects(tiny_config(tmp_path / name, **options, **changes), **objects)
        trainer = GRPOTrainer(
            given.config.model.name, reward_functions(rewards), given.config, train_dataset=ROWS, eval_dataset=ROWS[:2]
        )
        trainer.train(resume_from_checkpoint=resume)
        return tmp_path / name

    return run


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_an_unchanged_object_trains_as_its_name_does(train, load_model: Callable[..., PreTrainedModel], tiny_model_path):
    by_name = train("name", model=str(tiny_model_path("llama")))
    by_object = train("object", model=load_model())
    assert same(adapter_of(by_name), adapter_of(by_object))


def test_a_changed_object_is_trained_and_the_run_resumed(train, load_model: Callable[..., PreTrainedModel], tiny_model_path):
    def changed() -> PreTrainedModel:
        model = load_model("qwen2")
        with torch.no_grad():
            model.get_parameter("model.norm.weight").mul_(1.5)
        return model

    run = train("run", model=changed(), changes={"save_steps": 1})
    resumed = train("run", model=changed(), changes={"save_steps": 1, "max_steps": 3}, resume=True)
    assert len(steps_of(resumed)) == 3
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert "/models/qwen2-" in config["base_model_name_or_path"]
    assert not same(adapter_of(run), adapter_of(train("original", model=load_model("qwen2"), changes={"max_steps": 3})))


def test_a_peft_config_decides_layers_and_rank(train, load_model: Callable[..., PreTrainedModel]):
    run = train("run", model=load_model(), peft_config=LoraConfig(target_modules=["q_proj"], layers_to_transform=[1]))
    (a, b) = sorted(adapter_of(run).items())
    assert a[0] == "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight" and a[1].shape == (8, 96)
    assert b[1].abs().max() > 0


def test_prompts_are_encoded_and_completions_decoded_by_the_processing_class(train, tiny_model_path, load_model):
    """A tokenizer in which every letter is another one, and which begins every prompt otherwise."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path("llama"))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    letters = [token for token in state["model"]["vocab"] if len(token) == 1 and token.isalpha() and token.isascii()]
    ids = [state["model"]["vocab"][letter] for letter in letters]
    state["model"]["vocab"] |= dict(zip(letters, ids[1:] + ids[:1], strict=True))
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    texts: dict[str, list[Any]] = {}

    def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        texts.update(completions=completions, ids=completion_ids)
        return [float(len(text)) for text in completions]

    run = train("run", model=load_model(), processing_class=tokenizer, rewards=reward)
    own = AutoTokenizer.from_pretrained(tiny_model_path("llama"))
    decoded = [tokenizer.decode(ids, skip_special_tokens=True) for ids in texts["ids"]]
    assert texts["completions"] == decoded
    assert decoded != [own.decode(ids, skip_special_tokens=True) for ids in texts["ids"]]
    other = train("other", model=load_model(), rewards=reward)
    assert not same(adapter_of(run), adapter_of(other))


def test_a_tokenizer_that_does_not_exist_is_an_error_by_the_name_of_the_option(tiny_model_path, tmp_path: Path):
    config = tiny_config(tmp_path / "run", model=str(tiny_model_path("llama")), tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match=r"model.tokenizer: no tokenizer in "):
        GRPOTrainer(reward_funcs=many_low_ids, args=config, train_dataset=ROWS)


def test_a_reward_model_scores_a_run(train, tiny_model_path):
    path = str(tiny_model_path("llama"))
    with quiet_stderr():
        classifier = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    run = train("run", model=path, rewards=[classifier])
    assert {"rewards/llama/mean"} <= steps_of(run)[0].keys() and steps_of(run)[0]["reward_std"] > 0
