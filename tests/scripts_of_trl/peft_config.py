"""LoRA by PEFT's configuration, with another rank for one projection."""

import json
import sys

from datasets import load_dataset
from peft import LoraConfig
from safetensors import safe_open
from trl import GRPOConfig, GRPOTrainer

model, data = sys.argv[1:3]


def reward_len(completions, **kwargs):
    return [-abs(20 - len(completion)) for completion in completions]


trainer = GRPOTrainer(
    model=model,
    reward_funcs=reward_len,
    args=GRPOConfig(
        output_dir="out",
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
    peft_config=LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, task_type="CAUSAL_LM"
    ),
)
trainer.train()
trainer.save_model("final")

with safe_open("final/adapter_model.safetensors", framework="pt") as weights:
    shapes = {name: list(weights.get_slice(name).get_shape()) for name in sorted(weights.keys())}
print(json.dumps(shapes))
print(json.dumps([sorted(entry) for entry in trainer.state.log_history]))
