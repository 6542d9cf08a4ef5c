"""What is said of a loss that does not take a network's outputs."""

import pytest
import torch
from torch.nn import functional as F

from maml_lightning import SettingError
from maml_lightning.training.loss_checks import check_loss

PIXELS = torch.arange(3).repeat(2, 4, 1)  # [2, 4, 3]


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5, 5), (2, 1)])
def test_a_network_without_an_output_for_each_pixel_is_named(shape: tuple[int, ...]):
    with pytest.raises(SettingError, match=r"it takes outputs \[2, 3, 4, 3\] for these targets: give a network with"):
        check_loss(F.cross_entropy, torch.zeros(shape), PIXELS)


def test_another_loss_is_named_where_no_outputs_would_do():
    with pytest.raises(SettingError, match=r"give another, such as cross_entropy for classes, mse_loss for numbers"):
        check_loss(F.nll_loss, torch.zeros(2, 3), torch.ones(2, 4, dtype=torch.bool))
    check_loss(F.cross_entropy, torch.zeros(2, 3, 4, 3), PIXELS)
