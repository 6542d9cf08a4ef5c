"""Which calls pay for a graph: of states that networks were in lately, and of shapes that come often."""

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable

import torch

MAX_STATES, WINDOW = 8, 16  # of the last 16 meta-steps, at most 8 in a new state: others run untraced
# Recording a small transformer takes as long as some 15 of its meta-steps without a graph, and on a GPU, where graphs
# save most, as some 5. With so many meta-steps for each recording, a run of many sequence lengths is never more than a
# few percent slower than a loop (issue 23).
PATIENCE, PATIENCE_ON_GPU = 32, 8
MAX_SIGNATURES = 4096  # so many are counted


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


class Signatures:
    """The signatures of the arguments in one family of calls, and which of them pay for a graph.

    Those of the first meta-step do at once, so that a resumed run computes as one without a break. Another one does
    after PATIENCE meta-steps for each that did before: ever new lengths never pay for recordings.
    """

    def __init__(self) -> None:
        self._first: int | None = None
        self._paying: set[Hashable] = set()
        self._counts: dict[Hashable, tuple[int, int]] = {}  # meta-steps before the last one, and that one

    def pays(self, signature: Hashable, time: int, device: torch.device) -> bool:
        """Whether calls with this signature are to have a graph.

        Args:
            signature: of the arguments.
            time: of the meta-step.
            device: where it runs.
        """
        self._first = time if self._first is None else self._first
        count, last = self._counts.get(signature, (-1, -1))
        count += last != time
        patience = PATIENCE if device.type == "cpu" else PATIENCE_ON_GPU
        if signature in self._paying or time == self._first or count > patience * len(self._paying):
            self._paying.add(signature)
            return True
        if signature in self._counts or len(self._counts) < MAX_SIGNATURES:
            self._counts[signature] = count, time
        return False
