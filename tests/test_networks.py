import pytest
import torch
from torch import nn

from maml_lightning import MLP, ConvNet, Episode, SettingError
from maml_lightning.task_statistics import TaskNorm


def test_paper_networks_have_the_papers_sizes():
    # 64 filters: 9*64 + 3*9*64*64 convolution weights, 4*2*64 of the normalisation, and the head
    expected = 9 * 64 + 3 * 9 * 64 * 64 + 4 * 2 * 64 + 64 * 5 + 5
    for pooling in (False, True):
        net = ConvNet(pooling=pooling)
        assert sum(value.numel() for value in net.parameters()) == expected
        assert net.body(torch.rand(2, 1, 28, 28)).shape[1:] == ((64, 1, 1) if pooling else (64, 2, 2))
    assert [tuple(value.shape) for value in MLP().parameters()] == [(40, 1), (40,), (40, 40), (40,), (1, 40), (1,)]


@pytest.mark.parametrize("name", ["in_channels", "out_features", "hidden_channels", "blocks"])
def test_empty_networks_are_refused(name):
    with pytest.raises(SettingError, match=rf"model.net.{name} must be at least 1 \(got 0\)"):
        ConvNet(**{name: 0})


def test_episodes_check_their_shapes():
    x, y = torch.rand(2, 5, 1), torch.zeros(2, 5)
    assert Episode(x, y, x, y).check().tasks == 2
    with pytest.raises(SettingError, match=r"share the task dimension"):
        Episode(x, y, x[:1], y[:1]).check()
    with pytest.raises(SettingError, match=r"one target per query input"):
        Episode(x, y, x, y[:, :4]).check()


@pytest.mark.parametrize(
    ("normalization", "kind"),
    [
        ("batch", nn.BatchNorm2d),
        ("tasknorm", TaskNorm),
        ("group", nn.GroupNorm),
        ("layer", nn.GroupNorm),
        ("instance", nn.InstanceNorm2d),
    ],
)
def test_normalizations_of_the_convolutional_network(normalization, kind):
    net = ConvNet(hidden_channels=12, blocks=2, normalization=normalization)
    layers = [layer for layer in net.modules() if isinstance(layer, kind)]
    assert len(layers) == 2
    assert all(layer.weight.shape == (12,) for layer in layers)
    x = torch.randn(4, 1, 28, 28)
    alone = torch.allclose(net(x)[:1], net(x[:1]), atol=1e-5)
    assert alone == (normalization not in ("batch", "tasknorm"))
    if kind is nn.GroupNorm:
        assert [layer.num_groups for layer in layers] == [6 if normalization == "group" else 1] * 2


def test_another_normalization_is_refused():
    with pytest.raises(SettingError, match=r"normalization must be one of batch, tasknorm, .* \(got none\)"):
        ConvNet(normalization="none")
