"""Evaluation while training, and once more after it."""

import json
import sys

from datasets import load_dataset
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

model, data = sys.argv[1:3]
dataset = load_dataset("json", data_files={"train": f"{data}/train.jsonl", "test": f"{data}/test.jsonl"})


def reward_len(completions, **kwargs):
    return [len(completion) / 8 for completion in completions]


trainer = GRPOTrainer(
    model=model,
    reward_funcs=[reward_len],
    args=GRPOConfig(
        output_dir="out",
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        use_vllm=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
    ),
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
)
trainer.train()
metrics = trainer.evaluate()

print(f"eval_reward in the metrics: {'eval_reward' in metrics}")
print(json.dumps([sorted(entry) for entry in trainer.state.log_history]))
