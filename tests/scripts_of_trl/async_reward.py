"""An asynchronous reward next to a plain one: asynchronous ones run concurrently."""

import asyncio
import json
import sys

import trl
from datasets import load_dataset

model, data = sys.argv[1:3]


async def slow_reward(prompts, completions, **kwargs):
    async def score(completion):
        await asyncio.sleep(0.01)
        return float(len(set(completion)))

    return await asyncio.gather(*(score(completion) for completion in completions))


class WithFewVowels:
    """A reward may be an object."""

    __name__ = "few_vowels"

    def __call__(self, completions, **kwargs):
        return [-float(sum(character in "aeiou" for character in completion)) for completion in completions]


trainer = trl.GRPOTrainer(
    model=model,
    reward_funcs=[slow_reward, WithFewVowels()],
    args=trl.GRPOConfig(
        output_dir="out",
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=2,
        logging_steps=1,
        use_vllm=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
    ),
    train_dataset=load_dataset("json", data_files=f"{data}/train.jsonl", split="train"),
)
trainer.train()

print(json.dumps([sorted(entry) for entry in trainer.state.log_history]))
