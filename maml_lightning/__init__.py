"""The MAML family of meta-learning algorithms as one PyTorch Lightning module with torch.func gradients."""

from maml_lightning.algorithms.inner_loop import InnerLoop, MetaGradient
from maml_lightning.data import (
    ArraysDataModule,
    BenchmarkDataModule,
    DatasetDataModule,
    FunctionDataModule,
    GlyphsDataModule,
    ImagesDataModule,
    OmniglotDataModule,
    SinusoidsDataModule,
    SupportQueryDataModule,
    support_set,
)
from maml_lightning.deprecation import old_names
from maml_lightning.episodes import Episode, InputSpec
from maml_lightning.errors import NonFiniteError, SettingError
from maml_lightning.networks import MLP, ConvNet, ResNet12
from maml_lightning.sequence_networks import ConvNet1d, GRUNet, TextNet
from maml_lightning.trained import Classifier, load
from maml_lightning.training.checkpoints import LastCheckpoint
from maml_lightning.training.cost import CostMonitor
from maml_lightning.training.inspection import AdaptationMonitor
from maml_lightning.training.module import MAML
from maml_lightning.training.reports import PredictionReport, TestReport

__version__ = "0.1.0"

__all__ = [
    "MAML",
    "MLP",
    "AdaptationMonitor",
    "ArraysDataModule",
    "BenchmarkDataModule",
    "Classifier",
    "ConvNet",
    "ConvNet1d",
    "CostMonitor",
    "DatasetDataModule",
    "Episode",
    "FunctionDataModule",
    "GRUNet",
    "GlyphsDataModule",
    "ImagesDataModule",
    "InnerLoop",
    "InputSpec",
    "LastCheckpoint",
    "MetaGradient",
    "NonFiniteError",
    "OmniglotDataModule",
    "PredictionReport",
    "ResNet12",
    "SettingError",
    "SinusoidsDataModule",
    "SupportQueryDataModule",
    "TestReport",
    "TextNet",
    "__version__",
    "load",
    "support_set",
]

__getattr__ = old_names(
    __name__,
    {
        "Cost": f"{__name__}.CostMonitor",
        "Inputs": f"{__name__}.InputSpec",
        "Inspection": f"{__name__}.AdaptationMonitor",
    },
)
