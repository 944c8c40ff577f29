"""The current adapter as files to load or to share: what `GRPOTrainer.save_model` and `push_to_hub` do.

    write_model(Path("mine"), session.policy, tokenizer, setup)     # PEFT's format and the tokenizer
    url = push_to_hub(write, repo_id="me/mine", private=True, token=None, commit_message="End of training")
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from transformers import PreTrainedTokenizerBase

from .common.errors import first_line
from .data.tokenizers import write_tokenizer
from .model.policy import Policy
from .setup import RunSetup

HUB_ERRORS: tuple[type[Exception], ...] = (LocalTokenNotFoundError, OSError, *HfHubHTTPError.__bases__)
"""No token, answers with an error, and connections that fail; the latter are only known as a base class."""


def write_model(folder: Path, policy: Policy, tokenizer: PreTrainedTokenizerBase, setup: RunSetup) -> None:
    """Write adapter and tokenizer, of the run of `setup`, into a folder. Its other files stay: it may be the run folder.

    Raises:
        ValueError: `folder` is a file.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"{folder} is a file: give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        made = Path(temporary) / "model"
        policy.save_adapter(made)
        write_tokenizer(tokenizer, setup.config, setup.inputs.model_path, made)
        for path in sorted(path for path in made.rglob("*") if os.path.isfile(path)):
            target = folder / path.relative_to(made)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)


def push_to_hub(
    write: Callable[[Path], None], *, repo_id: str, private: bool | None, token: str | None, commit_message: str
) -> str:
    """Upload what `write` writes into a folder to a model repository on the Hub, which is made if it is missing; returns the
    address of the commit.

    Raises:
        ValueError: no access to the Hub, with the reason.
    """
    hub = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary))
        try:
            name = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return str(hub.upload_folder(repo_id=name, folder_path=temporary, commit_message=commit_message).commit_url)
        except HUB_ERRORS as error:
            raise ValueError(
                f"could not upload to {repo_id} on the Hub: {first_line(error)} (log in with `hf auth login`)"
            ) from error
