"""MAML as a LightningModule with automatic optimisation: Lightning sees a loss, autograd finds the meta-gradient."""

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import CatMetric, MeanMetric

from maml_lightning.episodes import Episode
from maml_lightning.errors import SettingError
from maml_lightning.inner_loop import InnerLoop

_RUNNING = ("running_mean", "running_var", "num_batches_tracked")


class _Surrogate(torch.autograd.Function):
    """A scalar whose gradient with respect to each parameter is that parameter's meta-gradient.

    So backward hooks, DDP's included, clipping, accumulation and loss scaling work as for any loss.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradient: tuple[Tensor, ...], *parameters: Tensor) -> Tensor:
        ctx.gradient = gradient
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple:
        return None, None, *(scale * gradient for gradient in ctx.gradient)


class MAML(LightningModule):
    """Model-agnostic meta-learning (Finn, Abbeel and Levine 2017) of any network.

    Args:
        net: the network. Batch normalisation layers always use the statistics of the batch at hand: running
            statistics, which tasks cannot share, are switched off.
        inner_lr: learning rate alpha of the adaptation, above 0. It multiplies the gradient of the mean loss.
        inner_steps: adaptation steps in training, 0 or more.
        eval_inner_steps: adaptation steps in validation, test and predict; null takes inner_steps.
        first_order: drop the second derivatives from the meta-gradient (FOMAML).
        outer_lr: learning rate of Adam on the initialisation, unless an optimizer is configured.
        tasks_per_chunk: how many tasks are vectorised together; 1 loops over tasks, null takes all, auto measures
            what is fastest on the first meta-batch.
        flat_memory: compute each inner step again on the way back instead of keeping what it computed: memory then
            does not grow with the inner steps. auto does so where memory would run short.
        compile: run the meta-gradient through torch.compile; takes minutes at the start, worth it for long runs.
        loss: of (outputs, targets), mean over examples; inner and outer loop share it. By import path it needs its
            annotations.

    Example:
        >>> maml = MAML(net=nn.Linear(4, 2), inner_lr=0.1)
        >>> classifier = maml.adapt(torch.rand(6, 4), torch.tensor([0, 0, 0, 1, 1, 1]))
        >>> classifier(torch.rand(3, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        net: nn.Module,
        inner_lr: float = 0.4,
        inner_steps: int = 1,
        eval_inner_steps: int | None = None,
        first_order: bool = False,
        outer_lr: float = 1e-3,
        tasks_per_chunk: int | Literal["auto"] | None = "auto",
        flat_memory: bool | Literal["auto"] = "auto",
        compile: bool = False,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> None:
        super().__init__()
        _at_least("inner_steps", inner_steps, 0)
        _at_least("eval_inner_steps", eval_inner_steps or 0, 0)
        _positive("inner_lr", inner_lr)
        _positive("outer_lr", outer_lr)
        self.save_hyperparameters(ignore=["net", "loss"])
        tracking = [layer for layer in net.modules() if getattr(layer, "running_mean", None) is not None]
        if tracking:
            rank_zero_info("Running statistics of normalisation layers are off: MAML uses those of the batch at hand.")
        for layer in tracking:  # torch.func.replace_all_batch_norm_modules_ would leave instance normalisation as it is
            for name, off in {**dict.fromkeys(_RUNNING), "track_running_stats": False}.items():
                setattr(layer, name, off)
        self.net = net
        self.inner_lr, self.inner_steps, self.first_order, self.outer_lr = inner_lr, inner_steps, first_order, outer_lr
        self.eval_inner_steps = inner_steps if eval_inner_steps is None else eval_inner_steps
        self._inner_loop = InnerLoop(net, loss, tasks_per_chunk, flat_memory, compile)
        self._eval_loss = MeanMetric()
        self._scores = CatMetric()
        self._loss = loss
        self._checked = False
        self.test_scores: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """The network before adaptation."""
        return self.net(inputs)

    def adapt(self, support_inputs: Tensor, support_targets: Tensor, steps: int | None = None) -> nn.Module:
        """A copy of the network, adapted to one task.

        Args:
            support_inputs: ``[N*K, C, H, W]``.
            support_targets: ``[N*K]``, int64 in ``[0, N)``.
            steps: inner steps; None takes ``eval_inner_steps``.
        """
        steps = self.eval_inner_steps if steps is None else steps
        parameters = self._inner_loop.adapt(
            self._parameters_of_net(), support_inputs, support_targets, self.inner_lr, steps
        )
        with torch.inference_mode(False):
            adapted = copy.deepcopy(self.net)
            adapted.load_state_dict(parameters, strict=False)
        return adapted

    def prepare_data(self) -> None:
        """Refuse a network that does not fit the data before Lightning writes anything."""
        for dataset in list(getattr(getattr(self.trainer, "datamodule", None), "datasets", {}).values())[:1]:
            episode = dataset[0]
            self._check(episode._replace(support_inputs=episode.support_inputs.to(next(self.net.parameters()))))

    def training_step(self, batch: Episode, batch_idx: int) -> Tensor:
        """The outer loss of a meta-batch; its backward leaves the exact meta-gradient in the parameters."""
        episode = self._check(batch)
        chosen, flat = self._inner_loop.chosen, self._inner_loop.flat
        result = self._inner_loop.meta_gradient(
            self._parameters_of_net(), episode, self.inner_lr, self.inner_steps, self.first_order
        )
        if self._inner_loop.chosen != chosen:
            rank_zero_info(f"model.tasks_per_chunk: {self._inner_loop.chosen} of {episode.tasks} is fastest here.")
        if self._inner_loop.flat and not flat:
            rank_zero_info("model.flat_memory: inner steps are computed again on the way back, to save memory.")
        if self._trainer is not None:
            self.log("train/loss", result.loss, prog_bar=True, batch_size=episode.tasks)
            score = _scores([result.predictions], episode.query_targets).mean()
            self.log(f"train/{_score_name(episode)}", score, prog_bar=True, batch_size=episode.tasks)
        names, parameters = zip(*((n, p) for n, p in self.net.named_parameters() if p.requires_grad), strict=True)
        return _Surrogate.apply(result.loss, tuple(result.gradient[name] for name in names), *parameters)

    def validation_step(self, batch: Episode, batch_idx: int) -> None:
        """Adapt to each task and judge before adaptation and after each inner step."""
        self._evaluate(batch)

    def test_step(self, batch: Episode, batch_idx: int) -> None:
        """As in validation."""
        self._evaluate(batch)

    def predict_step(self, batch: Episode, batch_idx: int) -> Tensor:
        """The adapted networks' class probabilities ``[T, N*Q, N]`` (regression: their outputs)."""
        episode = self._check(batch)
        outputs = self._trajectory(episode)[-1]
        return outputs if episode.support_targets.is_floating_point() else outputs.softmax(-1)

    def on_validation_epoch_start(self) -> None:
        """Begin anew; at the end it would leave inference tensors behind for a fit after a validate."""
        self._scores.reset()
        self._eval_loss.reset()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Log the means over all episodes."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Log the means over all episodes, and keep each episode's in ``test_scores`` ``[episodes, steps + 1]``."""
        self.test_scores = self._report("test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, the paper's choice."""
        return torch.optim.Adam(self.parameters(), lr=self.outer_lr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the measured chunk size, so that a resumed run sums in the same order."""
        checkpoint["tasks_per_chunk"] = self._inner_loop.chosen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another network, naming the tensors that differ."""
        self._inner_loop.chosen = checkpoint.get("tasks_per_chunk")
        ours = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        theirs = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
        if ours != theirs:
            name = next(n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n))
            raise SettingError(
                f"The checkpoint is of another network: {name} is {theirs.get(name, 'missing')} in it and "
                f"{ours.get(name, 'missing')} in model.net; give the data.ways and model.net that it was trained with."
            )

    def _parameters_of_net(self) -> dict[str, Tensor]:
        return dict(self.net.named_parameters())

    def _check(self, batch: Episode) -> Episode:
        episode = Episode(*batch).check()
        if not self._checked:
            self._check_fit(episode)
            self._checked = True
        return episode

    def _check_fit(self, episode: Episode) -> None:
        inputs, targets = episode.support_inputs[0], episode.support_targets[0]
        try:
            with torch.no_grad():
                outputs = self.net(inputs)
        except RuntimeError as error:
            raise SettingError(
                f"model.net does not take the episodes' inputs, {list(inputs.shape)} ({str(error).splitlines()[0]}); "
                "give a network for them, such as maml_lightning.ConvNet for images, maml_lightning.MLP for vectors."
            ) from error
        if targets.is_floating_point():
            if self._loss is F.cross_entropy:
                raise SettingError(
                    "model.loss is cross_entropy, but the episodes' targets are floats; "
                    "give a loss for regression, such as torch.nn.functional.mse_loss."
                )
            if outputs.shape != targets.shape:
                raise SettingError(
                    f"model.net gives outputs {list(outputs.shape)}, but the episodes' targets are "
                    f"{list(targets.shape)}; give it {targets.shape[-1]} outputs."
                )
            return
        data = getattr(self._trainer, "datamodule", None)
        ways = getattr(data, "ways", None) or int(targets.max()) + 1
        if (size := outputs.shape[-1]) != ways:
            raise SettingError(
                f"model.net has {size} outputs, but the episodes have {ways} classes; give it {ways} outputs."
            )

    def _trajectory(self, episode: Episode) -> list[Tensor]:
        return self._inner_loop.trajectory(self._parameters_of_net(), episode, self.inner_lr, self.eval_inner_steps)

    def _evaluate(self, batch: Episode) -> None:
        episode = self._check(batch)
        outputs = self._trajectory(episode)
        loss = self._loss(outputs[-1].flatten(0, 1), episode.query_targets.flatten(0, 1))
        self._eval_loss.update(loss, weight=episode.tasks)
        self._scores.update(_scores(outputs, episode.query_targets))
        self.score_name = _score_name(episode)

    def _report(self, stage: str) -> Tensor:
        scores, loss = self._scores.compute().cpu().double(), self._eval_loss.compute()
        self.log(f"{stage}/loss", loss, prog_bar=True)
        for step, score in enumerate(scores.mean(0)):
            self.log(f"{stage}/{self.score_name}_step_{step}", score.item())
        self.log(f"{stage}/{self.score_name}", scores[:, -1].mean().item(), prog_bar=True)
        return scores


def _score_name(episode: Episode) -> str:
    return "mse" if episode.query_targets.is_floating_point() else "accuracy"


def _scores(outputs: list[Tensor], targets: Tensor) -> Tensor:
    """Accuracy or mean squared error of each episode after each step: ``[T, steps]``."""
    if targets.is_floating_point():
        scores = [(output - targets).float().square().flatten(1).mean(1) for output in outputs]
    else:
        scores = [(output.argmax(-1) == targets).float().mean(1) for output in outputs]
    return torch.stack(scores, 1)


def _at_least(setting: str, value: int, least: int) -> None:
    if value < least:
        raise SettingError(f"model.{setting} must be at least {least} (got {value}).")


def _positive(setting: str, value: float) -> None:
    if not value > 0:
        raise SettingError(f"model.{setting} must be above 0 (got {value}).")
