"""The arguments of TRL's `GRPOTrainer` and what each may be here: a table of docs/trl.md.

    TRAINER_ARGUMENTS["peft_config"]        # "a `peft.LoraConfig`, see below"

A test holds it complete against the installed TRL.
"""

from __future__ import annotations

TRAINER_ARGUMENTS: dict[str, str] = {
    "model": "a name, folder or Hub id; a `transformers.PreTrainedModel`; a `peft.PeftModel`, to train its adapter on",
    "reward_funcs": "functions, `file.py:name`, names of rewards, Hub ids or objects of sequence classifiers with one label",
    "args": "`GRPOConfig`",
    "train_dataset": "a `Dataset`, rows, or a source as in `data.train`",
    "eval_dataset": "the same",
    "processing_class": "a tokenizer, or a processor, of which only the tokenizer is used",
    "reward_processing_classes": "tokenizers of the classifiers in `reward_funcs`: one, or a list of the same length",
    "callbacks": "`transformers.TrainerCallback`s",
    "optimizers": "only `(None, None)`: set `optim`, `learning_rate` and `lr_scheduler_type`",
    "quantization_config": "a `transformers.BitsAndBytesConfig` of 4 bits in NF4: `model.load_in=nf4`",
    "peft_config": "a `peft.LoraConfig`, see below; None: `lora`, a LoRA of rank 64 on all linear layers by default",
    "tools": "functions that the model may call, see [episodes.md](episodes.md)",
    "rollout_func": "a function that samples itself, see [episodes.md](episodes.md)",
    "environment_factory": "a class, or classes by name, see [episodes.md](episodes.md)",
}
