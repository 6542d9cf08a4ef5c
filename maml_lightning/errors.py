"""The exceptions that the command line shows without a traceback."""


class SettingError(ValueError):
    """A setting or an input that cannot be used; the message names it, its value and the remedy, in one line."""


class NonFiniteError(ArithmeticError):
    """A loss, a gradient or an output is not finite; the message says where."""
