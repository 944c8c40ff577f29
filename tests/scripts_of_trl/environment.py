"""An environment: each completion calls the methods of an instance of its own, which a reward function looks at."""

import json
import sys

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

model, data = sys.argv[1:3]


class Calculator:
    def __init__(self):
        self.target = None
        self.products = []

    def reset(self, **kwargs) -> str | None:
        self.target = kwargs["target"]
        self.products = []
        return None

    def multiply(self, a: int, b: int) -> int:
        """
        Multiplies two integers.

        Args:
            a: The first integer.
            b: The second integer.

        Returns:
            The product of the two integers.
        """
        if not isinstance(a, int) or not isinstance(b, int):
            raise ValueError("only integers can be multiplied")
        self.products.append(a * b)
        return a * b


def products(completions, environments, **kwargs):
    rewards = [float(len(environment.products)) for environment in environments]
    lengths = [sum(len(message["content"] or "") for message in completion) for completion in completions]
    return [reward + length / 100 for reward, length in zip(rewards, lengths, strict=True)]


dataset = load_dataset("json", data_files=f"{data}/train.jsonl", split="train")
dataset = dataset.map(lambda example: {"prompt": [{"role": "user", "content": example["prompt"]}]})
trainer = GRPOTrainer(
    model=model,
    args=GRPOConfig(
        output_dir="out",
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=128,
        max_steps=2,
        logging_steps=1,
        use_vllm=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
    ),
    train_dataset=dataset,
    reward_funcs=products,
    environment_factory=Calculator,
)
trainer.train()

print(json.dumps([sorted(entry) for entry in trainer.state.log_history]))
calls = max(entry.get("tools/call_frequency", 0.0) for entry in trainer.state.log_history)
print("called:", calls > 0)
