"""The tokenizer of a run: loaded for its prompts, and its files for what is made of the run.

    tokenizer = load_tokenizer(config, "path/to/model")
    copy_tokenizer(config, "path/to/model", Path("runs/mine/export/adapter"))      # byte for byte
    write_tokenizer(tokenizer, config, "path/to/model", Path("mine"))              # the same, unless a script has changed it

Saving a loaded tokenizer again would rewrite its files, and leave out those that transformers does not need, such as
`tokenizer.model`.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ..common.errors import first_line
from ..common.model_files import TOKENIZER_PATTERNS, resolve_tokenizer
from ..common.quiet import quiet_stderr
from ..config import GRPOConfig
from .templates import template_text

TEMPLATE_FILE = "chat_template.jinja"


def load_tokenizer(config: GRPOConfig, model_path: str) -> PreTrainedTokenizerBase:
    """The run's tokenizer: that of `model.tokenizer` or of the model's folder, with the template of `data.chat_template`.

    Raises:
        ValueError: there is no tokenizer.
        FileNotFoundError: `data.chat_template` names a file that does not exist.
    """
    name, folder = config.model.tokenizer, _folder(config, model_path)
    try:
        with quiet_stderr():
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:  # transformers' errors for a folder that has none
        reason = first_line(error)
        if name is None:
            where = f"model {config.model.name}: no tokenizer in its folder (model.tokenizer can name another one)"
        else:
            where = f"model.tokenizer: no tokenizer in {name}"
        raise ValueError(f"{where}: {reason}") from error
    if config.data.chat_template is not None:
        tokenizer.chat_template = template_text(config.data.chat_template)
    return tokenizer


def vocab_size_of(config: GRPOConfig, model_path: str) -> int | None:
    """Rows of the model's embedding; None if its configuration does not say. ValueError if transformers cannot read that."""
    try:
        return getattr(AutoConfig.from_pretrained(model_path).get_text_config(), "vocab_size", None)
    except ValueError as error:  # such as an unknown model_type
        raise ValueError(f"model {config.model.name}: cannot read its config.json: {first_line(error)}") from error


def copy_tokenizer(config: GRPOConfig, model_path: str, folder: Path) -> None:
    """Copy the files of the run's tokenizer into a folder, with the template of `data.chat_template`.

    Raises:
        ValueError: `model.tokenizer` is neither a folder nor on the Hub.
    """
    source = _folder(config, model_path)
    for path in _files(source):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    if config.data.chat_template is not None:  # which takes precedence over tokenizer_config.json
        (folder / TEMPLATE_FILE).write_text(template_text(config.data.chat_template), encoding="utf-8")


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, config: GRPOConfig, model_path: str, folder: Path) -> None:
    """Write a tokenizer into a folder: the files of the run's if it is still that one, else as transformers saves it."""
    with tempfile.TemporaryDirectory(prefix="rankup-tokenizer-") as temporary:
        now, before = Path(temporary) / "now", Path(temporary) / "before"
        tokenizer.save_pretrained(now)
        load_tokenizer(config, model_path).save_pretrained(before)
        if _content(now) == _content(before):
            copy_tokenizer(config, model_path, folder)
        else:
            shutil.copytree(now, folder, dirs_exist_ok=True)


def _folder(config: GRPOConfig, model_path: str) -> Path:
    name = config.model.tokenizer
    return Path(model_path) if name is None else resolve_tokenizer(name)


def _files(folder: Path) -> list[Path]:
    """Files of a tokenizer in a folder, which may have a model too."""
    found = {path for pattern in TOKENIZER_PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def _content(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
