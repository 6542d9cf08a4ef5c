"""Episodes: sampling (`episodic`), the data sets of images it samples from, and sinusoids."""

from maml_lightning.data.glyphs import GlyphsDataModule
from maml_lightning.data.images import ImagesDataModule
from maml_lightning.data.omniglot import OmniglotDataModule
from maml_lightning.data.sinusoids import SinusoidsDataModule
from maml_lightning.data.support_query import SupportQueryDataModule, support_set

__all__ = [
    "GlyphsDataModule",
    "ImagesDataModule",
    "OmniglotDataModule",
    "SinusoidsDataModule",
    "SupportQueryDataModule",
    "support_set",
]
