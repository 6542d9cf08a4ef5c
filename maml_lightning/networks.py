"""Networks for few-shot learning: the convolutional network and the perceptron of the MAML paper."""

from collections.abc import Sequence
from typing import Literal, get_args

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
        for name, value in {
            "in_channels": in_channels,
            "out_features": out_features,
            "hidden_channels": hidden_channels,
            "blocks": blocks,
        }.items():
            if not isinstance(value, int) or value < 1:
                what = "data.ways" if name == "out_features" else "it"
                raise SettingError(f"model.net.{name} must be at least 1 (got {value}); raise {what}.")
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
