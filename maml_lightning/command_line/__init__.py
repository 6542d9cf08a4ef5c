"""The command line: its parser, its help, the shipped configs, and errors in one line."""
