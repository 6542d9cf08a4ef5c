"""Episodes of images: sampling (`episodic`) and the data sets it samples from."""

from maml_lightning.data.glyphs import GlyphsDataModule
from maml_lightning.data.omniglot import OmniglotDataModule

__all__ = ["GlyphsDataModule", "OmniglotDataModule"]
