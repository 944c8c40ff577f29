"""A reward that compares the completion with a column of the data, and looks at the trainer's state."""

import json
import re
import sys

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

model, data = sys.argv[1:3]
dataset = load_dataset("json", data_files={"train": f"{data}/train.jsonl"})["train"]
dataset = dataset.map(lambda row: {"ground_truth": str(row["target"])}, remove_columns=["target"])
steps = set()


def reward_correct(prompts, completions, ground_truth, trainer_state, completion_ids, **kwargs):
    assert len(prompts) == len(completions) == len(ground_truth) == len(completion_ids)
    steps.add(trainer_state.global_step)
    found = [re.search(r"\d", completion) for completion in completions]
    exact = [float(match is not None and match.group() in truth) for match, truth in zip(found, ground_truth, strict=True)]
    return [score + len(set(ids)) / 100 for score, ids in zip(exact, completion_ids, strict=True)]


def reward_for_even_targets(completions, ground_truth, log_extra, log_metric, **kwargs):
    """None: the reward does not apply to this row."""
    log_extra("truth", ground_truth)
    log_metric("even_share", sum(int(truth) % 2 == 0 for truth in ground_truth) / len(ground_truth))
    return [len(text) / 10 if int(truth) % 2 == 0 else None for text, truth in zip(completions, ground_truth, strict=True)]


trainer = GRPOTrainer(
    model=model,
    reward_funcs=[reward_correct, reward_for_even_targets],
    args=GRPOConfig(
        output_dir="out",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_completion_length=8,
        max_steps=2,
        logging_steps=1,
        use_vllm=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
    ),
    train_dataset=dataset,
)
result = trainer.train()

print(f"steps seen by the reward: {sorted(steps)}; {result.global_step} updates")
print(json.dumps([sorted(entry) for entry in trainer.state.log_history]))
