"""The completions of a step in compact form: what the page shows of one completions file.

    packed = pack_step(path, texts, share=0.5)      # half of its groups
    packed["groups"][0]["prompt"], packed["text"]

Token ids become characters: the place of an id in the step's vocabulary, which starts with the most frequent ones, so that
they take little over a byte each. A log-probability becomes one character as well, in 92 levels that are fine near 0.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...common.exact_json import encode
from ...run.completions import read_completions
from .tokens import TokenTexts

FIRST_CHARACTER = 35
"""Of the characters that number things: behind the quotation mark, which JSON must escape."""
SURROGATES = (0xD800, 0x800)
"""First of the code points that are no characters, and their number."""
LEVELS = 92
GIVEN, UNKNOWN = " ", "!"
"""A given token has no log-probability, and that of a sampled token may be missing."""

OWN_COLUMNS = {
    *("step", "prompt", "completion_prefix", "completion", "completion_ids", "logprobs", "advantage", "reward"),
    *("finish_reason", "num_tokens", "policy_version", "rewards", "data", "episode"),
}
Packed = dict[str, Any]


def pack_step(path: Path, texts: TokenTexts | None, *, share: float = 1.0) -> Packed:
    """The groups of a completions file, or this share of them, evenly spread; at least one if `share` is above 0.

    Raises:
        ValueError: the file was not written by a run, or is incomplete.
        OSError: it cannot be read.
    """
    rows = read_completions(path)
    groups = [list(group) for _, group in itertools.groupby(rows, key=prompt_key)]
    kept = [groups[place] for place in spread(len(groups), math.floor(share * len(groups)))] if share < 1.0 else groups
    chosen = [row for group in kept for row in group]
    extras = dict.fromkeys(name for row in chosen for name in row if name not in OWN_COLUMNS)
    functions = dict.fromkeys(name for row in chosen for name in row["rewards"])
    packed: Packed = {
        "of": [len(groups), len(rows)],
        "groups": [_group(group) for group in kept],
        "reward": [_short(row.get("reward")) for row in chosen],
        "advantage": [_short(row.get("advantage")) for row in chosen],
        "finish": [row.get("finish_reason") for row in chosen],
        "tokens": [row.get("num_tokens") for row in chosen],
        "rewards": {name: [_short(row["rewards"].get(name)) for row in chosen] for name in functions},
        "extras": {name: [_plain(row.get(name)) for row in chosen] for name in extras},
        "text": [row.get("completion") or "" for row in chosen],
    }
    if any("episode" in row for row in chosen):
        episodes = [row.get("episode", {}) for row in chosen]
        packed |= {
            "messages": [_strict(episode.get("messages")) for episode in episodes],
            "calls": [_strict(episode.get("tool_calls")) for episode in episodes],
            "failure": [episode.get("failure") for episode in episodes],
            "given": [episode.get("num_given") for episode in episodes],
        }
    return packed | _tokens(chosen, packed["text"], texts)


def step_entry(path: Path) -> dict[str, Any]:
    """A step in the index of the page: how many groups and completions it has, and the prompts of the groups by their keys.

    Raises ValueError and OSError like `pack_step`.
    """
    rows = read_completions(path)
    keys = [key for key, _ in itertools.groupby(rows, key=prompt_key)]
    return {"groups": len(keys), "completions": len(rows), "kept": len(rows), "keys": keys}


def prompt_key(row: Mapping[str, Any]) -> str:
    """Identifies a prompt with its columns over steps and runs."""
    text = encode([row.get("prompt"), row.get("completion_prefix"), row["data"]])
    return hashlib.sha1(text.encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()[:12]


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of the numbers below `count`, evenly spread, with the first and the last."""
    if wanted >= count:
        return list(range(count))
    if wanted <= 1:
        return [0][:wanted]
    return sorted({round(n * (count - 1) / (wanted - 1)) for n in range(wanted)})


def _group(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = rows[0]
    return {
        "key": prompt_key(first),
        "rows": len(rows),
        "prompt": _prompt(first.get("prompt")),
        "prefix": first.get("completion_prefix") or "",
        "data": {name: _plain(value) for name, value in first["data"].items()},
    }


def _prompt(prompt: Any) -> Any:
    """A text, or the messages of a conversation, which files have as JSON."""
    try:
        messages = json.loads(prompt) if isinstance(prompt, str) and prompt.startswith("[") else prompt
    except ValueError:
        return prompt
    is_dialogue = isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages)
    return _strict(messages) if is_dialogue else prompt


def _tokens(rows: Sequence[Mapping[str, Any]], completions: list[Any], texts: TokenTexts | None) -> Packed:
    """Vocabulary, token ids and log-probabilities; the text of a completion becomes None where its tokens spell it."""
    all_ids = [list(row.get("completion_ids") or ()) for row in rows]
    if texts is None or not any(all_ids):
        return {}
    vocabulary = [id for id, _ in Counter(id for ids in all_ids for id in ids).most_common()]
    spelled, special = texts.vocabulary(vocabulary)
    places = {id: place for place, id in enumerate(vocabulary)}
    left_out = {vocabulary[place] for place in special}
    for number, ids in enumerate(all_ids):
        if "".join(spelled[places[id]] for id in ids if id not in left_out) == completions[number]:
            completions[number] = None
    packed = {
        "vocabulary": spelled,
        "special": special,
        "ids": ["".join(_character(places[id]) for id in ids) for ids in all_ids],
    }
    if any(row.get("logprobs") for row in rows):
        packed["logprobs"] = ["".join(map(_level, row.get("logprobs") or ())) for row in rows]
    elif any("episode" in row for row in rows):  # saved before log-probabilities were
        packed["logprobs"] = [_without_logprobs(row) for row in rows]
    return packed


def _character(place: int) -> str:
    code = FIRST_CHARACTER + place
    return chr(code if code < SURROGATES[0] else code + SURROGATES[1])


def _level(logprob: float | None) -> str:
    if logprob is None:
        return GIVEN
    if not math.isfinite(logprob):
        return UNKNOWN
    return chr(FIRST_CHARACTER + min(LEVELS - 1, round(20 * math.sqrt(max(0.0, -logprob)))))


def _without_logprobs(row: Mapping[str, Any]) -> str:
    """Which tokens were given, of a file without log-probabilities."""
    marks = [GIVEN] * len(row.get("completion_ids") or ())
    for start, end in row.get("episode", {}).get("sampled_spans") or ():
        marks[start:end] = [UNKNOWN] * (end - start)
    return "".join(marks)


def _short(value: float | None) -> float | None:
    """Six digits of a number; None if it is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _plain(value: Any) -> Any:
    """A value of a column in JSON's types: numbers, texts and truth values as they are, others as text."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**53 else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _strict(value: Any) -> Any:
    """Messages and calls with numbers that are not finite as texts: JavaScript's JSON has none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list) else value
