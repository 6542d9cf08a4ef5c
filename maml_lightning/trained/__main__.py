"""``python -m maml_lightning.trained SOURCE TARGET`` writes a checkpoint without what only training needs."""

import sys

from jsonargparse import auto_cli

from maml_lightning.errors import SettingError
from maml_lightning.trained import strip

if __name__ == "__main__":
    try:
        auto_cli(strip)
    except SettingError as error:
        sys.exit(f"error: {error}")
