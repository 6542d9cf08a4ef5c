from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from maml_lightning import MAML, MLP, ConvNet, ConvNet1d, Episode, GRUNet, ResNet12, SettingError, TextNet
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


@pytest.mark.parametrize("net", [ConvNet(), ResNet12(1, hidden_channels=(4, 4))])
def test_color_for_a_network_of_one_channel_is_refused_by_the_setting(net):
    support, targets = torch.rand(5, 3, 28, 28), torch.arange(5)
    with pytest.raises(SettingError, match=r"^model.net.in_channels is 1, but the images have 3 .* give "):
        MAML(net, inner_steps=1).adapt(support, targets)


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


NEW = {
    "ResNet12": (lambda **options: ResNet12(**{"hidden_channels": (8, 8, 16, 16), **options}), (3, 32, 32)),
    "GRUNet": (GRUNet, (7, 1)),
    "GRUNet, two layers": (partial(GRUNet, in_features=3, layers=2, bidirectional=True), (7, 3)),
    "ConvNet1d": (ConvNet1d, (17, 1)),
    "TextNet": (partial(TextNet, vocabulary_size=20), (9,)),
    "TextNet, blocks": (partial(TextNet, vocabulary_size=20, blocks=2), (9,)),
}


def batch(name: str, count: int = 6) -> torch.Tensor:
    shape = NEW[name][1]
    return torch.randint(20, (count, *shape)) if "Text" in name else torch.rand(count, *shape)


@pytest.mark.parametrize("name", NEW)
def test_outputs_have_the_asked_size_whatever_the_batch(name):
    net = NEW[name][0](out_features=4)
    assert net(batch(name)).shape == (6, 4)
    assert net(batch(name, 1)).shape == (1, 4)
    assert all(value.isfinite().all() for value in (net(batch(name)), *net.parameters()))


@pytest.mark.parametrize("name", NEW)
def test_a_size_of_zero_is_refused(name):
    with pytest.raises(SettingError, match=r"model.net.out_features must be at least 1 \(got 0\); raise data.ways"):
        NEW[name][0](out_features=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet12(drop_probability=1.0), r"drop_probability must be at least 0 and below 1 \(got 1.0\)"),
        (lambda: ResNet12(drop_size=4), r"drop_size must be odd \(got 4\); take 5"),
        (lambda: ResNet12(hidden_channels=()), r"hidden_channels must be at least 1"),
        (lambda: ConvNet1d(kernel_size=4), r"kernel_size must be odd \(got 4\); take 5"),
        (lambda: GRUNet(layers=0), r"layers must be at least 1 \(got 0\)"),
        (lambda: TextNet(blocks=-1), r"blocks must be at least 0 \(got -1\)"),
        (lambda: TextNet(hidden_features=6), r"hidden_features must be a multiple of model.net.heads 4 \(got 6\)"),
        (lambda: TextNet(blocks=1, max_length=4)(torch.ones(1, 5).long()), r"max_length is 4, but .* 5 tokens"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(SettingError, match=message):
        make()


def test_resnet12_has_the_papers_size():
    net = ResNet12(out_features=64)
    channels = [3, 64, 160, 320, 640]
    expected = sum(9 * a * b + 2 * 9 * b * b + a * b + 4 * 2 * b for a, b in pairwise(channels))
    assert sum(value.numel() for value in net.parameters()) == expected + 640 * 64 + 64
    assert 12.4e6 < expected < 12.5e6  # "12.4 million parameters", as papers say of it
    assert net.body(torch.rand(1, 3, 84, 84)).shape == (1, 640, 5, 5)


def test_drop_block_drops_its_share_in_squares_and_keeps_the_mean():
    net = ResNet12(hidden_channels=(4, 4, 4), drop_probability=0.2, drop_size=3)
    drops = [layer for layer in net.body if type(layer).__name__ == "_DropBlock"]
    assert [type(layer).__name__ for layer in net.body[-3:]] == ["_DropBlock", "_ResidualBlock", "_DropBlock"]
    x = torch.ones(50, 4, 20, 20)
    dropped = drops[0](x)
    share = (dropped == 0).double().mean().item()
    assert 0.14 < share < 0.22  # squares overlap
    assert dropped.mean().item() == pytest.approx(1, rel=1e-5)
    zero = (dropped == 0).double()
    inside = torch.nn.functional.avg_pool2d(zero, 3, stride=1)  # squares of 3x3 that are dropped as a whole
    assert (inside == 1).any()
    assert torch.equal(drops[0].eval()(x), x)


def test_padding_does_not_count():
    net = TextNet(vocabulary_size=20, blocks=2).eval()
    tokens = torch.randint(1, 20, (4, 6))
    padded = torch.cat([tokens, torch.zeros(4, 3, dtype=torch.long)], 1)
    assert torch.allclose(net(tokens), net(padded), atol=1e-5)
    assert not torch.allclose(net(tokens), net(torch.cat([tokens, tokens[:, :3]], 1)), atol=1e-3)
    assert net(torch.zeros(2, 6, dtype=torch.long)).isfinite().all()
    everything = TextNet(vocabulary_size=20, padding_token=None)
    assert not torch.allclose(everything(tokens), everything(padded), atol=1e-3)


def test_the_order_of_tokens_counts_with_blocks_alone():
    tokens = torch.randint(1, 20, (4, 6))
    for blocks, same in ((0, True), (1, False)):
        net = TextNet(vocabulary_size=20, blocks=blocks)
        assert torch.allclose(net(tokens), net(tokens.flip(1)), atol=1e-5) == same
