"""Tools: an asynchronous function that the model may call before it answers."""

import json
import sys

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

model, data = sys.argv[1:3]
products = []


async def multiply(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The product of the two integers.
    """
    products.append(a * b)
    return a * b


def calls_and_answers(completions, **kwargs):
    rewards = []
    for completion in completions:
        roles = [message["role"] for message in completion]
        results = [message["content"] for message in completion if message["role"] == "tool"]
        said = sum(len(message["content"] or "") for message in completion if message["role"] == "assistant")
        rewards.append(float("42" in results) + (roles[-1] == "assistant") + said / 100)
    return rewards


dataset = load_dataset("json", data_files=f"{data}/train.jsonl", split="train")
dataset = dataset.map(lambda example: {"prompt": [{"role": "user", "content": example["prompt"]}]})
trainer = GRPOTrainer(
    model=model,
    reward_funcs=calls_and_answers,
    args=GRPOConfig(
        output_dir="out",
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=128,
        max_tool_calling_iterations=3,
        max_steps=2,
        logging_steps=1,
        use_vllm=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
    ),
    train_dataset=dataset,
    tools=[multiply],
)
trainer.train()

print(json.dumps([sorted(entry) for entry in trainer.state.log_history]))
calls = max(entry.get("tools/call_frequency", 0.0) for entry in trainer.state.log_history)
print("called:", 42 in products and calls > 0)
