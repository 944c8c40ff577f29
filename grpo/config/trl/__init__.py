"""TRL's names of options: what each does here. Imports neither trl nor transformers nor torch; see `fields.py`."""
