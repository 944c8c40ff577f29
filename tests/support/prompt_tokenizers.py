"""A small tokenizer with a chat template, and prompts prepared with it."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rankup.grpo.config import DataConfig
from rankup.grpo.data.prompts import PromptData, prepare_prompts

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' and no_system %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m.role }} : {{ m.content }}{% if m.name is defined %} named{% endif %}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
TRAINING_LINES = [
    "what is one plus two ?",
    "system : user : assistant : you are brief named",
    "the sum of one and two is three . <s> </s>",
]


def make_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """A byte-level BPE tokenizer that puts <s> before every text, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = chat_template
    return wrapped


def user(text: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


def prepared(rows: Any, tokenizer: Any, *, max_prompt_length: int = 100, **options: Any) -> PromptData:
    """The prompts of the rows, with options of the section `data`."""
    return prepare_prompts(rows, tokenizer, DataConfig(**options), max_prompt_length=max_prompt_length)
