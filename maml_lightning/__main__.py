"""``python -m maml_lightning …`` is ``maml-lightning …``."""

from maml_lightning.cli import console

if __name__ == "__main__":
    console()
