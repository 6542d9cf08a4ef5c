"""Normalization layers use the statistics of the current batch: tasks cannot share running statistics."""

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

_RUNNING_STATISTICS = {
    "running_mean": None,
    "running_var": None,
    "num_batches_tracked": None,
    "track_running_stats": False,
}


def use_batch_statistics(net: nn.Module) -> None:
    """Switch off the running statistics of all normalization layers."""
    tracking = [layer for layer in net.modules() if getattr(layer, "running_mean", None) is not None]
    if tracking:
        rank_zero_info(
            "Running statistics of normalization layers are off: MAML uses the normalization statistics of the "
            "current batch."
        )
    for layer in tracking:  # torch.func.replace_all_batch_norm_modules_ would leave instance normalization as it is
        for name, value in _RUNNING_STATISTICS.items():
            setattr(layer, name, value)
