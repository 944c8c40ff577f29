"""Completions from vLLM in the same process, and the adapter slots it shares with the trainer; imports only kernels."""
