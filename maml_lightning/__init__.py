"""The MAML family of meta-learning algorithms as one PyTorch Lightning module with torch.func gradients."""

from maml_lightning.algorithms.inner_loop import InnerLoop, MetaGradient
from maml_lightning.data import (
    GlyphsDataModule,
    ImagesDataModule,
    OmniglotDataModule,
    SinusoidsDataModule,
    SupportQueryDataModule,
    support_set,
)
from maml_lightning.episodes import Episode, Inputs
from maml_lightning.errors import NonFiniteError, SettingError
from maml_lightning.networks import MLP, ConvNet
from maml_lightning.trained import load
from maml_lightning.training.callbacks import Cost, Inspection, PredictionReport, TestReport
from maml_lightning.training.checkpoints import LastCheckpoint
from maml_lightning.training.module import MAML

__version__ = "0.1.0"

__all__ = [
    "MAML",
    "MLP",
    "ConvNet",
    "Cost",
    "Episode",
    "GlyphsDataModule",
    "ImagesDataModule",
    "InnerLoop",
    "Inputs",
    "Inspection",
    "LastCheckpoint",
    "MetaGradient",
    "NonFiniteError",
    "OmniglotDataModule",
    "PredictionReport",
    "SettingError",
    "SinusoidsDataModule",
    "SupportQueryDataModule",
    "TestReport",
    "__version__",
    "load",
    "support_set",
]
