import pytest
import torch

from maml_lightning import MLP, ConvNet, Episode, SettingError


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
