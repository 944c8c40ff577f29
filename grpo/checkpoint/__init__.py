"""Checkpoints: the state to resume a run from."""
