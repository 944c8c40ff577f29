"""Training continues with an adapter that exists, as a PeftModel."""

import json
import os
import sys

from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

model, data = sys.argv[1:3]
base = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
policy = PeftModel.from_pretrained(base, f"{data}/adapter", is_trainable=True)


def reward_len(completions, **kwargs):
    return [-abs(20 - len(completion)) for completion in completions]


trainer = GRPOTrainer(
    model=policy,
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
)
trainer.train()
trainer.save_model("final")

print(json.dumps(sorted(os.listdir("final"))))
print(json.dumps([sorted(entry) for entry in trainer.state.log_history]))
