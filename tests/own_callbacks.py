"""Callbacks as a user would write them."""

import torch
from lightning.pytorch import Callback


class LogsForAll(Callback):
    """Logs numbers that all processes are to share, at every place where one may."""

    def on_train_batch_end(self, trainer, module, *_):
        module.log("mine/step", torch.tensor(1.0), sync_dist=True, on_step=False, on_epoch=True)

    def on_train_epoch_end(self, trainer, module):
        module.log("mine/epoch", torch.tensor(2.0), sync_dist=True)

    def on_validation_batch_end(self, trainer, module, *_):
        module.log("mine/validation_step", torch.tensor(3.0), sync_dist=True)

    def on_validation_epoch_end(self, trainer, module):
        module.log("mine/validation", torch.tensor(4.0), sync_dist=True)
