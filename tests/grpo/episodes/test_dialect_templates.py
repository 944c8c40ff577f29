"""The table of docs/episodes.md: what a run can do with each chat template, tried with it."""

from pathlib import Path
from typing import Any

import pytest
from dialects import FAMILIES, OWN, SCHEMAS, dialect_tokenizer, template_of
from trl.chat_template_utils import add_response_schema

from rankup.grpo.config import DataConfig
from rankup.grpo.episodes.dialect import Dialect

PAGE = Path(__file__).parents[3] / "docs" / "episodes.md"
ENDS = {
    "glm4moe": ["<|user|>", "<|observation|>"],
    "gptoss": ["<|call|>", "<|return|>"],
    "gemma4": ["<turn|>", "<|tool_response>"],
}
"""What ends a turn by the model's generation configuration where the template alone does not tell."""

NO_PARSER = "no parser reads the calls that the chat template writes"


def dialect(tokenizer: Any, ends: list[int], **options: Any) -> Dialect | str:
    """The dialect, or the sentence with which it is refused."""
    settings = {"schemas": SCHEMAS, "responds": False, "tool_parser": None, **options}
    try:
        return Dialect(tokenizer, DataConfig(), eos_token_ids=ends, **settings)
    except ValueError as error:
        return str(error)


def row(name: str) -> str:
    """The row of the table for a template."""
    tokenizer = dialect_tokenizer(template_of(name))
    tokens = next((tokens for begin, tokens in ENDS.items() if name.startswith(begin)), [])
    ends = [id for id in tokenizer.convert_tokens_to_ids(tokens) if id is not None]
    turns = dialect(tokenizer, ends, schemas=[], responds=True)
    tools = _tools(dialect(tokenizer, ends))
    try:
        add_response_schema(tokenizer)
        with_response_template = _tools(dialect(tokenizer, ends))
    except ValueError:
        with_response_template = "TRL has none"
    return f"| `{name}` | {tools} | {with_response_template} | {f'refused: {turns}' if isinstance(turns, str) else 'yes'} |"


def _tools(made: Dialect | str) -> str:
    if isinstance(made, str):
        return f"refused: {NO_PARSER}" if made.startswith(NO_PARSER) else f"refused: {made}"
    return f"{'native' if made.is_native else 'Hermes'}, `{made.parser_name}`"


def table() -> list[str]:
    page = PAGE.read_text(encoding="utf-8").partition("## Chat templates\n")[2].partition("\n## ")[0]
    return [line for line in page.splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("name", [*FAMILIES, *OWN])
def test_the_table_says_what_a_template_can_do(name: str):
    assert row(name) in table()


def test_the_table_has_each_template_once():
    assert [line.split("`")[1] for line in table()] == [*FAMILIES, *OWN]
