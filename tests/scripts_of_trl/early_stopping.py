"""transformers' EarlyStoppingCallback: the reward of this script never rises, so training ends after the second evaluation."""

import json
import sys

from datasets import load_dataset
from transformers import EarlyStoppingCallback
from trl import GRPOConfig, GRPOTrainer

model, data = sys.argv[1:3]
dataset = load_dataset("json", data_files={"train": f"{data}/train.jsonl", "test": f"{data}/test.jsonl"})


def constant_reward(completions, **kwargs):
    return [1.0] * len(completions)


trainer = GRPOTrainer(
    model=model,
    reward_funcs=constant_reward,
    args=GRPOConfig(
        output_dir="out",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        greater_is_better=True,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=5,
        logging_steps=1,
        use_vllm=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
    ),
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
)
result = trainer.train()

print(f"{result.global_step} updates")
print(json.dumps([sorted(entry) for entry in trainer.state.log_history]))
