"""Several rewards with weights, a constant learning rate with warm-up, and a KL penalty."""

import json
import sys

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import think_format_reward

model, data = sys.argv[1:3]


def format_reward(completions, **kwargs):
    """Plain texts for TRL's reward function, which reads messages."""
    return think_format_reward([[{"content": completion}] for completion in completions])


def digits_reward(completions, **kwargs):
    return [sum(character.isdigit() for character in completion) for completion in completions]


def length_reward(completions, **kwargs):
    return [len(completion) / 8 for completion in completions]


config = GRPOConfig(
    "out",
    learning_rate=1e-5,
    lr_scheduler_type="constant_with_warmup",
    warmup_steps=1,
    beta=0.04,
    reward_weights=[0.5, 1.0, 0.25],
    per_device_train_batch_size=4,
    num_generations=4,
    max_completion_length=8,
    max_steps=3,
    logging_steps=1,
    use_vllm=False,
    bf16=False,
    use_cpu=True,
    report_to=[],
)
trainer = GRPOTrainer(
    model=model,
    reward_funcs=[format_reward, digits_reward, length_reward],
    args=config,
    train_dataset=load_dataset("json", data_files=f"{data}/train.jsonl", split="train"),
)
trainer.train()

print(json.dumps([sorted(entry) for entry in trainer.state.log_history]))
