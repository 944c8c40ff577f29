"""The texts of tokens, by the tokenizer of a run.

    texts = TokenTexts.of(run.config, run.folder)     # or the reason why there are none, as a text
    texts.vocabulary([19, 284])                       # ([" the", "2"], [])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ...common.model_files import EMBEDDED, hub_id, resolve_model, resolve_tokenizer
from ...config import GRPOConfig
from ...run.run_folder import ADAPTER_DIR

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNREADABLE = "\ufffd"  # what decoding writes for bytes that are no complete character
SPACE_OF_SENTENCEPIECE = "▁"


@dataclass(slots=True)
class TokenTexts:
    """The text of each token alone, special tokens by their names, and parts of characters as the tokenizer names them."""

    tokenizer: PreTrainedTokenizerBase
    _texts: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: GRPOConfig | None, folder: Path) -> TokenTexts | str:
        """Those of a run: of the tokenizer beside its adapter, or else of its model. A text says why there is none."""
        if config is None:
            return "the configuration of the run cannot be read, so its tokenizer is not known"
        from ...data.tokenizers import load_tokenizer

        beside = folder / ADAPTER_DIR
        try:
            if (beside / "tokenizer.json").is_file() or (beside / "tokenizer.model").is_file():
                config = config.model_copy(update={"model": config.model.model_copy(update={"tokenizer": str(beside)})})
            return cls(load_tokenizer(config, _model_folder(config)))
        except (ValueError, OSError) as error:
            return f"no tokenizer to show tokens with: {' '.join(str(error).split())}"

    def vocabulary(self, ids: Sequence[int]) -> tuple[list[str], list[int]]:
        """The text of each id, and the places of special tokens in `ids`."""
        special = set(self.tokenizer.all_special_ids)
        return [self._text(id) for id in ids], [place for place, id in enumerate(ids) if id in special]

    def _text(self, id: int) -> str:
        if id not in self._texts:
            self._texts[id] = self._decoded(id)
        return self._texts[id]

    def _decoded(self, id: int) -> str:
        text = self.tokenizer.decode([id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        name = self.tokenizer.convert_ids_to_tokens(id) if id < len(self.tokenizer) else None
        if not isinstance(name, str):
            return text or f"<{id}>"
        if UNREADABLE in text:
            return name
        starts_word = name.startswith(SPACE_OF_SENTENCEPIECE) and not text.startswith(" ")
        return f" {text}" if starts_word else text


def _model_folder(config: GRPOConfig) -> str:
    """The local folder of the model; of one on the Hub only the tokenizer's files are fetched."""
    name = config.model.name
    if config.model.tokenizer is not None:
        return name  # the tokenizer is elsewhere
    if name.lower() in EMBEDDED or hub_id(name) is None:
        return resolve_model(name, config_only=True)
    return str(resolve_tokenizer(name))
