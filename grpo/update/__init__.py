"""From groups to gradients to an optimizer step."""
