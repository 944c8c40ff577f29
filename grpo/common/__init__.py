"""Leaf helpers that know nothing of GRPO."""
