"""Results that ``functools.cache`` and ``lru_cache`` keep: tensors of a trial, trace or vmap must not be among them."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch.utils import _pytree as pytree

from maml_lightning.engine.variables import PLAIN


def emptied(kept: Any, function: Callable) -> Any:
    """An empty cache like ``kept``, which notes in an attribute whether it keeps more than plain values.

    Args:
        kept: a cache.
        function: that it calls.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        empty.keeps_tensors |= any(type(leaf) not in PLAIN for leaf in pytree.tree_leaves(result))
        return result

    empty: Any = lru_cache(**kept.cache_parameters())(call)
    empty.keeps_tensors = False
    return empty
