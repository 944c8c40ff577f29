"""A run that was interrupted and resumed is, to the bit, the run that was not: real vLLM, a tiny model, in one process."""

import pytest
from tiny_runs import metrics_of, timeless

pytestmark = [pytest.mark.engine, pytest.mark.slow]
