"""An environment that owns the data: `reset` returns the prompt, and `get_reward` the reward."""

import json
import random
import sys

from trl import GRPOConfig, GRPOTrainer

model = sys.argv[1]


class Counting:
    def reset(self, **kwargs) -> str:
        self.goal = random.randint(0, 99)
        self.products = []
        return f"count to {self.goal}"

    def multiply(self, a: int, b: int) -> int:
        """
        Multiplies two integers.

        Args:
            a: The first integer.
            b: The second integer.

        Returns:
            The product of the two integers.
        """
        self.products.append(a * b)
        return a * b

    def get_reward(self) -> float:
        return len(self.products) + random.random()


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
    environment_factory=Counting,
)
trainer.train()

print(json.dumps([sorted(entry) for entry in trainer.state.log_history]))
rewards = [entry["rewards/Counting/mean"] == entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
print("rewards of the environment:", rewards)
