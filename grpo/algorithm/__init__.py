"""From rewards to advantages to losses: pure functions."""
