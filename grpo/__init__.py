"""The GRPO trainer: configuration, data, losses, the training loop and the command line; imports every other layer."""
