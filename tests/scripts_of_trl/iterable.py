"""A data set without a length, from a generator."""

import json
import sys

from datasets import IterableDataset
from trl import GRPOConfig, GRPOTrainer

model, data = sys.argv[1:3]


def rows():
    with open(f"{data}/train.jsonl") as file:
        for line in file:
            yield json.loads(line)


def reward_len(completions, target, **kwargs):
    return [-abs(number - len(completion)) for completion, number in zip(completions, target, strict=True)]


trainer = GRPOTrainer(
    model=model,
    reward_funcs=reward_len,
    args=GRPOConfig(
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
    train_dataset=IterableDataset.from_generator(rows),
)
trainer.train()

print(json.dumps([sorted(entry) for entry in trainer.state.log_history]))
