"""Imported by every Python process of the null device (see ../run.sh), before anything else."""

import after_import


def _install() -> None:
    import torch_operators

    torch_operators.install()


after_import.run("torch", _install)
