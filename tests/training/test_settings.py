"""Settings in Python of a wrong kind are named with what they take."""

import pytest
import torch
from torch import nn

from maml_lightning import MAML, SettingError

SGD = torch.optim.SGD


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss": nn.MSELoss}, r"model\.loss is the class MSELoss; give an instance of it, MSELoss\(\)\."),
        ({"loss": "mse"}, r"model\.loss is 'mse', which cannot be called; give a function of \(outputs, targets\)"),
        (
            {"inner_optimizer": SGD},
            r"model\.inner_optimizer must be one of sgd, momentum, adam \(got one of type type\)",
        ),
        (
            {"inner_optimizer": SGD([torch.zeros(1, requires_grad=True)], 0.1)},
            r"model\.inner_optimizer must be one of sgd, momentum, adam \(got one of type SGD\)",
        ),
        ({"inner_optimizer": "SGD"}, r"model\.inner_optimizer must be one of sgd, momentum, adam \(got SGD\)"),
        (
            {"learn_inner_lr": True},
            r"model\.learn_inner_lr must be one of None, network, tensor, step, weight \(got one",
        ),
        ({"non_finite": "ignore"}, r"model\.non_finite must be one of stop, skip \(got ignore\)"),
    ],
)
def test_a_setting_of_another_kind_is_named(settings, said):
    with pytest.raises(SettingError, match=said):
        MAML(nn.Linear(4, 2), **settings)
