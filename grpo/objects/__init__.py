"""Objects that TRL's `GRPOTrainer` takes (models, tokenizers, PEFT and quantization configs) as options; see `given.py`."""
