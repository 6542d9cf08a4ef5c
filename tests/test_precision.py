"""Lightning's precisions train, and their meta-gradients are near float64's."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.nn.functional import cosine_similarity

from maml_lightning import MAML, ConvNet, GlyphsDataModule


class Gradients(MAML):
    """Keeps its first meta-gradient."""

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        if self.global_step == 0:
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            grads = torch.cat([value.grad.double().flatten() for value in self.parameters()])
            self.first = grads / (scaler.get_scale() if scaler else 1)


def fitted(precision: str, net: nn.Module, folder) -> Gradients:
    maml = Gradients(net=net, inner_lr=0.1, inner_steps=2, tasks_per_chunk=None)
    data = GlyphsDataModule(ways=2, meta_batch_size=4, train_episodes=8, val_episodes=4, train_classes=8, val_classes=8)
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(default_root_dir=folder, max_steps=2, accelerator="cpu", precision=precision, **quiet)
    trainer.fit(maml, data)
    assert trainer.global_step == 2
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
    assert all(value.isfinite().all() for value in maml.parameters())
    return maml


DTYPES = {
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "64-true": torch.float64,
    "bf16-mixed": torch.float32,
    "16-mixed": torch.float32,
}


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")  # Lightning takes bf16-mixed there
@pytest.mark.parametrize("pooling", [False, True], ids=["strided", "pooled"])
def test_precisions_train(tmp_path, pooling, caplog):
    def net() -> nn.Module:
        torch.manual_seed(0)
        return ConvNet(out_features=2, hidden_channels=8, blocks=2, pooling=pooling)

    exact = fitted("32-true", net(), tmp_path).first
    for precision, dtype in DTYPES.items():
        maml = fitted(precision, net(), tmp_path)
        assert {value.dtype for value in maml.net.parameters()} == {dtype}, precision
        assert cosine_similarity(maml.first, exact, dim=0) > (1 - 1e-6 if precision == "64-true" else 0.98), precision
        assert maml.first.norm().item() == pytest.approx(
            exact.norm().item(), rel=1e-5 if precision == "64-true" else 0.1
        )
    assert "untraced" not in caplog.text
