"""Runs that start from the adapter of another run, or of stock PEFT: they begin exactly where that one has ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_runs import ROWS, many_low_ids, steps_of, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankup import GRPOConfig, GRPOTrainer
from rankup.configs import quickstart
from rankup.grpo.common.model_files import resolve_model
from rankup.rewards.answers import last_integer

STARTS: dict[str, dict[str, Any]] = {
    "the same rank": {},
    "rank 64": {"rank": 64},
    "rank 128": {"rank": 128},
    "another scale": {"rank": 128, "alpha": 7, "use_rslora": True},
    "more layers": {"rank": 64, "targets": "all-linear"},
}


def train(config: GRPOConfig, *, model: str, reward: Any, rows: Sequence[Any], eval_rows: Sequence[Any]) -> tuple[float, float]:
    """The evaluations before and after a run."""
    data: dict[str, Any] = {"train_dataset": list(rows), "eval_dataset": list(eval_rows)}
    with GRPOTrainer(model=model, reward_funcs=reward, args=config, **data) as trainer:
        trainer.train()
        evaluations = trainer.summary["evaluation"]
    return evaluations["before"]["reward"], evaluations["after"]["reward"]


def first_kl(run: Path) -> float:
    """The divergence from the reference before the first update."""
    return steps_of(run)[0]["kl"]


def save_sft(model: str, folder: Path, ids: Sequence[Sequence[int]], *, steps: int, rate: float) -> None:
    """An adapter of rank 16 that stock PEFT has trained to predict these sequences, one after the other."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "up_proj"]
    peft_model: Any = get_peft_model(base, LoraConfig(r=16, lora_alpha=8, lora_dropout=0.05, target_modules=targets))
    optimizer = torch.optim.AdamW(peft_model.parameters(), lr=rate)
    for step in range(steps):
        tokens = torch.tensor([list(ids[step % len(ids)])])
        peft_model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peft_model.save_pretrained(str(folder))


def stock_completions(model: str, adapter: Path, prompts: Sequence[Sequence[int]], *, length: int) -> list[list[int]]:
    """Greedy completions by stock transformers and PEFT, one prompt at a time, with the token that ends them."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    peft_model: Any = PeftModel.from_pretrained(base, str(adapter))
    found = []
    for ids in prompts:
        prompt = torch.tensor([list(ids)])
        output = peft_model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=length, do_sample=False)
        found.append(output[0, len(ids) :].tolist())
    return found


# A tiny model

TINY: dict[str, Any] = {"reward": many_low_ids, "rows": ROWS, "eval_rows": ROWS[:6]}


@pytest.fixture(scope="module")
def first_run(tiny_model_path: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run of 20 steps at rank 16, and the reward at its end."""
    folder = tmp_path_factory.mktemp("first") / "run"
    config = tiny_config(folder, rank=16, targets="attention", max_steps=20)
    before, after = train(config, model=str(tiny_model_path("llama")), **TINY)
    assert before != after
    return folder, after


@pytest.mark.runs
@pytest.mark.parametrize("changes", STARTS.values(), ids=STARTS)
def test_a_run_begins_where_the_run_before_has_ended(
    first_run: tuple[Path, float], tiny_model_path: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder, end = first_run
    options = {"rank": 16, "targets": "attention", "beta": 0.1, "max_steps": 1, **changes}
    config = tiny_config(tmp_path / "run", start_from=str(folder / "adapter"), **options)
    before, _ = train(config, model=str(tiny_model_path("llama")), **TINY)
    assert before == end
    assert first_kl(tmp_path / "run") == 0.0


@pytest.mark.runs
@pytest.mark.parametrize("rank", [16, 64, 128])
def test_a_run_begins_as_the_adapter_of_stock_peft(tiny_model_path: Any, tmp_path: Path, rank: int) -> None:
    model = str(tiny_model_path("llama"))
    save_sft(model, tmp_path / "sft", [list(range(20, 120, 3)), list(range(200, 140, -2))], steps=10, rate=1e-2)
    config = tiny_config(tmp_path / "run", start_from=str(tmp_path / "sft"), rank=rank, alpha=20, beta=0.1, max_steps=1)
    with GRPOTrainer(model=model, reward_funcs=many_low_ids, args=config, train_dataset=ROWS, eval_dataset=ROWS) as trainer:
        prompts = [prompt.token_ids for prompt in trainer.setup.eval_prompts or ()]
        trainer.train()
        before = trainer.summary["evaluation"]["before"]["reward"]
    completions = stock_completions(model, tmp_path / "sft", prompts, length=config.rollout.max_completion_length)
    of_stock = many_low_ids(completions, completions, [0], lambda *_: None)
    assert before == pytest.approx(sum(of_stock) / len(of_stock), abs=1e-12)
    assert first_kl(tmp_path / "run") == 0.0


# The embedded model

SMOLLM: dict[str, Any] = {"reward": last_integer, "rows": quickstart.train(), "eval_rows": quickstart.evaluation()}


def smollm_config(folder: Path, engine: str, **changes: Any) -> GRPOConfig:
    options: dict[str, Any] = {
        **{"engine": engine, "dtype": "float32" if engine == "torch" else "bfloat16", "kv_cache_gib": 0.5},
        **{"num_generations": 8, "prompts_per_step": 4, "max_prompt_length": 64, "max_completion_length": 16},
        **{"scale_rewards": "batch", "learning_rate": 4e-4, "max_steps": 20, **changes},
    }
    return GRPOConfig(output_dir=folder, **options)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize(("engine", "margin"), [("torch", 0.0), ("vllm", 0.02)])
def test_a_chain_of_runs_of_the_embedded_model(tmp_path: Path, engine: str, margin: float) -> None:
    model = resolve_model("smollm2-135m-instruct")
    _, end = train(smollm_config(tmp_path / "first", engine, rank=16), model=model, **SMOLLM)
    print(f"{engine}: 20 steps at rank 16 end at {end}")
    for rank in (64, 128):
        options = {"start_from": str(tmp_path / "first" / "adapter"), "rank": rank, "beta": 0.04, "max_steps": 1}
        before, _ = train(smollm_config(tmp_path / f"{rank}", engine, **options), model=model, **SMOLLM)
        print(f"{engine}: rank {rank} begins at {before}, KL {first_kl(tmp_path / f'{rank}')}")
        assert abs(before - end) <= margin
        assert first_kl(tmp_path / f"{rank}") == 0.0


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_runs_of_the_embedded_model_from_an_adapter_of_stock_peft(tmp_path: Path, engine: str) -> None:
    model = resolve_model("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = {"add_generation_prompt": True, "tokenize": False}
    texts = [
        f"{tokenizer.apply_chat_template(row['prompt'], **template)}The answer is {row['answer']}.<|im_end|>"
        for row in quickstart.train()[::61]
    ]
    save_sft(model, tmp_path / "sft", [tokenizer(text).input_ids for text in texts], steps=24, rate=1e-3)
    begins: dict[int, float] = {}
    for rank in (16, 64, 128):
        options = {"start_from": str(tmp_path / "sft"), "rank": rank, "beta": 0.04, "max_steps": 1}
        begins[rank], _ = train(smollm_config(tmp_path / f"{rank}", engine, **options), model=model, **SMOLLM)
        assert first_kl(tmp_path / f"{rank}") == 0.0
    print(f"{engine}: runs from an adapter of rank 16 of stock PEFT begin at {begins}")
    if engine == "vllm":
        assert max(begins.values()) - min(begins.values()) <= 0.02
        return
    prompts = [tokenizer(tokenizer.apply_chat_template(row["prompt"], **template)).input_ids for row in quickstart.evaluation()]
    completions = stock_completions(model, tmp_path / "sft", prompts, length=16)
    completions = tokenizer.batch_decode(completions, skip_special_tokens=True)
    rewards = last_integer(completions, answer=[row["answer"] for row in quickstart.evaluation()])
    of_stock = sum(reward or 0.0 for reward in rewards) / len(rewards)
    assert set(begins.values()) == {of_stock}
