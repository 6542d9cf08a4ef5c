"""Small members of the families of torchvision, timm, transformers and torch_geometric, as their constructors allow."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.case import CLASSES, NOT_TWICE, TOKENS, VECTOR, Case
from tests.zoo.sequences import VOCABULARY

PICTURE = (3, 32, 32)
CALM: dict[str, Any] = {"noise": 0.01, "lr": 0.005}  # deep networks far from their initialization have huge gradients


def _resnet(bottleneck: bool) -> nn.Module:
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    return ResNet(
        Bottleneck if bottleneck else BasicBlock, [1, 1, 1, 1], CLASSES, width_per_group=8 if bottleneck else 64
    )


def _mobilenet_v2() -> nn.Module:
    from torchvision.models import MobileNetV2

    blocks = [[1, 8, 1, 1], [6, 8, 2, 2], [6, 16, 1, 2]]
    return MobileNetV2(CLASSES, width_mult=0.25, inverted_residual_setting=blocks, dropout=0.0)


def _mobilenet_v3() -> nn.Module:
    from torchvision.models import mobilenet_v3_small

    return mobilenet_v3_small(num_classes=CLASSES, width_mult=0.25, dropout=0.0)


def _efficientnet() -> nn.Module:
    from torchvision.models import EfficientNet
    from torchvision.models.efficientnet import MBConvConfig

    config = partial(MBConvConfig, width_mult=0.25, depth_mult=1.0)
    blocks = [config(1, 3, 1, 32, 16, 1), config(6, 3, 2, 16, 24, 2), config(6, 5, 2, 24, 40, 1)]
    return EfficientNet(blocks, dropout=0.0, stochastic_depth_prob=0.0, num_classes=CLASSES, last_channel=32)


def _densenet(efficient: bool = False) -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(4, (2, 2), 8, num_classes=CLASSES, memory_efficient=efficient)


def _convnext() -> nn.Module:
    from torchvision.models import ConvNeXt
    from torchvision.models.convnext import CNBlockConfig

    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], 0.0, num_classes=CLASSES)


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    net = VisionTransformer(32, 16, 2, 2, 8, 16, num_classes=CLASSES)
    nn.init.normal_(net.heads.head.weight, std=0.1)
    return net


def _swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4], stochastic_depth_prob=0.0, num_classes=CLASSES)


def _shufflenet() -> nn.Module:
    from torchvision.models import ShuffleNetV2

    return ShuffleNetV2([2, 2, 2], [8, 16, 24, 32, 32], CLASSES)


def _squeezenet() -> nn.Module:
    from torchvision.models import SqueezeNet

    net = SqueezeNet("1_1", CLASSES, dropout=0.0)
    nn.init.constant_(net.classifier[1].bias, 0.5)  # below zero its last ReLU gives nothing
    return net


def _regnet() -> nn.Module:
    from torchvision.models import RegNet
    from torchvision.models.regnet import BlockParams

    return RegNet(BlockParams.from_init_params(4, 8, 8, 2.0, 4, se_ratio=0.25), CLASSES, stem_width=8)


def _mnasnet() -> nn.Module:
    from torchvision.models import MNASNet

    return MNASNet(0.1, CLASSES, dropout=0.0)


# Models by name, with what makes them small; those with "test" in their name are small by themselves.
TIMM: dict[str, dict[str, Any]] = {
    "test_resnet": {},
    "test_convnext": {},
    "test_efficientnet": {},
    "test_vit3": {"img_size": 32},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4,
        "drop_path_rate": 0.0,
    },
    "regnetx_002": {},
    "densenet121": {"growth_rate": 4, "block_config": (2, 2)},
}  # fmt: skip


def _timm(name: str) -> nn.Module:
    from timm import create_model

    return create_model(name, pretrained=False, num_classes=CLASSES, **TIMM[name])


class Logits(nn.Module):
    """The ``logits`` of a network of ``transformers``, called by keywords."""

    def __init__(self, model: nn.Module, masked: bool = False) -> None:
        super().__init__()
        self.model, self.masked = model, masked

    def forward(self, tokens: Tensor) -> Tensor:
        mask = {"attention_mask": (tokens > 2).long()} if self.masked else {}
        return self.model(input_ids=tokens, **mask).logits


def _transformers(kind: str, masked: bool = False) -> nn.Module:
    import transformers

    sizes: dict[str, dict[str, Any]] = {
        "Bert": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
                 "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "GPT2": {"n_embd": 8, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
                 "pad_token_id": 0},
        "DistilBert": {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 16, "dropout": 0.0,
                       "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
        "Llama": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
                  "pad_token_id": 0},
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCABULARY, num_labels=CLASSES, **sizes[kind])
    return Logits(getattr(transformers, f"{kind}ForSequenceClassification")(config), masked)


class Graph(nn.Module):
    """A graph network whose examples are the nodes of a ring."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        import torch_geometric.nn as geometric

        convolution = getattr(geometric, kind)
        self.a, self.b = convolution(6, 5), convolution(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        nodes = torch.arange(len(x))
        ring = torch.stack([nodes, (nodes + 1) % len(x)])
        edges = torch.cat([ring, ring.flip(0)], 1)
        return self.b(torch.relu(self.a(x, edges)), edges)


def installed(package: str) -> bool:
    return find_spec(package) is not None


TORCHVISION: dict[str, Callable[[], nn.Module]] = {
    "ResNet": lambda: _resnet(False),
    "ResNet with bottlenecks": lambda: _resnet(True),
    "MobileNetV2": _mobilenet_v2,
    "MobileNetV3": _mobilenet_v3,
    "EfficientNet": _efficientnet,
    "DenseNet": _densenet,
    "DenseNet, memory-efficient": lambda: _densenet(True),
    "ConvNeXt": _convnext,
    "ViT": _vit,
    "Swin": _swin,
    "ShuffleNetV2": _shufflenet,
    "SqueezeNet": _squeezenet,
    "RegNet": _regnet,
    "MNASNet": _mnasnet,
}
OTHERS = {
    "timm": [
        Case(f"timm {name}", lambda name=name: _timm(name), PICTURE, **CALM) for name in TIMM
    ],
    "transformers": [
        Case(f"transformers {kind}{', masked' * masked}", lambda kind=kind, masked=masked: _transformers(kind, masked),
             TOKENS, VOCABULARY)
        for kind, masked in (("Bert", False), ("Bert", True), ("GPT2", False), ("DistilBert", True), ("Llama", False))
    ],
    "torch_geometric": [
        Case(f"torch_geometric {kind}", lambda kind=kind: Graph(kind), VECTOR)
        for kind in ("GCNConv", "GATConv", "SAGEConv")
    ],
}  # fmt: skip
CASES = [
    *(Case(f"torchvision {name}", make, PICTURE, **CALM, evaluation=name == "MNASNet",
           plain=_densenet if name == "DenseNet, memory-efficient" else None,
           refusal=NOT_TWICE if name == "MobileNetV3" else "") for name, make in TORCHVISION.items()),
    *(case for cases in OTHERS.values() for case in cases),
]  # fmt: skip
