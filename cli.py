"""``python cli.py …`` from a checkout is ``maml-lightning …``."""

from maml_lightning.cli import console, main

__all__ = ["main"]

if __name__ == "__main__":
    console()
