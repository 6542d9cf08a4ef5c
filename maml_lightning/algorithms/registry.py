"""The algorithms by the names of ``--model.algorithm``. A new one is a file beside this one and a line here."""

from maml_lightning.algorithms import implicit, reptile, unrolled
from maml_lightning.algorithms.algorithm import Algorithm
from maml_lightning.errors import SettingError

ALGORITHMS: dict[str, Algorithm] = {
    "maml": unrolled.ALGORITHM,
    "imaml": implicit.ALGORITHM,
    "reptile": reptile.ALGORITHM,
}


def find_algorithm(name: str) -> Algorithm:
    """The algorithm of that name.

    Raises:
        SettingError: there is none; lists those that there are.
    """
    if name not in ALGORITHMS:
        raise SettingError(f"model.algorithm must be one of {', '.join(ALGORITHMS)} (got {name}).")
    return ALGORITHMS[name]
