"""A conversation in a file: messages of each side, and how each answer was sampled.

    save(session, Path("chat.json"))        # a list with an object for each side
    save(session, Path("chat.jsonl"))       # the same objects, one on each line
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...common.files import atomic_write
from .adapters import BASE
from .session import SIDES, ChatSession, Exchange, Side


def save(session: ChatSession, file: Path) -> None:
    """Write the conversation of each side.

    Raises:
        ValueError: the file's suffix is another one, or it cannot be written.
    """
    records = as_records(session)
    if file.suffix == ".json":
        text = json.dumps(records, ensure_ascii=False, indent=1) + "\n"
    elif file.suffix == ".jsonl":
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    else:
        raise ValueError(f"{file}: give a file that ends in .json or .jsonl")
    try:
        atomic_write(file, text.encode())
    except OSError as error:
        raise ValueError(f"{file} cannot be written: {error.strerror or error}") from error


def as_records(session: ChatSession) -> list[dict[str, Any]]:
    """The conversation of each side as JSON data: messages, and how each answer was sampled."""
    records = []
    for side in SIDES:
        exchanges = [exchange for exchange in session.exchanges if side in exchange.answers]
        if not exchanges and side not in session.shown:
            continue
        records.append(
            {
                "side": side,
                "name": session.target.name,
                "model": session.target.config.model.name,
                "messages": session.history(side),
                "answers": [_record_of(side, exchange) for exchange in exchanges],
            }
        )
    return records


def _record_of(side: Side, exchange: Exchange) -> dict[str, Any]:
    answer, settings = exchange.answers[side], exchange.settings
    return {
        "checkpoint": BASE if side == "base" else exchange.checkpoint,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "seed": settings.seed,
        "finish_reason": answer.finish_reason,
        "num_tokens": answer.num_tokens,
    }
