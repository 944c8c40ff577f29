"""The tokenizer of an export: the files that the run has used, byte for byte, and the chat template of `data.chat_template`.

    copy_tokenizer(config, "path/to/model", Path("runs/mine/export/adapter"))

Saving a loaded tokenizer again would rewrite its files, and leave out those that transformers does not need, such as
`tokenizer.model`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ...common.model_files import TOKENIZER_PATTERNS, resolve_tokenizer
from ...config import GRPOConfig

TEMPLATE_FILE = "chat_template.jinja"


def copy_tokenizer(config: GRPOConfig, model_path: str, folder: Path) -> None:
    """Copy the files of `model.tokenizer`, or of the tokenizer in `model_path`, into a folder.

    Raises:
        ValueError: `model.tokenizer` is neither a folder nor on the Hub.
    """
    name = config.model.tokenizer
    source = Path(model_path) if name is None else resolve_tokenizer(name)
    for path in tokenizer_files(source):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    template: str | None = getattr(config.data, "chat_template", None)
    if template is not None:
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")  # which takes precedence over tokenizer_config.json


def tokenizer_files(folder: Path) -> list[Path]:
    """Files of a tokenizer in a folder, which may have a model too."""
    found = {path for pattern in TOKENIZER_PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)
