"""Built-in rewards for the form of a completion: tags, regular expressions, JSON.

    rewards:
      functions:
        - rankup.rewards.formats:think_format
        - {function: "rankup.rewards.formats:tags", kwargs: {names: [plan, answer], partial_credit: true}}
        - {function: "rankup.rewards.formats:json_schema", kwargs: {schema: {type: object, required: [name]}}}

`think_format` is a reward function; `tags`, `matches` and `json_schema` make one.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .contract import with_check
from .loading import find_file
from .texts import Completion, Function, text_of

_THINK = re.compile(r"\s*<think>(?P<thought>.*?)</think>(?P<answer>.*)", re.DOTALL)
_TAG_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_JSON_BLOCK = re.compile(r"^```json[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
_FLAGS = {name: re.RegexFlag[name] for name in ("ASCII", "DOTALL", "IGNORECASE", "MULTILINE", "VERBOSE")}


def think_format(completions: Sequence[Completion], **kwargs: Any) -> list[float | None]:
    """1.0 for one `<think>...</think>` at the beginning and an answer after it, else 0.0.

    White space before the first tag is allowed; the thought may be empty, the answer may not; neither tag may occur again.
    Some chat templates put `<think>` at the end of the prompt, so it is not part of the completion: use `matches` with the
    pattern `(?:(?!</?think>).)*</think>(?!.*</?think>).*\\S.*` there.
    """
    return [_is_think_format(text_of(completion)) for completion in completions]


def _is_think_format(text: str) -> float:
    found = _THINK.fullmatch(text)
    once = text.count("<think>") == text.count("</think>") == 1
    return float(found is not None and once and bool(found["answer"].strip()))


def tags(names: Sequence[str] = ("think", "answer"), *, partial_credit: bool = False) -> Function:
    """Make a reward: 1.0 if the completion is `<a>...</a> <b>...</b>` for the names, else 0.0.

    names: the tags, in order. Each pair must occur exactly once, with only white space before, between and after the pairs.
    A pair may contain anything, or nothing.
    partial_credit: for other completions, give the share of correct pairs: each tag of the pair occurs exactly once, and
    the pair follows the correct pairs before it. If all pairs are correct but there is text outside of them, the last one
    counts as wrong, so that only the correct form gets 1.0.

    Raises ValueError if `names` is not a list of different names.
    """
    are_tags = not isinstance(names, str) and all(isinstance(name, str) and _TAG_NAME.fullmatch(name) for name in names)
    if not are_tags or not names or len(set(names)) != len(names):
        raise ValueError(f"tags needs a list of different tag names without brackets, such as [think, answer], not {names!r}")

    def reward(completions: Sequence[Completion], **kwargs: Any) -> list[float | None]:
        shares = [_share_of_correct_pairs(text_of(completion), names) for completion in completions]
        return [share if partial_credit else float(share == 1.0) for share in shares]

    reward.__name__ = "tags"
    return reward


def _share_of_correct_pairs(text: str, names: Sequence[str]) -> float:
    correct, end, outside = 0, 0, ""
    for name in names:
        opening, closing = f"<{name}>", f"</{name}>"
        start, stop = text.find(opening), text.find(closing)
        if text.count(opening) == text.count(closing) == 1 and end <= start < stop:
            correct += 1
            outside += text[end:start]
            end = stop + len(closing)
    if correct == len(names) and (outside + text[end:]).strip():
        correct -= 1
    return correct / len(names)


def matches(pattern: str, *, flags: str | Sequence[str] = ("DOTALL",), full: bool = True) -> Function:
    """Make a reward: 1.0 if the completion matches a regular expression, else 0.0.

    pattern: in the syntax of Python's `re`. flags: names of its flags, such as [DOTALL, IGNORECASE]; by default a dot also
    matches line breaks. full: the complete text must match, else any part of it.

    A pattern with nested repetitions, such as `(a+)+b`, can take forever on some texts, and Python cannot interrupt it. Run
    the reward with `isolation: process` and a time limit unless the pattern is simple.

    Raises ValueError for an invalid pattern or an unknown flag.
    """
    names = [flags] if isinstance(flags, str) else list(flags)
    unknown = [name for name in names if name not in _FLAGS]
    if unknown:
        raise ValueError(f"unknown regular expression flag {unknown[0]!r}: choose from {', '.join(_FLAGS)}")
    combined = re.NOFLAG
    for name in names:
        combined |= _FLAGS[name]
    try:
        compiled = re.compile(pattern, combined)
    except (re.error, ValueError) as error:  # ValueError: incompatible flags inside the pattern
        raise ValueError(f"invalid regular expression {pattern!r}: {error}") from error
    match = compiled.fullmatch if full else compiled.search

    def reward(completions: Sequence[Completion], **kwargs: Any) -> list[float | None]:
        return [float(match(text_of(completion)) is not None) for completion in completions]

    reward.__name__ = "matches"
    return reward


def json_schema(schema: Mapping[str, Any] | str | Path | None = None, *, invalid_reward: float = 0.0) -> Function:
    """Make a reward: 1.0 if the completion is JSON that is valid under the schema.

    The JSON is the complete text, or the only ```json block in it. The reward is 0.0 if there is none, or if it cannot be
    parsed.

    schema: a JSON schema, or the path of a file with one, relative to the working directory. None: the data's column
    `schema`, with one for each row (JSON text or a mapping; None: does not apply). Prefer JSON text: a column of mappings
    gets the keys of all rows when it is stored as a table.
    invalid_reward: for JSON that is invalid under the schema.

    References to other documents are not fetched. `format` is not checked: in the standard it is an annotation.

    Raises ValueError for an invalid schema, FileNotFoundError for a path that does not exist. The reward raises ValueError,
    naming the row, for a row's invalid schema.
    """
    if schema is None:

        @with_check(_check_schema)
        def reward_by_row(completions: Sequence[Completion], schema: Sequence[Any], **kwargs: Any) -> list[float | None]:
            scores: list[float | None] = []
            for row, (completion, of_row) in enumerate(zip(completions, schema, strict=True)):
                text = of_row if isinstance(of_row, str) else json.dumps(of_row, default=str)
                validator = None if of_row is None else _validator(text, f"the schema of row {row}")
                scores.append(validator and _score_json(text_of(completion), validator, invalid_reward))
            return scores

        reward_by_row.__name__ = "json_schema"
        return reward_by_row

    is_file = isinstance(schema, (str, Path))
    name = f"the schema {schema}" if is_file else "the schema"
    text = find_file(schema).read_text() if is_file else json.dumps(schema, default=str)  # YAML has dates
    _validator(text, name)

    def reward(completions: Sequence[Completion], **kwargs: Any) -> list[float | None]:
        validator = _validator(text, name)  # made here, as a validator may not be picklable
        return [_score_json(text_of(completion), validator, invalid_reward) for completion in completions]

    reward.__name__ = "json_schema"
    return reward


def _check_schema(schema: Any, **columns: Any) -> None:
    if schema is not None:
        _validator(schema if isinstance(schema, str) else json.dumps(schema, default=str), "the schema")


@functools.lru_cache(maxsize=256)
def _validator(schema: str, name: str) -> Any:
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for
    from jsonschema_specifications import REGISTRY

    try:
        parsed = json.loads(schema)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(parsed, (dict, bool)):
        raise ValueError(f"{name} must be a mapping, not {parsed!r}")
    kind = validator_for(parsed, default=Draft202012Validator)
    try:
        kind.check_schema(parsed)  # pyright: ignore[reportArgumentType]
    except SchemaError as error:
        raise ValueError(f"{name} is not a valid JSON schema: {error.message} (at {error.json_path})") from error
    # Without a registry, a validator would fetch the target of a $ref from the network.
    return kind(parsed, registry=REGISTRY)


def _score_json(text: str, validator: Any, invalid_reward: float) -> float:
    from referencing.exceptions import Unresolvable

    blocks = _JSON_BLOCK.findall(text)
    if len(blocks) > 1:
        return 0.0
    try:
        value = json.loads(blocks[0] if blocks else text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # RecursionError: thousands of open brackets
        return 0.0
    try:
        return 1.0 if validator.is_valid(value) else invalid_reward
    except (RecursionError, OverflowError):  # deep nesting, or a number such as 1e999, in the completion
        return invalid_reward
    except Unresolvable as error:
        raise ValueError(f"the schema refers to {error.ref!r}, which it does not contain: add it to `$defs`") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")  # Python's parser accepts NaN and Infinity, the standard does not
