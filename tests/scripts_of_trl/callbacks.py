"""A callback that counts events, and stops the training early."""

import json
import sys

from datasets import load_dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

model, data = sys.argv[1:3]


class StopAfterTwoSteps(TrainerCallback):
    def __init__(self):
        self.events = []
        self.rewards = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append("train_begin")

    def on_step_begin(self, args, state, control, **kwargs):
        self.events.append(f"step_begin {state.global_step}")

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(f"step_end {state.global_step}")
        if state.global_step == 2:
            control.should_training_stop = True
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in logs:
            self.rewards.append(logs["reward"])

    def on_train_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        self.events.append("train_end")
        assert model is not None and processing_class is not None and args.max_steps == state.max_steps == 5


def reward_len(completions, **kwargs):
    return [len(completion) / 8 for completion in completions]


callback = StopAfterTwoSteps()
trainer = GRPOTrainer(
    model=model,
    reward_funcs=reward_len,
    args=GRPOConfig(
        output_dir="out",
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=5,
        logging_steps=1,
        use_vllm=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
    ),
    train_dataset=load_dataset("json", data_files=f"{data}/train.jsonl", split="train"),
    callbacks=[callback],
)
trainer.train()

print(f"{len(callback.rewards)} rewards logged; {', '.join(callback.events)}")
print(json.dumps([sorted(entry) for entry in trainer.state.log_history]))
