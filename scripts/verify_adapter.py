#!/usr/bin/env python
"""Evaluate the saved adapter of a run with stock PEFT on stock transformers and with a stock vLLM engine.

    .venv/bin/python scripts/verify_adapter.py runs/quickstart [--json FILE]

rankup only provides the prompts and the reward. Prints three mean rewards: the one that the run recorded, PEFT's and vLLM's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rankup.grpo.config import GRPOConfig, load_config
from rankup.grpo.data.prompts import Prompt
from rankup.grpo.data.run_inputs import load_run_inputs
from rankup.rewards import Inputs, Scorer

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    options = parser.parse_args()
    config = load_config(options.run / "config.yaml")
    inputs = load_run_inputs(config)
    assert inputs.eval_prompts is not None, "the run has no evaluation data"
    rows, adapter = inputs.eval_prompts.rows, options.run / "adapter"
    result = {
        "run": options.run.name,
        "rankup": json.loads((options.run / "summary.json").read_text())["evaluation"]["after"]["reward"],
        "stock_peft": score(config, rows, stock_peft(config, inputs.model_path, adapter, rows)),
        "stock_vllm": score(config, rows, stock_vllm(config, inputs.model_path, adapter, rows)),
    }
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def score(config: GRPOConfig, rows: Sequence[Prompt], texts: Sequence[str]) -> float:
    """Mean reward of one completion per row."""
    scores = Scorer(config.rewards).score(
        Inputs(
            prompts=[row.content for row in rows],
            completions=[[{"role": "assistant", "content": text}] for text in texts],
            completion_ids=[[] for _ in texts],
            columns={name: [row.columns[name] for row in rows] for name in rows[0].columns},
        )
    )
    rewards = [reward for reward in scores.total if reward is not None]
    return sum(rewards) / len(rewards)


def stock_peft(config: GRPOConfig, model_path: str, adapter: Path, rows: Sequence[Prompt]) -> list[str]:
    """Greedy completions by transformers' `generate`, with the adapter loaded by PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoTokenizer

    from rankup.rollout.model_classes import auto_class

    tokenizer = AutoTokenizer.from_pretrained(model_path, padding_side="left")
    loader = auto_class(AutoConfig.from_pretrained(model_path))
    base = loader.from_pretrained(model_path, dtype=getattr(torch, config.model.dtype))
    model = PeftModel.from_pretrained(base, str(adapter))
    texts: list[str] = []
    for start in range(0, len(rows), BATCH):
        ids = [list(row.token_ids) for row in rows[start : start + BATCH]]
        batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        output = model.generate(**batch, max_new_tokens=config.rollout.max_completion_length, do_sample=False)
        texts += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def stock_vllm(config: GRPOConfig, model_path: str, adapter: Path, rows: Sequence[Prompt]) -> list[str]:
    """Greedy completions by vLLM's `LLM`, with the adapter as a `LoRARequest`."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        model_path,
        dtype=config.model.dtype,  # type: ignore[arg-type]
        enable_lora=True,
        max_lora_rank=config.lora.max_rank,
        max_model_len=config.rollout.max_model_length,
        kv_cache_memory_bytes=2**30,  # by default vLLM would take most of the memory
    )
    outputs = llm.generate(
        [{"prompt_token_ids": list(row.token_ids)} for row in rows],
        SamplingParams(temperature=0.0, max_tokens=config.rollout.max_completion_length),
        lora_request=LoRARequest("adapter", 1, str(adapter.resolve())),
        use_tqdm=False,
    )
    return [output.outputs[0].text for output in outputs]


if __name__ == "__main__":
    main()
