"""What the processes of a run ask one another; every process must call these together."""

import warnings

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

# MAML's metrics are reduced before they are logged, see MAML._log: Lightning's advice would reduce them twice.
warnings.filterwarnings("ignore", r"It is recommended to use `self.log\('(train|val|test)/")


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def reduce_logged(trainer: Trainer) -> None:
    """Reduce what was logged with ``sync_dist`` in this epoch, in every process, before they ask one another.

    Lightning reduces such a metric when it is read: one process alone reads it, for its progress bar, and would wait
    for the others in that collective while they wait for it in ours.
    """
    _ = trainer.callback_metrics


def every_process(values: Tensor) -> Tensor:
    """The values of every process, in one collective.

    Args:
        values: ``[n]``, of the same size in every process.

    Returns:
        ``[processes, n]``, the same in every process.
    """
    if not _several():
        return values[None]
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.stack(parts)


def rows_of_every_process(rows: Tensor) -> Tensor:
    """The rows of every process, one after another; their numbers may differ.

    Args:
        rows: ``[n, columns]``.

    Returns:
        ``[sum of n, columns]``, the same in every process.
    """
    return torch.cat(gather_all_tensors(rows)) if _several() else rows
