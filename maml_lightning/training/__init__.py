"""The LightningModule, its settings and their checks, checkpoints and callbacks."""
