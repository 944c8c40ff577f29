"""What a run takes of a device's memory, before it starts: counted, measured on fake tensors, and divided with vLLM."""
