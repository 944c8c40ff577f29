"""Conversational data: a system prompt, and rewards that read messages."""

import json
import sys

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import think_format_reward

model, data = sys.argv[1:3]
SYSTEM_PROMPT = "Answer with a number."


def make_conversation(example):
    return {
        "prompt": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": example["prompt"]},
        ],
    }


def correctness(prompts, completions, target, **kwargs):
    assert all(prompt[0] == {"role": "system", "content": SYSTEM_PROMPT} for prompt in prompts)
    answers = [completion[0]["content"] for completion in completions]
    return [float(str(expected) in answer) + len(answer) / 100 for answer, expected in zip(answers, target, strict=True)]


dataset = load_dataset("json", data_files=f"{data}/train.jsonl", split="train").map(make_conversation)
trainer = GRPOTrainer(
    model=model,
    reward_funcs=[think_format_reward, correctness],
    args=GRPOConfig(
        output_dir="out",
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=2,
        logging_steps=1,
        log_completions=True,
        use_vllm=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
    ),
    train_dataset=dataset,
)
trainer.train()

print(json.dumps([sorted(entry) for entry in trainer.state.log_history]))
