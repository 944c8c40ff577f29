"""The policy: a frozen base model, its adapter, and the packs that it is trained on."""
