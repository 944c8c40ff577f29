"""A run that is interrupted after two steps and continued from its checkpoint by another trainer."""

import json
import sys

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

model, data = sys.argv[1:3]
dataset = load_dataset("json", data_files=f"{data}/train.jsonl", split="train")


def reward_len(completions, **kwargs):
    return [-abs(20 - len(completion)) for completion in completions]


def make_trainer(max_steps):
    args = GRPOConfig(
        output_dir="out",
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=max_steps,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        logging_steps=1,
        use_vllm=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    return GRPOTrainer(model=model, reward_funcs=reward_len, args=args, train_dataset=dataset)


make_trainer(max_steps=2).train()
trainer = make_trainer(max_steps=3)
result = trainer.train(resume_from_checkpoint=True)

print(f"{result.global_step} updates, {len([e for e in trainer.state.log_history if 'reward' in e])} of them in the log")
print(json.dumps([sorted(entry) for entry in trainer.state.log_history]))
