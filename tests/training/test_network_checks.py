"""What is given in place of a network, or wrapped, is named with the remedy."""

import pytest
import torch
from torch import nn

from maml_lightning import MAML, SettingError


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (nn.Linear, r"model\.net is the class Linear; give an instance, Linear\(\.\.\.\)\."),
        (torch.relu, r"model\.net is of type builtin_function_or_method; give an instance of a torch\.nn\.Module"),
        ("resnet18", r"model\.net is of type str; give an instance of a torch\.nn\.Module"),
    ],
)
def test_what_is_no_network_is_named(net, said):
    with pytest.raises(SettingError, match=said):
        MAML(net, inner_lr=0.1)


def test_maml_is_no_network():
    maml = MAML(nn.Linear(4, 2), inner_lr=0.1)
    with pytest.raises(SettingError, match=r"model\.net is a MAML already; give the network inside \(maml\.net\)"):
        MAML(maml, inner_lr=0.1)
    assert MAML(maml.net, inner_lr=0.1).net is maml.net
