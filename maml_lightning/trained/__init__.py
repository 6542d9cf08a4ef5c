"""Pretrained networks of the package, how to load the network of any checkpoint, and to classify with it."""

from maml_lightning.trained.classifier import Classifier, Prediction
from maml_lightning.trained.networks import FOLDER, load, packaged, strip

__all__ = ["FOLDER", "Classifier", "Prediction", "load", "packaged", "strip"]
