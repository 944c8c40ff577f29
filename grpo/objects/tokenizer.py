"""TRL's argument `processing_class` as the option `model.tokenizer`.

    tokenizer, notes = tokenizer_of(processing_class)               # that of a processor; only text is used
    fingerprint(tokenizer) == fingerprint(own)                      # both encode and decode alike
    folder = save_tokenizer(tokenizer, fingerprint(tokenizer), model_type="llama")      # in the cache
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from ..common.model_files import hub_id, resolve_model
from ..common.quiet import quiet_stderr
from .cache import Digest, cached_folder, new_folder

WITHOUT_EFFECT = {
    "tokenizer.json": ("padding", "truncation"),
    "tokenizer_config.json": (
        *("padding_side", "truncation_side", "pad_token", "model_max_length", "name_or_path", "processor_class"),
        *("is_local", "local_files_only", "_commit_hash", "transformers_version"),
    ),
    "special_tokens_map.json": ("pad_token",),
}
"""Keys of a tokenizer's files that change neither ids nor texts here: nothing is padded or truncated."""

PROBE = "Question: what is 12*7?\n  Answer — \"84\", naïve é 数 🙂\t<b>x_1</b>"
"""A text that a saved tokenizer must encode as the original does."""


def tokenizer_of(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> tuple[PreTrainedTokenizerBase, tuple[str, ...]]:
    """The tokenizer, and a note if it is that of a processor.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return processing_class, ()
    tokenizer = getattr(processing_class, "tokenizer", None)
    if isinstance(processing_class, ProcessorMixin) and isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer, ("processing_class: only the processor's tokenizer is used; prompts are text",)
    raise TypeError(
        f"processing_class must be a transformers.PreTrainedTokenizerBase, or a ProcessorMixin with one (got "
        f"{type(processing_class).__name__})"
    )


def load_tokenizer(name: str, *, revision: str | None = None, local_only: bool = False) -> PreTrainedTokenizerBase | None:
    """That of a folder or an id on the Hub; None if there is none. `local_only`: download nothing."""
    with quiet_stderr():
        try:
            return AutoTokenizer.from_pretrained(name, revision=revision, local_files_only=local_only)
        except (OSError, ValueError):  # transformers' errors for a folder or an id without a tokenizer
            return None


def own_tokenizer(model: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    """That of a model: an embedded name, a folder, or an id on the Hub, of which only the tokenizer is downloaded."""
    if hub_id(model) is not None:
        return load_tokenizer(model, revision=revision)
    try:
        return load_tokenizer(resolve_model(model), local_only=True)
    except ValueError:  # no such folder
        return None


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of vocabulary, merges, special and added tokens, and chat template: of its files without what has no effect."""
    digest = Digest()
    with tempfile.TemporaryDirectory(prefix="rankup-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.add(str(file.relative_to(folder)), _content(file))
    return str(digest)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, content: str, *, model_type: str) -> Path:
    """Its folder in the cache, written if it is not there. The same tokenizer has the same folder.

    Args:
        content: the tokenizer's fingerprint.
        model_type: that of the model, which vLLM looks for beside a tokenizer.

    Raises:
        ValueError: transformers saves it in a form that encodes texts differently when it is loaded.
    """
    digest = Digest()
    digest.add("tokenizer", f"{content} {model_type}".encode())
    folder = cached_folder("tokenizers", Path(tokenizer.name_or_path).name or "tokenizer", digest)
    with new_folder(folder) as partial:
        if partial is not None:
            (partial / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
            write_tokenizer(tokenizer, partial)
    return folder


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save it into a folder.

    Raises:
        ValueError: see `save_tokenizer`.
    """
    tokenizer.save_pretrained(folder)
    saved = load_tokenizer(str(folder), local_only=True)
    if saved is None or _behaviour(saved) != _behaviour(tokenizer):
        raise ValueError(
            f"processing_class: a {type(tokenizer).__name__} is another tokenizer once it is saved and loaded: save it "
            "yourself, and set model.tokenizer to its folder"
        )


def check_ids(
    tokenizer: PreTrainedTokenizerBase, *, embeddings: int, own: Callable[[], PreTrainedTokenizerBase | None]
) -> None:
    """Check that the model has an embedding for every token, except for those that its `own` tokenizer has too.

    Raises:
        ValueError: it has not.
    """
    beyond = {(index, token) for token, index in tokenizer.get_vocab().items() if index >= embeddings}
    if beyond and (found := own()) is not None:
        beyond -= {(index, token) for token, index in found.get_vocab().items()}
    if beyond:
        index, token = min(beyond)
        raise ValueError(
            f"processing_class: the model has {embeddings} embeddings, and token {token!r} has the id {index}: call "
            "model.resize_token_embeddings, and train the model on the new tokens first"
        )


def _content(file: Path) -> bytes:
    """Of JSON, the values that have an effect, in the order of their keys; of other files, all."""
    ignored = WITHOUT_EFFECT.get(file.name)
    if ignored is None:
        return file.read_bytes()
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    kept = {key: value for key, value in values.items() if key not in ignored}
    return json.dumps(kept, sort_keys=True).encode()


def _behaviour(tokenizer: PreTrainedTokenizerBase) -> tuple[object, ...]:
    ids = tokenizer.encode(PROBE)
    return (
        tokenizer.get_vocab(),
        tokenizer.chat_template,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        sorted(tokenizer.all_special_ids),
        ids,
        tokenizer.decode(ids, skip_special_tokens=True),
    )
