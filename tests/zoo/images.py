"""Networks of images: convolutions, activations, pooling, normalization, and the blocks built of them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from maml_lightning import ConvNet, ResNet12
from tests.zoo.case import CLASSES, NOT_TWICE, Case, classifier


def conv(channels: int = 2, filters: int = 4, kernel: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(channels, filters, kernel, **{"padding": kernel // 2, **options})


class ViewFlatten(nn.Module):
    """``x.view(x.size(0), -1)`` after some layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)
        with torch.no_grad():
            self.head = nn.Linear(self.body(torch.rand(4, 2, 8, 8)).numel() // 4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(x.view(x.size(0), -1))


class StandardizedConv(nn.Conv2d):
    """Weight standardization with ``weight.view``."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.view(self.out_channels, -1)
        weight = (self.weight - rows.mean(1).view(-1, 1, 1, 1)) / (rows.std(1).view(-1, 1, 1, 1) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class PositionMap(nn.Module):
    """A four-dimensional position embedding, read as a sequence by ``view``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 4, 2, stride=2), nn.Linear(4, CLASSES)
        self.position = nn.Parameter(torch.randn(1, 4, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.position
        rows = x.flatten(2).transpose(1, 2) + self.position.view(1, 4, -1).transpose(1, 2)
        return self.head(rows.tanh().mean(1))


class FractionalPool(nn.Module):
    """Fractional max pooling at fixed places."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = conv(), nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        samples = x.new_full((len(x), 4, 2), 0.3)
        return self.head(F.fractional_max_pool2d(self.body(x), 2, output_size=3, _random_samples=samples).flatten(1))


class Residual(nn.Module):
    """A ResNet block with batch normalization, an in-place ReLU and a projected shortcut."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.a, self.b = conv(channels, filters, bias=False), conv(filters, filters, bias=False)
        self.norm_a, self.norm_b = nn.BatchNorm2d(filters), nn.BatchNorm2d(filters)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, filters, 1, bias=False), nn.BatchNorm2d(filters))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm_b(self.b(self.relu(self.norm_a(self.a(x)))))
        out += self.shortcut(x)
        return self.relu(out)


class Dense(nn.Module):
    """A DenseNet block; memory-efficient, it recomputes its layers by ``torch.utils.checkpoint``."""

    def __init__(self, efficient: bool = False) -> None:
        super().__init__()
        self.efficient = efficient
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(2 + 3 * i), nn.ReLU(), conv(2 + 3 * i, 3)) for i in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:

            def run(*parts: Tensor, layer: nn.Module = layer) -> Tensor:
                return layer(torch.cat(parts, 1))

            features.append(checkpoint(run, *features, use_reentrant=False) if self.efficient else run(*features))
        return torch.cat(features, 1)


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1), nn.Hardsigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class UNet(nn.Module):
    """Down, up by a transposed convolution, and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(conv(), nn.GroupNorm(2, 4), nn.ReLU())
        self.deep = nn.Sequential(nn.MaxPool2d(2), conv(4, 6), nn.ReLU())
        self.up, self.out = nn.ConvTranspose2d(6, 4, 2, stride=2), conv(8, CLASSES, 1, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        up = F.interpolate(self.up(self.deep(skip)), scale_factor=1.0, mode="nearest")
        return self.out(torch.cat([skip, up], 1)).mean((2, 3))


class Upsampled(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.a, self.b, self.mode = conv(), conv(4, CLASSES), mode

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(self.a(x), size=(11, 11), mode=self.mode)
        return self.b(x.tanh()).mean((2, 3))


class ManualNorm(nn.Module):
    """Normalization with running statistics of its own, which the outputs in training do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running", torch.zeros(4))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3))
        with torch.no_grad():
            self.running.mul_(0.9).add_(mean, alpha=0.1)
            self.seen += 1
        return x - mean[:, None, None]


def layer_case(name: str, *layers: Callable[[], nn.Module], flatten: Callable = ViewFlatten, **options: Any) -> Case:
    return Case(name, lambda: flatten(*(layer() for layer in layers)), **options)


class Frozen(nn.Module):
    """A backbone in evaluation mode with frozen weights, below layers that train."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4), nn.BatchNorm2d(4))
        with torch.no_grad():
            for _ in range(3):
                self.backbone(torch.randn(8, 2, 8, 8) * 2 + 1)
        self.backbone.requires_grad_(False)
        self.head = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, CLASSES))

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def warmed(net: nn.Module) -> nn.Module:
    """The network after it has gathered running statistics."""
    with torch.no_grad():
        for _ in range(20):
            net(torch.randn(8, 2, 8, 8) * 2 + 1)
    return net


def frozen_batch_norm() -> nn.Module:
    from torchvision.ops.misc import FrozenBatchNorm2d

    norm = FrozenBatchNorm2d(4)
    norm.running_mean += 0.3
    norm.running_var *= 2
    return ViewFlatten(conv(), norm, nn.ReLU())


ACTIVATIONS = [
    nn.ELU, nn.SELU, nn.CELU, nn.Hardswish, nn.Softplus, nn.LogSigmoid, nn.GELU, nn.Mish, nn.Hardsigmoid, nn.SiLU,
    nn.PReLU, nn.GLU, nn.Hardtanh, nn.Softsign, nn.ReLU6, nn.LeakyReLU, nn.Tanhshrink, nn.Softshrink,
]  # fmt: skip
# What the ordinary suite runs; the long one runs all.
FEW = {nn.ELU, nn.Softplus, nn.Hardsigmoid}
QUICK = {
    "MaxPool2d(2, dilation=2)", "AvgPool2d(2)", "AdaptiveMaxPool2d(3)", "LPPool2d(2, 2)", "BatchNorm2d", "GroupNorm",
    "LayerNorm", "InstanceNorm2d(track)", "LocalResponseNorm", "depthwise-separable", "transposed",
    "weight standardization",
}  # fmt: skip
POOLS: dict[str, Callable[[], nn.Module]] = {
    "MaxPool2d(2)": lambda: nn.MaxPool2d(2),
    "MaxPool2d(3, stride=2, padding=1)": lambda: nn.MaxPool2d(3, 2, 1),
    "MaxPool2d(2, dilation=2)": lambda: nn.MaxPool2d(2, dilation=2),
    "MaxPool2d(2, ceil_mode)": lambda: nn.MaxPool2d(3, 2, ceil_mode=True),
    "AvgPool2d(2)": lambda: nn.AvgPool2d(2),
    "AdaptiveAvgPool2d(3)": lambda: nn.AdaptiveAvgPool2d(3),
    "AdaptiveMaxPool2d(3)": lambda: nn.AdaptiveMaxPool2d(3),
    "LPPool2d(2, 2)": lambda: nn.Sequential(nn.Softplus(), nn.LPPool2d(2, 2)),
}
NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "BatchNorm2d(momentum=None)": lambda: nn.BatchNorm2d(4, momentum=None),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "LayerNorm": lambda: nn.LayerNorm([4, 8, 8]),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, affine=True),
    "InstanceNorm2d(track)": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(2),
    "RMSNorm": lambda: nn.RMSNorm([4, 8, 8]),
}
CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "grouped": lambda: conv(2, 4, groups=2),
    "depthwise-separable": lambda: nn.Sequential(conv(2, 4, groups=2, bias=False), nn.Conv2d(4, 4, 1)),
    "dilated": lambda: conv(2, 4, dilation=2),
    "strided 5x5": lambda: nn.Conv2d(2, 4, 5, stride=2, padding=2, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1),
    "circular padding": lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
    "PixelShuffle": lambda: nn.Sequential(conv(2, 8), nn.PixelShuffle(2)),
    "weight standardization": lambda: StandardizedConv(2, 4, 3, padding=1),
    "Unfold": lambda: nn.Unfold(3, stride=2),
}

CASES = [
    layer_case("conv, view", conv),
    layer_case("conv, BatchNorm2d, view", conv, lambda: nn.BatchNorm2d(4)),
    layer_case("conv, BatchNorm2d, ReLU, MaxPool2d, view", conv, lambda: nn.BatchNorm2d(4), nn.ReLU,
               lambda: nn.MaxPool2d(2)),
    *(
        layer_case(f"conv, {kind.__name__}, {end}", conv, kind, *pool, flatten=flatten,
                   quick=kind in FEW and end == "Flatten", refusal=NOT_TWICE if kind is nn.Hardsigmoid else "")
        for kind in ACTIVATIONS
        for end, flatten, pool in (("Flatten", classifier, ()), ("pool, view", ViewFlatten, (lambda: nn.MaxPool2d(2),)))
    ),
    *(layer_case(f"conv, {name}", conv, pool, quick=name in QUICK) for name, pool in POOLS.items()),
    *(layer_case(f"conv, {name}, Tanh", conv, norm, nn.Tanh, quick=name in QUICK)
      for name, norm in NORMS.items()),
    *(layer_case(f"{name} convolution, Tanh", make, nn.Tanh, quick=name in QUICK)
      for name, make in CONVOLUTIONS.items()),
    Case("channels last convolution, Tanh",
         lambda: classifier(conv().to(memory_format=torch.channels_last), nn.Tanh()), quick=False),
    Case("BatchNorm2d(track_running_stats=False)", lambda: classifier(
        conv(), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()), quick=False),
    Case("BatchNorm2d in evaluation mode", lambda: warmed(ViewFlatten(conv(), nn.BatchNorm2d(4), nn.ReLU())),
         evaluation=True),
    Case("frozen pretrained backbone", Frozen),
    Case("FrozenBatchNorm2d", frozen_batch_norm),
    Case("position embedding of 4 dimensions", PositionMap),
    Case("FractionalMaxPool2d", FractionalPool, quick=False),
    Case("Conv1d", lambda: classifier(nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(2),
                                      shape=(4, 8)), shape=(4, 8)),
    Case("Conv3d", lambda: classifier(nn.Conv3d(1, 3, 3, padding=1), nn.BatchNorm3d(3), nn.ReLU(), nn.MaxPool3d(2),
                                      shape=(1, 4, 4, 4)), shape=(1, 4, 4, 4), quick=False),
    Case("ResNet12", lambda: ResNet12(2, CLASSES, (4,))),
    Case("ConvNet", lambda: ConvNet(2, CLASSES, 4, 2), quick=False),
    Case("ConvNet with pooling", lambda: ConvNet(2, CLASSES, 4, 2, pooling=True), quick=False),
    Case("ResNet block", lambda: classifier(Residual(2, 4), nn.AdaptiveAvgPool2d(1)), quick=False),
    Case("DenseNet block", lambda: classifier(Dense()), quick=False),
    Case("memory-efficient DenseNet block", lambda: classifier(Dense(efficient=True)),
         plain=lambda: classifier(Dense())),
    Case("squeeze-excite", lambda: classifier(conv(), nn.Hardswish(), SqueezeExcite()), refusal=NOT_TWICE, quick=False),
    Case("U-Net", UNet),
    Case("bilinear upsampling", lambda: Upsampled("bilinear")),
    Case("nearest upsampling", lambda: Upsampled("nearest"), quick=False),
    Case("own running buffers", lambda: classifier(conv(), ManualNorm(), nn.Tanh())),
    Case("weight_norm", lambda: ViewFlatten(parametrizations.weight_norm(conv()), nn.ReLU())),
    Case("spectral_norm", lambda: warmed(ViewFlatten(parametrizations.spectral_norm(conv()), nn.ReLU())),
         stateful=True),
    Case("spectral_norm in evaluation mode",
         lambda: warmed(ViewFlatten(parametrizations.spectral_norm(conv()), nn.ReLU())), evaluation=True, quick=False),
    Case("old weight_norm", lambda: ViewFlatten(weight_norm(conv()), nn.ReLU())),
    Case("old spectral_norm", lambda: warmed(ViewFlatten(spectral_norm(conv()), nn.ReLU())), stateful=True),
]  # fmt: skip
