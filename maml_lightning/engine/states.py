"""The states that networks were in lately: their graphs are kept, those of states long ago are not."""

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable

MAX_STATES, WINDOW = 8, 16  # of the last 16 meta-steps, at most 8 in a new state: others run untraced


class States:
    """Numbers of states, from 1, for those that pay for a graph.

    Args:
        forget: called with the number of a state that others have taken the place of.
    """

    def __init__(self, forget: Callable[[int], object]) -> None:
        self._numbers: OrderedDict[Hashable, int | None] = OrderedDict()  # the latest last
        self._new: deque[bool] = deque(maxlen=WINDOW)
        self._forget, self._counter = forget, itertools.count(1)

    def number(self, key: Hashable) -> int | None:
        """The number of the state that a meta-step begins in; None while states change faster than they are used.

        Args:
            key: the fingerprint of the state.
        """
        # The known one, where there is one: comparisons end at its identity from here on.
        key = next((known for known in reversed(self._numbers) if known == key), key)
        self._new.append(key not in self._numbers)
        if self._numbers.setdefault(key, None) is None and sum(self._new) <= MAX_STATES:
            self._numbers[key] = next(self._counter)
        self._numbers.move_to_end(key)
        if len(self._numbers) > MAX_STATES:
            _, oldest = self._numbers.popitem(last=False)
            if oldest is not None:
                self._forget(oldest)
        return self._numbers[key]
