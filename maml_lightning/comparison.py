"""``python -m maml_lightning.comparison RUN [RUN …]`` draws runs into one picture and prints a table of them."""

from maml_lightning.analysis.comparison import main

if __name__ == "__main__":
    main()
