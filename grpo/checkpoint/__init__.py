"""What a run can be resumed from."""
