"""`rankup trl`: runs a script written for TRL with rankup's `GRPOConfig` and `GRPOTrainer` in the place of TRL's."""
