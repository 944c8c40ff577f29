"""A sequence classifier as the reward, as an object with its tokenizer, and the policy's tokenizer as an object too."""

import json
import sys

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

model, data = sys.argv[1:3]
reward_model = AutoModelForSequenceClassification.from_pretrained(f"{data}/classifier", num_labels=1)

trainer = GRPOTrainer(
    model=model,
    processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
    reward_funcs=reward_model,
    reward_processing_classes=AutoTokenizer.from_pretrained(f"{data}/classifier"),
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

print(json.dumps([sorted(entry) for entry in trainer.state.log_history]))
