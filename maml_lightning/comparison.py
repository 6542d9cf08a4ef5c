"""``python -m maml_lightning.comparison RUN [RUN …]`` draws runs into one picture and prints a table of them."""

import sys

from maml_lightning.analysis.comparison import main
from maml_lightning.errors import SettingError

if __name__ == "__main__":
    try:
        main()
    except (SettingError, OSError) as error:
        sys.exit(f"error: {error}")
