"""Runs of a trainer that gets objects, as in scripts for TRL: models, adapters, tokenizers, classifiers, a `LoraConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_runs import OPTIONS, ROWS, many_low_ids, steps_of
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from rankup import GRPOConfig, GRPOTrainer


@pytest.fixture
def make(tiny_model_path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A trainer with these arguments; `options` change its configuration. Objects are saved below `tmp_path`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def trainer(model: Any = None, options: dict[str, Any] | None = None, **arguments: Any) -> GRPOTrainer:
        values: dict[str, Any] = {name: value for name, value in OPTIONS.items() if name not in ("rank", "alpha")}
        values |= {"output_dir": tmp_path / "run", **(options or {})}
        config = GRPOConfig(**values)
        defaults = {"reward_funcs": many_low_ids, "train_dataset": ROWS, "eval_dataset": ROWS[:4]}
        return GRPOTrainer(model or str(tiny_model_path("llama")), args=config, **{**defaults, **arguments})

    return trainer


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def greedy(model: Any, tokenizer: Any, prompt: str) -> str:
    """The completion of stock transformers."""
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_peft_config_gives_the_adapter(make, tmp_path: Path):
    lora = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2})
    trainer = make(peft_config=lora)
    trainer.train()
    saved: Any = peft.LoraConfig.from_pretrained(str(tmp_path / "run" / "adapter"))
    assert (saved.r, saved.lora_alpha, saved.rank_pattern) == (4, 6, {"down_proj": 2})
    assert set(saved.target_modules) == {"q_proj", "down_proj"}
    assert trainer.model.peft_config["default"].r == 4
    with pytest.raises(ValueError, match=r"lora\.rank.*at most 128"):
        make(peft_config=peft.LoraConfig(r=256))


def test_a_model_object_is_trained_with_its_weights_and_stays_as_it_is(make, tiny_model_path, tmp_path: Path):
    model = load(tiny_model_path("llama"))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1.0)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = make(model)
    text = greedy(model, trainer.processing_class, "count to 5")
    assert trainer.generate("count to 5", temperature=0) == [text]
    assert make().generate("count to 5", temperature=0) != [text], "the test needs weights that matter"
    trainer.train()
    assert trainer.generate("count to 5", temperature=0) != [text]
    assert all(before[name].equal(weight) for name, weight in model.state_dict().items())
    again = make(model)
    assert again.train(resume_from_checkpoint=True).global_step == 2, "the same object is the same run"


def test_training_continues_from_a_peft_model(make, tiny_model_path, tmp_path: Path):
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(load(tiny_model_path("llama")), lora)
    trainer = make(model, {"beta": 0.1})
    text = greedy(model, trainer.processing_class, "count to 5")
    assert trainer.generate("count to 5", temperature=0) == [text]
    trainer.train()
    first, second = steps_of(tmp_path / "run")
    assert first["kl"] == 0 < second["kl"], "the reference is the policy that training started from"
    assert trainer.model.peft_config["default"].r == 4
    with pytest.raises(ValueError, match=r"peft_config: the model is a PeftModel already"):
        make(model, peft_config=lora)


def test_a_tokenizer_with_another_template_formats_the_prompts(make, tiny_model_path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path("llama"))
    tokenizer.chat_template = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    trainer = make(processing_class=tokenizer, train_dataset=rows, eval_dataset=rows)
    assert trainer.processing_class.decode(trainer.setup.inputs.train_prompts.rows[0].token_ids) == "<count to 0>"
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_loaded_classifier_gives_the_reward(make, tiny_model_path, tmp_path: Path):
    from transformers import AutoModelForSequenceClassification

    folder = tiny_model_path("llama")
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = make(reward_funcs=[many_low_ids, classifier], reward_processing_classes=[None, tokenizer])
    trainer.train()
    name = next(key for key in steps_of(tmp_path / "run")[0] if key.endswith("/mean") and key.startswith("rewards/l"))
    assert name == f"rewards/{folder.name}/mean"
    with pytest.raises(ValueError, match=r"must be as many as reward_funcs, which are 2 \(got 1\)"):
        make(reward_funcs=[many_low_ids, classifier], reward_processing_classes=[tokenizer])


def test_a_quantization_config_is_nf4(make, tmp_path: Path):
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    trainer = make(quantization_config=four_bits)
    assert trainer.args.model.load_in == "nf4"
    assert trainer.train().global_step == 2
    with pytest.raises(ValueError, match="8"):
        make(quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_optimizers_are_refused_with_a_reason(make):
    with pytest.raises(ValueError, match=r"optimizers: are not supported.*optim.optimizer"):
        make(optimizers=(torch.optim.SGD([torch.zeros(1)], lr=1.0), None))
    assert make(optimizers=(None, None), tools=[], rollout_func=None, environment_factory=None) is not None
