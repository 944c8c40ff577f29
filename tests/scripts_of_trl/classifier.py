"""A sequence classifier as the reward, by the name of its folder, beside a function."""

import json
import sys

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

model, data = sys.argv[1:3]


def short(completions, **kwargs):
    return [-float(len(completion)) for completion in completions]


trainer = GRPOTrainer(
    model=model,
    reward_funcs=[f"{data}/classifier", short],
    args=GRPOConfig(
        output_dir="out",
        reward_weights=[1.0, 0.1],
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
