"""The quick start: a reward for completions of about 20 characters."""

import json
import os
import sys

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

model, data = sys.argv[1:3]
dataset = load_dataset("json", data_files=f"{data}/train.jsonl", split="train")


def reward_len(completions, **kwargs):
    return [-abs(20 - len(completion)) for completion in completions]


training_args = GRPOConfig(
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
)
trainer = GRPOTrainer(
    model=model,
    reward_funcs=reward_len,
    args=training_args,
    train_dataset=dataset,
)
trainer.train()
trainer.save_model("final")

print(json.dumps([sorted(entry) for entry in trainer.state.log_history]))
print(json.dumps(sorted(os.listdir("final"))))
