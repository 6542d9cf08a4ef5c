"""The one exception that the command line shows without a traceback."""


class SettingError(ValueError):
    """A setting or an input that cannot be used; the message names it, its value and the remedy, in one line."""
