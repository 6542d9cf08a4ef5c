"""Episodes: drawing them (`random_numbers`, `datasets`, `loading`), data modules (`modules`), and data sets.

A data set of your own is a subclass of `EpisodicDataModule` (classes of images or vectors) or of `TaskDataModule`.
"""

from maml_lightning.data.arrays import ArraysDataModule
from maml_lightning.data.benchmarks import BenchmarkDataModule
from maml_lightning.data.datasets import EpisodeDataset, Split, TaskDataset
from maml_lightning.data.examples import Examples
from maml_lightning.data.functions import FunctionDataModule
from maml_lightning.data.glyphs import GlyphsDataModule
from maml_lightning.data.images import ImagesDataModule
from maml_lightning.data.map_style import DatasetDataModule
from maml_lightning.data.modules import EpisodicDataModule, TaskDataModule
from maml_lightning.data.omniglot import OmniglotDataModule
from maml_lightning.data.sinusoids import SinusoidsDataModule
from maml_lightning.data.support_query import SupportQueryDataModule
from maml_lightning.data.support_sets import support_set

__all__ = [
    "ArraysDataModule",
    "BenchmarkDataModule",
    "DatasetDataModule",
    "EpisodeDataset",
    "EpisodicDataModule",
    "Examples",
    "FunctionDataModule",
    "GlyphsDataModule",
    "ImagesDataModule",
    "OmniglotDataModule",
    "SinusoidsDataModule",
    "Split",
    "SupportQueryDataModule",
    "TaskDataModule",
    "TaskDataset",
    "support_set",
]
