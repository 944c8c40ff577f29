"""A reward that a sequence classifier gives, as in TRL when a reward function is a model id.

    rewards: {functions: Skywork/Skywork-Reward-V2-Qwen3-0.6B}      # a Hub id or a local folder

    helpful = SequenceClassifier("models/helpful", device="cpu")

A loaded model is taken too, with its tokenizer. The reward of a row is the classifier's single logit for the prompt followed by
the completion; conversations are formatted by the chat template of the classifier's tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .texts import content_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class SequenceClassifier:
    """A reward function around a sequence classifier with one label.

    Arguments:
        model_id: a local folder or a Hub id that `AutoModelForSequenceClassification` loads, or a loaded model. As in TRL,
            this is put into evaluation mode, moved to the device, and gets the tokenizer's padding token, when it is used.
        tokenizer: None: that of the model's folder or Hub id.
        device: such as "cpu" or "cuda:1"; None: the GPU, or the CPU if there is none.
        batch_size: texts per forward pass.

    Raises ValueError if a loaded model has not exactly one label, or no tokenizer. In other cases the first call loads the
    model, and raises it then. Another process gets a copy of a loaded model, and loads another one by itself.
    """

    isolation = "inline"  # one copy of the model in the process that has the GPU, instead of one in each reward process

    def __init__(
        self,
        model_id: str | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | None = None,
        batch_size: int = 16,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        name = model_id if isinstance(model_id, str) else model_id.name_or_path or type(model_id).__name__
        self.__name__ = name.rstrip("/").rpartition("/")[2]
        self.model_id = model_id
        self.tokenizer = tokenizer
        self.device = device
        self.batch_size = batch_size
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
        if isinstance(model_id, str):
            return
        if model_id.config.num_labels != 1:
            what = f"a {type(model_id).__name__} with {model_id.config.num_labels} labels"
            raise ValueError(f"{self.__name__} is not a reward model: it is {what} instead of one")
        if tokenizer is None and not model_id.name_or_path:
            raise ValueError(f"the reward model {self.__name__} has no name to load its tokenizer by: pass its tokenizer, too")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}  # another process prepares the model itself

    def __call__(self, *, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        """The classifier's logit for each of n rows (TRL's contract).

        Raises ValueError if a text is longer than the classifier's context.
        """
        import torch

        if self._loaded is None:
            self._loaded = _load(self.model_id, self.tokenizer, self.device)
        model, tokenizer = self._loaded
        texts = [_text(tokenizer, *row) for row in zip(prompts, completions, strict=True)]
        rewards: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            batch = tokenizer(
                text=texts[start : start + self.batch_size],
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=False,
            )
            length = batch["input_ids"].shape[1]
            if length > tokenizer.model_max_length:  # on a GPU, an invalid position would abort the process
                raise ValueError(
                    f"{self.__name__} accepts {tokenizer.model_max_length} tokens, but prompt and completion have {length}: "
                    "lower rollout.max_completion_length, or choose a classifier for longer texts"
                )
            with torch.inference_mode():
                rewards += model(**batch.to(model.device)).logits[:, 0].float().tolist()
        return rewards


def _text(tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any) -> str:
    if isinstance(prompt, str):
        return prompt + completion
    messages = [{**message, "content": content_text(message.get("content"))} for message in (*prompt, *completion)]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert isinstance(text, str)
    return text


def _load(
    model_id: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, device: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoTokenizer

    model = _from_files(model_id) if isinstance(model_id, str) else model_id
    name = model_id if isinstance(model_id, str) else model.name_or_path
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name) if tokenizer is None else tokenizer
    if found.pad_token_id is None:
        found.pad_token = found.eos_token
    # Decoders read the logit at the last token that is not padding.
    model.config.get_text_config().pad_token_id = found.pad_token_id
    torch.nn.Module.to(model.eval(), device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model, found


def _from_files(model_id: str) -> PreTrainedModel:
    from transformers import AutoModelForSequenceClassification

    # ignore_mismatched_sizes: a head of another size is reported below, instead of an error about the names of its weights.
    model, report = AutoModelForSequenceClassification.from_pretrained(
        model_id, num_labels=1, ignore_mismatched_sizes=True, output_loading_info=True
    )
    for name, saved, _ in report["mismatched_keys"]:
        raise ValueError(f"{model_id} is not a reward model: its {name} has {saved[0]} labels instead of one")
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"]))
        raise ValueError(f"{model_id} is not a sequence classifier: its {missing} would be random")
    return model
