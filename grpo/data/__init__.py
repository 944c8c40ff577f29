"""From a source of rows to tokenized prompts, in the order in which they are trained on."""
