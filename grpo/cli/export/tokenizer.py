"""The tokenizer of an export: the files that the run has used, byte for byte, and the chat template of `data.chat_template`.

    copy_tokenizer(config, "path/to/model", Path("runs/mine/export/adapter"))
    tokenizer = load_tokenizer(config, "path/to/model")

Saving a loaded tokenizer again would rewrite its files, and leave out those that transformers does not need, such as
`tokenizer.model`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ...common.model_files import TOKENIZER_PATTERNS, resolve_tokenizer
from ...common.quiet import quiet_stderr
from ...config import GRPOConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FILE = "chat_template.jinja"


def copy_tokenizer(config: GRPOConfig, model_path: str, folder: Path) -> None:
    """Copy the files of `model.tokenizer`, or of the tokenizer in `model_path`, into a folder.

    Raises:
        ValueError: `model.tokenizer` is neither a folder nor on the Hub.
    """
    source = _folder(config, model_path)
    for path in tokenizer_files(source):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    template = _template(config)
    if template is not None:
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")  # which takes precedence over tokenizer_config.json


def load_tokenizer(config: GRPOConfig, model_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer that `copy_tokenizer` copies, with the run's chat template.

    Raises:
        ValueError: see `copy_tokenizer`.
    """
    from transformers import AutoTokenizer

    with quiet_stderr():
        tokenizer = AutoTokenizer.from_pretrained(_folder(config, model_path))
    template = _template(config)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _folder(config: GRPOConfig, model_path: str) -> Path:
    name = config.model.tokenizer
    return Path(model_path) if name is None else resolve_tokenizer(name)


def _template(config: GRPOConfig) -> str | None:
    """The text of `data.chat_template`."""
    return getattr(config.data, "chat_template", None)


def tokenizer_files(folder: Path) -> list[Path]:
    """Files of a tokenizer in a folder, which may have a model too."""
    found = {path for pattern in TOKENIZER_PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)
