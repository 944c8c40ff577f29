"""From the name of a data set to batches of tokenised prompts.

    rows = load_rows("data/train.jsonl", split="train")
    data = prepare_prompts(rows, tokenizer, max_prompt_length=512)
    sampler = PromptSampler(data.rows, prompts_per_step=8, seed=42)
    batch = sampler.batch(step)           # the same rows for the same step, whatever was asked before

A prompt is a text, tokenised as it stands, or a conversation (a list of {"role", "content"}), which the tokenizer's
chat template renders. A system prompt turns a text into a conversation. All other columns go to the reward functions.
"""

import contextlib
import dataclasses
import difflib
import inspect
import json
import logging
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import huggingface_hub.utils
import jinja2
import numpy as np
from datasets.exceptions import DatasetsError

from ...rewards.loading import find_file, load_object
from ...rewards.runner import check_column_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]
Message = dict[str, Any]

_FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_REASONING_GYM = "reasoning_gym:"
_DEFAULT_SEED = 42
_SILENT = logging.CRITICAL + 1


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt, ready to be sampled from."""

    prompt: str | list[Message]
    """What reward functions get as their `prompts` entry: the text, or the conversation with its system prompt."""
    token_ids: tuple[int, ...]
    """The prompt as the model gets it, special tokens included."""
    columns: dict[str, Any]
    """All other columns of the row; every row has the same ones, None where its source left one out."""


@dataclass(frozen=True, slots=True)
class PromptData:
    """The rows of a data set that fit, in their order, and how many were longer than the limit."""

    rows: list[PromptRow]
    dropped: int


# ---------------------------------------------------------------------------------------------- sources


def load_rows(
    source: str | datasets.Dataset | Iterable[Row],
    *,
    split: str,
    subset: str | None = None,
    options: Mapping[str, Any] | None = None,
    base_dir: Path | None = None,
) -> list[dict[str, Any]]:
    """Read all rows of a data set into memory. What `source` may be:

    - a path ending in .json, .jsonl, .parquet or .csv, relative to the working directory or to `base_dir` (all of its
      rows are read: a file has no splits);
    - the id of a data set on the Hub (`split`, and `subset` where it has several);
    - `reasoning_gym:<task>`: columns prompt, answer, metadata (JSON) and task; `options` are size, seed and the
      task's own. Every split has a seed of its own, so that a training and a test split differ;
    - `file.py:function` or `package.module:function`, called with `options` as keyword arguments;
    - rows, as a `datasets.Dataset` or any iterable of mappings.

    Raises FileNotFoundError (no such file) and ValueError (everything else, with what to do about it).
    """
    options = dict(options or {})
    if not isinstance(source, str):
        return _as_rows(source, source="the data set", split=split)
    if source.startswith(_REASONING_GYM):
        return _reasoning_gym_rows(source.removeprefix(_REASONING_GYM), split=split, options=options)
    if ":" in source:
        return _function_rows(source, split=split, options=options, base_dir=base_dir)
    if options:
        raise ValueError(
            f"data options ({', '.join(options)}) are for reasoning_gym tasks and functions: {source!r} takes none"
        )
    if Path(source).suffix in _FILE_BUILDERS:
        return _file_rows(find_file(source, base_dir=base_dir))
    return _hub_rows(source, split=split, subset=subset)


def _file_rows(path: Path) -> list[dict[str, Any]]:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    with _quiet_datasets(), tempfile.TemporaryDirectory() as cache:
        try:
            loaded = datasets.load_dataset(
                _FILE_BUILDERS[path.suffix], data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True
            )
        except (DatasetsError, ValueError) as error:
            if "corresponds to no data" in str(error):
                raise ValueError(f"{path} has no rows") from error
            raise ValueError(f"cannot read {path}: {_first_line(error.__cause__ or error)}") from error
        return _as_rows(loaded, source=str(path), split="train")


def _hub_rows(source: str, *, split: str, subset: str | None) -> list[dict[str, Any]]:
    with _quiet_datasets():
        try:
            loaded = datasets.load_dataset(source, subset, split=split)
        except ConnectionError as error:
            raise ValueError(
                f"cannot reach the Hub for data set {source!r}, and it is not in the local cache: go online once, or "
                f"name a file ({', '.join(_FILE_BUILDERS)})"
            ) from error
        except (DatasetsError, OSError, ValueError) as error:
            raise ValueError(f"cannot load data set {source!r}: {_first_line(error)}") from error
        return _as_rows(loaded, source=source, split=split)


def _function_rows(source: str, *, split: str, options: dict[str, Any], base_dir: Path | None) -> list[dict[str, Any]]:
    function = load_object(source, base_dir=base_dir)
    if not callable(function):
        return _as_rows(function, source=source, split=split)
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        raise ValueError(f"{source} cannot be called with the data options ({', '.join(options)}): {error}") from error
    return _as_rows(function(**options), source=source, split=split)


def _reasoning_gym_rows(task: str, *, split: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    from reasoning_gym.factory import DATASETS, create_dataset  # here: it takes seconds to import

    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3, cutoff=0.4)
        offer = f": did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"reasoning_gym has no task {task!r}{offer}")
    known = [field.name for field in dataclasses.fields(DATASETS[task][1])]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"reasoning_gym:{task} has no option {unknown[0]!r} (options: {', '.join(known)})")
    seed = options.get("seed", _DEFAULT_SEED)
    # Row i of a task is made from seed + i, so a split that started at seed + 1 would repeat almost all of another's
    # rows: splits start a random-looking distance apart.
    offset = 0 if split == "train" else zlib.crc32(split.encode()) % 2**30
    try:
        made = create_dataset(task, **{**options, "seed": seed + offset})
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"reasoning_gym:{task} refuses its options: {_first_line(error)}") from error
    return [
        {
            "prompt": entry["question"],
            "answer": entry["answer"],
            "metadata": json.dumps(entry["metadata"], default=str),
            "task": task,
        }
        for entry in (made[index] for index in range(len(made)))
    ]


def _as_rows(rows: Any, *, source: str, split: str) -> list[dict[str, Any]]:
    if isinstance(rows, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if split not in rows:
            raise ValueError(f"{source} has no split {split!r} (splits: {', '.join(map(str, rows))})")
        rows = rows[split]
    if isinstance(rows, datasets.Dataset):
        columns: dict[str, list[Any]] = rows.with_format(None)[:]  # one decode for each column, not one for each row
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if isinstance(rows, (str, Mapping)) or not isinstance(rows, Iterable):
        raise ValueError(f"{source} gave a {type(rows).__name__}: it must give rows, each a mapping of column to value")
    rows = list(rows)
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {index} of {source} is a {type(row).__name__}: it must map columns to values")
    if not rows:
        raise ValueError(f"{source} has no rows")
    return [dict(row) for row in rows]


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Silence the two libraries' progress bars and warnings inside the block; what fails is raised anyway."""
    bars = {module: module.are_progress_bars_disabled() for module in (datasets.utils, huggingface_hub.utils)}
    verbosity = {module: module.get_verbosity() for module in (datasets.utils.logging, huggingface_hub.utils.logging)}
    for module in bars:
        module.disable_progress_bars()
    for module in verbosity:
        module.set_verbosity(_SILENT)
    try:
        yield
    finally:
        for module, were_disabled in bars.items():
            if not were_disabled:
                module.enable_progress_bars()
        for module, level in verbosity.items():
            module.set_verbosity(level)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------------------------------------- prompts


def prepare_prompts(
    rows: Iterable[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    prompt_column: str = "prompt",
    system_prompt: str | None = None,
    max_prompt_length: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PromptData:
    """Tokenise the prompts of `rows` and leave out those of more than `max_prompt_length` tokens.

    A text is tokenised as it stands. A conversation goes through the chat template with the generation prompt added;
    one that ends with an assistant's message is left open there instead, for the model to continue. `system_prompt`
    is put before every prompt that has no system message of its own. `chat_template_kwargs` are the template's
    variables (`enable_thinking=False`).

    Raises ValueError: no rows, no such column, a prompt that is neither text nor conversation or that is empty, a
    conversation without a chat template or that the template refuses, a column named like a reward function's
    argument, every prompt too long.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("the data set has no rows")
    column_names = list(dict.fromkeys(name for row in rows for name in row))
    if prompt_column not in column_names:
        raise ValueError(f"no column {prompt_column!r} for the prompt: set data.prompt_column to one of {column_names}")
    column_names.remove(prompt_column)
    check_column_names(column_names)

    prompts = [_as_prompt(row.get(prompt_column), index, system_prompt) for index, row in enumerate(rows)]
    token_ids = _tokenise(prompts, tokenizer, dict(chat_template_kwargs or {}))
    for index, ids in enumerate(token_ids):
        if not ids:
            raise ValueError(f"the prompt of row {index} is empty: remove the row")
    kept = [
        PromptRow(prompt, tuple(ids), {name: row.get(name) for name in column_names})
        for prompt, ids, row in zip(prompts, token_ids, rows, strict=True)
        if len(ids) <= max_prompt_length
    ]
    if not kept:
        raise ValueError(
            f"all {len(rows)} prompts are longer than rollout.max_prompt_length={max_prompt_length}: the shortest has "
            f"{min(map(len, token_ids))} tokens"
        )
    return PromptData(rows=kept, dropped=len(rows) - len(kept))


def _as_prompt(prompt: Any, index: int, system_prompt: str | None) -> str | list[Message]:
    system = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
    if isinstance(prompt, str):
        return [*system, {"role": "user", "content": prompt}] if system else prompt
    is_conversation = isinstance(prompt, Sequence) and all(
        isinstance(message, Mapping) and "role" in message and "content" in message for message in prompt
    )
    if not is_conversation or not prompt:
        raise ValueError(
            f"the prompt of row {index} is neither a text nor a conversation (a list of mappings with role and "
            f"content): {repr(prompt)[:80]}"
        )
    # Arrow gives every message the keys of all messages, as None; templates ask whether a key is there.
    messages = [
        {key: value for key, value in message.items() if value is not None or key == "content"} for message in prompt
    ]
    return messages if messages[0]["role"] == "system" else [*system, *messages]


def _tokenise(
    prompts: Sequence[str | list[Message]], tokenizer: "PreTrainedTokenizerBase", template_kwargs: dict[str, Any]
) -> list[list[int]]:
    """Token ids of all prompts, in their order; one tokenizer call for each kind of prompt, for its speed."""
    texts = {i: prompt for i, prompt in enumerate(prompts) if isinstance(prompt, str)}
    conversations = {i: prompt for i, prompt in enumerate(prompts) if not isinstance(prompt, str)}
    token_ids: dict[int, list[int]] = {}
    if texts:
        encoded = tokenizer(list(texts.values()))["input_ids"]
        token_ids.update(zip(texts, (_one_bos(ids, tokenizer) for ids in encoded), strict=True))
    if conversations:
        rendered = _render(conversations, tokenizer, template_kwargs)
        # A template writes the special tokens itself, BOS among them.
        encoded = tokenizer(list(rendered.values()), add_special_tokens=False)["input_ids"]
        token_ids.update(zip(rendered, encoded, strict=True))
    return [token_ids[i] for i in range(len(prompts))]


def _one_bos(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """A text that was rendered beforehand may start with BOS already; the tokenizer puts another before it."""
    doubled = len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id
    return ids[1:] if doubled else ids


def _render(
    conversations: Mapping[int, list[Message]], tokenizer: "PreTrainedTokenizerBase", template_kwargs: dict[str, Any]
) -> dict[int, str]:
    if tokenizer.chat_template is None:
        raise ValueError(
            "the prompts are conversations, but the model's tokenizer has no chat template: use an instruction-tuned "
            "model, or plain-text prompts without data.system_prompt"
        )
    rendered: dict[int, str] = {}
    for is_open in (False, True):
        part = {i: chat for i, chat in conversations.items() if (chat[-1]["role"] == "assistant") is is_open}
        if not part:
            continue
        try:
            texts: Any = tokenizer.apply_chat_template(
                list(part.values()),
                tokenize=False,
                add_generation_prompt=not is_open,
                continue_final_message=is_open,
                **template_kwargs,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses a prompt: {_first_line(error)}") from error
        rendered.update(zip(part, texts, strict=True))
    return rendered


# ---------------------------------------------------------------------------------------------- batches


class PromptSampler:
    """Which prompts a step trains on: `batch(step)` depends on the seed and the step, and on nothing else.

    The rows are walked through in epochs; every epoch holds each row once, in an order of its own (`shuffle`) or as
    given. A batch may end one epoch and begin the next, and with more prompts in a step than there are rows it holds
    several epochs, so a row can occur twice in it. Steps count from 0.
    """

    def __init__(self, rows: Sequence[PromptRow], *, prompts_per_step: int, seed: int, shuffle: bool = True):
        if not rows:
            raise ValueError("no prompts to sample from")
        if prompts_per_step < 1:
            raise ValueError(f"prompts_per_step must be at least 1, not {prompts_per_step}")
        self.rows = rows
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self.shuffle = shuffle

    def batch(self, step: int) -> list[PromptRow]:
        """The `prompts_per_step` rows of a step."""
        size = len(self.rows)
        start = step * self.prompts_per_step
        stop = start + self.prompts_per_step
        chosen: list[PromptRow] = []
        for epoch in range(start // size, (stop - 1) // size + 1):
            first = max(start - epoch * size, 0)
            last = min(stop - epoch * size, size)
            chosen.extend(self.rows[index] for index in self._order(epoch)[first:last])
        return chosen

    def further_batch(self, step: int, number: int) -> list[PromptRow]:
        """As many further rows for the step, drawn at random beside the epochs; `number` counts such draws from 1."""
        draw = np.random.default_rng(np.random.SeedSequence([self.seed, step, number]))
        size = len(self.rows)
        indices = draw.choice(size, self.prompts_per_step, replace=size < self.prompts_per_step)
        return [self.rows[index] for index in indices]

    def _order(self, epoch: int) -> np.ndarray:
        size = len(self.rows)
        if not self.shuffle:
            return np.arange(size)
        return np.random.default_rng(np.random.SeedSequence([self.seed, epoch])).permutation(size)
