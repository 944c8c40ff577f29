"""Scorers with processes."""

from __future__ import annotations

import pytest
from scored import scorer_of

from rankup.rewards.runner import Scorer


@pytest.fixture
def make_scorer(monkeypatch):
    """A scorer with processes, which end with the test."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # nothing here may hang on it
    made: list[Scorer] = []

    def make(functions, **options) -> Scorer:
        made.append(scorer_of(functions, **{"isolation": "process", "num_workers": 2, "timeout": 30.0, **options}))
        return made[-1]

    yield make
    for scorer in made:
        scorer.close()
