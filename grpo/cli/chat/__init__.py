"""The command `rankup chat`."""
