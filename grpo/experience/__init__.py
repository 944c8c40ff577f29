"""From prompts to scored groups with advantages; evaluation."""
