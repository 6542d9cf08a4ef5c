"""Networks for few-shot learning: those of the MAML paper, and ResNet-12."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_lightning.errors import SettingError
from maml_lightning.task_statistics import TaskNorm

Normalization = Literal["batch", "tasknorm", "group", "layer", "instance"]


class ConvNet(nn.Module):
    """Blocks of 3x3 convolution, normalization and ReLU, a mean over positions, and a linear head.

    The network of Vinyals et al. (2016) as used by Finn et al. (2017, section 5.2). Batch normalization, its default,
    uses the statistics of the current batch, in training and in evaluation: predictions depend on the other examples of
    their set (transductive), unless MAML has query_statistics support. The convolutions have no bias, which the
    normalization would cancel.

    Args:
        in_channels: channels of the images, 1 or more.
        out_features: classes; the command line sets it to the data's ``ways``.
        hidden_channels: filters of each convolution, 1 or more.
        blocks: how many blocks, 1 or more; each halves the image.
        pooling: halve by 2x2 max pooling in each block instead of by a stride of 2 in its convolution.
        pretraining_classes: if above 0, the network classifies among this many classes in training, with a separate
            head, and its other head is initialized with zeros (ordinary pretraining, ``data.pretraining``).
        normalization: batch; tasknorm, a learned blend of the support set's and each example's own statistics; group
            (up to 8 groups), layer or instance, which see one example at a time.

    Example:
        >>> ConvNet(out_features=5)(torch.rand(10, 1, 28, 28)).shape
        torch.Size([10, 5])
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_features: int = 5,
        hidden_channels: int = 64,
        blocks: int = 4,
        pooling: bool = False,
        pretraining_classes: int = 0,
        normalization: Normalization = "batch",
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, out_features=out_features, hidden_channels=hidden_channels, blocks=blocks)
        if normalization not in get_args(Normalization):
            raise SettingError(
                f"model.net.normalization must be one of {', '.join(get_args(Normalization))} (got {normalization})."
            )
        layers: list[nn.Module] = []
        for block in range(blocks):
            channels = hidden_channels if block else in_channels
            stride = 1 if pooling else 2
            layers += [
                nn.Conv2d(channels, hidden_channels, 3, stride=stride, padding=1, bias=False),
                _normalization(normalization, hidden_channels),
                *([nn.MaxPool2d(2)] if pooling else []),  # before ReLU: the same result for a quarter of the work
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.pretraining_head = nn.Linear(hidden_channels, pretraining_classes) if pretraining_classes else None
        self.head = nn.Linear(hidden_channels, out_features)
        if pretraining_classes:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, out_features]`` of images ``[B, C, H, W]``."""
        _check_channels(images, self.body[0])
        features = self.body(images).mean((2, 3))
        return self.pretraining_head(features) if self.training and self.pretraining_head else self.head(features)


def _normalization(kind: Normalization, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels, track_running_stats=False)
    if kind == "tasknorm":
        return TaskNorm(channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    groups = 1 if kind == "layer" else max(number for number in range(1, 9) if channels % number == 0)
    return nn.GroupNorm(groups, channels)


class MLP(nn.Module):
    """A perceptron with ReLU between its layers; by default that of the paper's sinusoids (Finn et al. 2017, 5.1).

    Args:
        in_features: size of an example, flattened.
        out_features: size of the output.
        hidden_features: sizes of the hidden layers.

    Example:
        >>> MLP()(torch.rand(10, 1)).shape
        torch.Size([10, 1])
    """

    def __init__(self, in_features: int = 1, out_features: int = 1, hidden_features: Sequence[int] = (40, 40)) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for size in hidden_features:
            layers += [nn.Linear(in_features, size), nn.ReLU()]
            in_features = size
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(in_features, out_features)

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs ``[B, out_features]`` of inputs ``[B, ...]``."""
        return self.head(self.body(inputs))


class ResNet12(nn.Module):
    """The residual network of few-shot papers: four blocks of three 3x3 convolutions, and a mean over positions.

    As in Lee et al. (2019, section 4.1) after Oreshkin et al. (2018): each convolution is followed by batch
    normalization, with LeakyReLU of slope 0.1; a 1x1 convolution is the shortcut, and each block ends with 2x2 max
    pooling. It normalizes with the statistics of the current batch, as :class:`ConvNet` does.

    Args:
        in_channels: channels of the images, 1 or more.
        out_features: classes; the command line sets it to the data's ``ways``.
        hidden_channels: filters of each block; each block halves the image.
        drop_probability: in training, the share of the last two blocks' outputs that DropBlock (Ghiasi et al. 2018)
            sets to zero, at least 0 and below 1.
        drop_size: side of DropBlock's squares, an odd number.

    Raises:
        SettingError: an argument is out of range.

    Example:
        >>> ResNet12(hidden_channels=(8, 16, 16, 32))(torch.rand(10, 3, 84, 84)).shape
        torch.Size([10, 5])
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_features: int = 5,
        hidden_channels: Sequence[int] = (64, 160, 320, 640),
        drop_probability: float = 0.0,
        drop_size: int = 5,
    ) -> None:
        super().__init__()
        smallest = min(hidden_channels, default=0)
        check_sizes(in_channels=in_channels, out_features=out_features, hidden_channels=smallest, drop_size=drop_size)
        if not 0 <= drop_probability < 1:
            raise SettingError(
                f"model.net.drop_probability must be at least 0 and below 1 (got {drop_probability}); 0 drops nothing."
            )
        if drop_size % 2 == 0:
            raise SettingError(f"model.net.drop_size must be odd (got {drop_size}); take {drop_size + 1}.")
        self.body = nn.Sequential()
        for block, filters in enumerate(hidden_channels):
            self.body.append(_ResidualBlock(in_channels, filters))
            if drop_probability and block >= len(hidden_channels) - 2:
                self.body.append(_DropBlock(drop_probability, drop_size))
            in_channels = filters
        self.head = nn.Linear(in_channels, out_features)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, out_features]`` of images ``[B, C, H, W]``."""
        return self.head(self.body(images).mean((2, 3)))


class _ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(3):
            layers += [*_normalized(in_channels if index == 0 else channels, channels, 3), nn.LeakyReLU(0.1)]
        self.layers = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential(*_normalized(in_channels, channels, 1))
        self.pool = nn.Sequential(nn.MaxPool2d(2), nn.LeakyReLU(0.1))  # in this order, as in ConvNet

    def forward(self, x: Tensor) -> Tensor:
        _check_channels(x, self.layers[0])
        return self.pool(self.layers(x) + self.shortcut(x))


def _normalized(in_channels: int, channels: int, size: int) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(in_channels, channels, size, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, a=0.1, mode="fan_out", nonlinearity="leaky_relu")
    return convolution, nn.BatchNorm2d(channels, track_running_stats=False)


class _DropBlock(nn.Module):
    """Sets squares to zero; the rest is scaled so that the mean stays (Ghiasi et al. 2018, algorithm 1)."""

    def __init__(self, probability: float, size: int) -> None:
        super().__init__()
        self.probability, self.size = probability, size

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        # A square is dropped around each center; borders are padded, so that it may lie outside in part.
        centers = (torch.rand_like(x) < self.probability / self.size**2).to(x.dtype)
        kept = 1 - F.max_pool2d(centers, self.size, stride=1, padding=self.size // 2)
        return x * kept / kept.mean().clamp_min(torch.finfo(x.dtype).tiny)


def check_sizes(**sizes: int) -> None:
    """Check that arguments of a network are at least 1."""
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            what = "data.ways" if name == "out_features" else "it"
            raise SettingError(f"model.net.{name} must be at least 1 (got {value}); raise {what}.")


def _check_channels(inputs: Tensor, first: nn.Module) -> None:
    """Check that images ``[B, C, H, W]`` have as many channels as a network's first layer takes, a convolution."""
    if isinstance(first, nn.Conv2d) and inputs.dim() == 4:  # users may replace it
        channels = inputs.shape[1]
        if channels != first.in_channels:
            raise SettingError(
                f"model.net.in_channels is {first.in_channels}, but the images have {channels} (shape "
                f"{list(inputs.shape)}); give the network in_channels={channels}."
            )
