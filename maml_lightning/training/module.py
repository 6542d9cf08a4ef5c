"""MAML as a LightningModule with automatic optimization: Lightning sees a loss, autograd finds the meta-gradient."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric

from maml_lightning.algorithms.adaptation import Adaptation
from maml_lightning.algorithms.algorithm import Settings
from maml_lightning.algorithms.inner_loop import Evaluated, InnerLoop, MetaGradient
from maml_lightning.algorithms.optimizers import Parameters
from maml_lightning.algorithms.optimizers import inner_optimizer as optimizer_of
from maml_lightning.algorithms.registry import find_algorithm
from maml_lightning.algorithms.statistics import called
from maml_lightning.algorithms.unrolled import multi_step_weights
from maml_lightning.engine.execution import Execution
from maml_lightning.episodes import Episode, InputSpec
from maml_lightning.processes import every_process
from maml_lightning.structures import first_task, plain, tensor_of
from maml_lightning.training import checks, chunks, loading, metrics, non_finite, resume, scores
from maml_lightning.training.meta_steps import MetaSteps
from maml_lightning.training.network_checks import check_network
from maml_lightning.training.normalization import RunningStatistics, current_loop, report_unused
from maml_lightning.training.settings import check_values
from maml_lightning.training.surrogate import surrogate_loss


class MAML(LightningModule):
    """Model-agnostic meta-learning (Finn, Abbeel and Levine 2017) and its family, of any network.

    Each member is a setting: FOMAML is first_order; ANIL adapted_parameters=head, BOIL body; Meta-SGD
    learn_inner_lr=weight; MAML++ learn_inner_lr=step, multi_step_epochs, first_order_epochs and
    per_step_normalization together; iMAML and Reptile are algorithms.

    Args:
        net: the network. Normalization layers use the statistics of the current batch, in evaluation too; those that
            are frozen, or in evaluation mode while this module is not, use their running statistics.
        inner_lr: inner learning rate alpha, above 0. It multiplies the gradient of the mean loss.
        inner_steps: adaptation steps in training, 0 or more.
        eval_inner_steps: adaptation steps in validation, test and predict; null takes inner_steps.
        first_order: drop the second derivatives from the meta-gradient (FOMAML).
        outer_lr: learning rate of Adam on the initialization, unless an optimizer is configured.
        tasks_per_chunk: how many tasks are vectorized together; 1 takes one at a time, null all, auto goes by the
            memory that a task of the first meta-batch needs.
        flat_memory: recompute each inner step in the backward pass instead of keeping its graph: a step then keeps
            only its fast weights. auto does so where memory would run short.
        compile: run the meta-gradient through torch.compile; takes minutes at the start, worth it for long runs.
        execution: how tasks are run: traced, as a recorded graph, vectorized over tasks; vectorized, without a graph;
            loop, one after the other by autograd, which runs any network. auto takes the first that works, and on a
            GPU replays recorded graphs as a CUDA graph.
        loss: of (outputs, targets), mean over examples, the same in inner and outer loop: a function or a class. Of a
            network that returns several tensors it gets all, if it takes them, as in a plain loop; else the logits.
        metric: evaluated beside accuracy or mean squared error, for each episode afresh: a class of torchmetrics, or a
            function of (outputs, targets) that returns a number; null evaluates none.
        algorithm: maml; imaml takes the implicit gradient of a proximal inner loop (Rajeswaran et al. 2019); reptile
            moves towards the adapted weights (Nichol et al. 2018), on support and query examples together.
        adapted_parameters: all; head, the last layer that runs (ANIL, Raghu et al. 2020); body, all but it (BOIL, Oh et
            al. 2021); or name patterns such as "body.3.*". The outer loop alone learns the others.
        learn_inner_lr: learn the inner learning rate, from inner_lr on: one for the network, for each tensor, for each
            tensor and step (LSLR) or for each weight (Meta-SGD, Li et al. 2017); null keeps inner_lr.
        multi_step_epochs: evaluate the query loss after each inner step, with weights that anneal to the last step in
            this many epochs (Antoniou et al. 2019); 0 evaluates it after the last step alone.
        first_order_epochs: drop the second derivatives in this many epochs at the start (Antoniou et al. 2019).
        per_step_normalization: learn normalization weights for each inner step, not adapted (Antoniou et al. 2019).
        inner_optimizer: sgd, momentum (0.9) or adam (0.9, 0.999), differentiated through.
        inner_weight_decay: of the inner loop, 0 or more, as in torch.optim.SGD.
        inner_clip_norm: clip each task's inner gradient to this norm, above 0; null does not clip.
        proximal: strength of imaml's pull to the initialization, above 0.
        implicit_iterations: imaml's conjugate gradient iterations, 1 or more.
        query_statistics: batch normalizes queries by their batch's statistics (transductive); support by the support
            set's (MetaBN, Bronskill et al. 2020); running as support, but by running ones before all adapted layers.
        head: learned; or prototypes: the last linear layer starts from the mean features of the support classes, of any
            number, and then adapts like all else (ProtoMAML, Triantafillou et al. 2020).
        meta_curvature: learn matrices that multiply a weight's inner gradient along its dimensions (Park, Oliva 2019).
        non_finite: stop where a loss, a gradient or an output is not finite, naming the step and the episodes; or skip
            the meta-step, and count it in train/skipped_steps.

    Raises:
        SettingError: a setting is out of range, or incompatible with another.

    Example:
        >>> maml = MAML(net=nn.Linear(4, 2), inner_lr=0.1)
        >>> classifier = maml.adapt(torch.rand(6, 4), torch.tensor([0, 0, 0, 1, 1, 1]))
        >>> classifier(torch.rand(3, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(  # Long: an argument for each setting
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
        execution: Execution = "auto",
        loss: Callable[[Any, Any], Any] = F.cross_entropy,
        metric: Metric | Callable[[Tensor, Tensor], Any] | None = None,
        algorithm: str = "maml",
        adapted_parameters: str | list[str] = "all",
        learn_inner_lr: Literal["network", "tensor", "step", "weight"] | None = None,
        multi_step_epochs: int = 0,
        first_order_epochs: int = 0,
        per_step_normalization: bool = False,
        inner_optimizer: Literal["sgd", "momentum", "adam"] = "sgd",
        inner_weight_decay: float = 0.0,
        inner_clip_norm: float | None = None,
        proximal: float = 2.0,
        implicit_iterations: int = 5,
        query_statistics: Literal["batch", "support", "running"] = "batch",
        head: Literal["learned", "prototypes"] = "learned",
        meta_curvature: bool = False,
        non_finite: Literal["stop", "skip"] = "stop",
    ) -> None:
        check_values(dict(locals()))
        check_network(net, second_order=bool(inner_steps) and not first_order and algorithm != "reptile")
        super().__init__()
        self.save_hyperparameters(ignore=["net", "loss", "metric"])
        self.net, self.loss, self.metric = net, loss, metrics.created(metric)
        self.query_statistics, self._statistics = query_statistics, RunningStatistics(net, query_statistics)
        self.inner_lr, self.inner_steps, self.first_order, self.outer_lr = inner_lr, inner_steps, first_order, outer_lr
        self.eval_inner_steps = inner_steps if eval_inner_steps is None else eval_inner_steps
        self.algorithm, self.implicit_iterations, self.non_finite = algorithm, implicit_iterations, non_finite
        self.multi_step_epochs, self.first_order_epochs, self.head = multi_step_epochs, first_order_epochs, head
        learned = (learn_inner_lr, per_step_normalization, meta_curvature, head == "prototypes")
        self.adaptation = Adaptation(net, inner_lr, inner_steps, adapted_parameters, *learned)
        optimizer = optimizer_of(inner_optimizer, inner_weight_decay, inner_clip_norm)
        proximal = proximal if find_algorithm(algorithm).proximal else 0.0
        self._loop = InnerLoop(net, loss, tasks_per_chunk, flat_memory, compile, optimizer, proximal, execution)
        report_unused(self)
        self._checked: tuple = ()  # what was found to fit
        self.scoring = scores.Scoring(loss, None)  # what is logged of episodes, known once they are checked
        self.inputs: InputSpec | None = None  # the pictures that it was trained on
        self.calibration: dict[str, Any] | None = None  # of these weights, see training/confidence.py
        self._rows: list[Tensor] = []  # of each batch's episodes, see training/scores.py
        self.test_scores: dict[str, Tensor] = {}  # of the last test
        self.skipped_episodes = 0  # of the last validation or test
        self._meta_steps = MetaSteps()
        self.signal, self.agreed_signal = 0, 0  # that LastCheckpoint got here, and the largest that any process got
        self.run_settings: dict[str, Any] = {}  # of the command line, for its checkpoints, as are
        self._fresh: dict[str, Any] = {}  # the optimizers and schedulers as configured
        self._resumed: dict[str, Any] | None = None  # a checkpoint that is being loaded

    def forward(self, inputs: Any) -> Tensor:
        """The outputs of the network before adaptation."""
        return tensor_of(called(self.net, self.adaptation.first_of_steps(), inputs, self._statistics.in_use(self)))

    def adapt(self, support_inputs: Any, support_targets: Any, steps: int | None = None) -> nn.Module:
        """A copy of the network, adapted to one task.

        With ``query_statistics`` batch, it normalizes with the statistics of the batch that it sees: give it queries
        together with the support inputs, and drop the outputs of those. Call ``maml.eval()`` first where the network
        has dropout: in training mode it is active, while adapting and in the copy.

        Args:
            support_inputs: ``[N*K, C, H, W]``, or whatever the network takes, see `Episode`.
            support_targets: ``[N*K]``, int64 in ``[0, N)``, or whatever the loss takes.
            steps: inner steps; None takes ``eval_inner_steps``.
        """
        inputs, targets = plain(support_inputs), plain(support_targets)
        with checks.naming_misfits_of_support(self, inputs, targets):
            start, rates = self._start(inputs)
            steps = self.eval_inner_steps if steps is None else steps
            return self._inner_loop.adapted(start, inputs, targets, rates, steps)

    def trajectory(self, episode: Episode, steps: int | None = None) -> list[Tensor]:
        """The outputs on the query inputs before adaptation and after each inner step, without gradients.

        Args:
            episode: ``T`` tasks.
            steps: inner steps; None takes ``eval_inner_steps``.

        Returns:
            ``steps + 1`` tensors ``[T, N*Q, ...]``.
        """
        return self.evaluated(episode, steps, with_losses=False)[0]

    def evaluated(self, episode: Episode, steps: int | None = None, with_losses: bool = True) -> Evaluated:
        """The trajectory, and the losses ``[T]`` along it where they are not of these outputs alone."""
        start, rates = self._start(first_task(episode.support_inputs))
        steps = self.eval_inner_steps if steps is None else steps
        with checks.naming_misfits(self, episode) as loop:
            return loop.evaluated(start, episode, rates, steps, with_losses)

    def inner_update_norms(self, episode: Episode) -> Tensor:
        """How far ``eval_inner_steps`` steps of adaptation move the parameters, in the Euclidean norm: ``[T]``."""
        start, rates = self._start(first_task(episode.support_inputs))
        with checks.naming_misfits(self, episode) as loop:
            return loop.moved(start, episode, rates, self.eval_inner_steps)

    @property
    def _inner_loop(self) -> InnerLoop:
        """The inner loop of what this module is now."""
        return current_loop(self, self._loop)

    def train(self, mode: bool = True) -> Self:
        """Change the mode; normalization layers in evaluation mode stay in it, as in `net.bn.eval()`."""
        with self._statistics.keeping_modes(self):
            return super().train(mode)

    def _start(self, inputs: Any) -> tuple[Parameters, Parameters]:
        """The parameters that adaptation to a task with these inputs starts from, and the inner learning rates."""
        self.adaptation.find_head(self.net, inputs)
        rates = self.adaptation.rates(self.net, self.inner_lr)
        self._statistics.find_collected(self, rates, inputs)
        return self.adaptation.params(self.net), rates

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, as in the paper."""
        # Its usual eps of 1e-8 is 0 in float16, and 0 / 0 no number.
        eps = max(1e-8, *(torch.finfo(value.dtype).tiny for value in self.parameters() if value.requires_grad))
        return torch.optim.Adam(self.parameters(), lr=self.outer_lr, eps=eps)

    def training_step(self, batch: Episode, batch_idx: int) -> Tensor:
        """The outer loss of a meta-batch; its backward leaves the exact meta-gradient in the parameters."""
        episode, self.calibration = self._check(batch), None
        parameters, rates = self._start(first_task(episode.support_inputs))
        result = self._gradient(parameters, rates, episode)
        self._statistics.collect(self, episode)
        if self._trainer is not None:
            self._log(result, episode, batch_idx)
        return surrogate_loss(result.loss, (parameters, result.gradient), (rates, result.rates))

    def _gradient(self, parameters: Parameters, rates: Parameters, episode: Episode) -> MetaGradient:
        first_order = self.first_order or self.current_epoch < self.first_order_epochs
        weights = multi_step_weights(self.inner_steps, self.current_epoch, self.multi_step_epochs)
        settings = Settings(first_order, weights, self.implicit_iterations)
        with checks.naming_misfits(self, episode) as loop, chunks.reporting_choices(loop, episode.tasks):
            return loop.gradient(self.algorithm, parameters, episode, rates, self.inner_steps, settings)

    def _log(self, result: MetaGradient, episode: Episode, batch_idx: int) -> None:
        """Keep loss and score, means over all processes, and which episodes are finite, until the gradient is there."""
        self._meta_steps.join(self.trainer)
        numbers = non_finite.episode_numbers(self, "train", batch_idx, episode)
        means = self.scoring.training_means(result.loss, result.predictions, episode.query_targets)
        # One collective answers all questions of a meta-step. Nothing is left for `sync_dist`: a metric that is
        # reduced when it is read hangs where one process alone reads it, such as for its progress bar.
        shared = every_process(torch.stack([*means.values(), torch.full_like(result.loss, self.signal)]))
        self._meta_steps.add(numbers, result, [f"train/{name}" for name in means], shared, self)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Where ``training_step`` is one's own, stop at a gradient that is not finite; else the callback has."""
        if self._meta_steps not in self.trainer.callbacks:  # type: ignore[attr-defined]
            self._meta_steps.on_before_optimizer_step(self.trainer, self, optimizer)

    def validation_step(self, batch: Episode, batch_idx: int) -> None:
        """Adapt to each task, and evaluate before adaptation and after each inner step."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Episode, batch_idx: int) -> None:
        """As in validation."""
        self._evaluate(batch, batch_idx, "test")

    def predict_step(self, batch: Episode, batch_idx: int) -> Tensor:
        """The adapted networks' class probabilities ``[T, N*Q, N]``; their outputs where an example has no class."""
        outputs = self.trajectory(episode := self._check(batch))[-1]
        return self.scoring.predictions(outputs, episode.support_targets)

    def on_validation_epoch_start(self) -> None:
        """Forget the episodes of an evaluation before this one."""
        self._rows = []

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Log the means over all episodes."""
        non_finite.report_scores(self, "val", self._rows)

    def on_test_epoch_end(self) -> None:
        """Log the means over all episodes; ``test_scores`` has each episode's by name, ``[episodes, steps + 1]``."""
        self.test_scores = non_finite.report_scores(self, "test", self._rows)

    def _evaluate(self, batch: Episode, batch_idx: int, split: str) -> None:
        episode = self._check(batch)
        numbers = non_finite.episode_numbers(self, split, batch_idx, episode)
        with checks.naming_misfits(self, episode):
            outputs, losses = self.evaluated(episode)
            self._rows.append(self.scoring.rows(outputs, episode.query_targets, numbers, losses))

    def prepare_data(self) -> None:
        """Check that trainer, data and network go together, before Lightning writes anything."""
        checks.check_trainer(self.trainer)
        if (episode := checks.first_episode(self.trainer, self)) is not None:
            self._check(episode)
            checks.check_rest(self._inner_loop, self.metric, self.inner_steps, self.trainer)

    def _check(self, batch: Episode) -> Episode:
        """The batch, its shapes checked; the first one of its kind is tried on the network."""
        episode = Episode.of(batch).check()
        parts = (self.net, self.loss, self.metric)
        if not checks.is_checked(self._checked, parts, episode):
            self.scoring = checks.check_fit(self._inner_loop, self.metric, episode, self.inner_steps, self._trainer)
            self._checked = (*parts, checks.kind_of(episode))
        if self.inputs is None and self.training:
            self.inputs = checks.input_spec(episode, self._trainer)
        return episode

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: torch.device | str | None = None,
        strict: bool = True,
        trust: bool = False,
        **settings: Any,
    ) -> Self:
        """The module of a checkpoint. Lightning's own would import and call whatever network the checkpoint names.

        Args:
            checkpoint_path, map_location, strict, settings: as in Lightning; settings may be ``net``.
            trust: also import and call what it names outside this package and PyTorch.

        Raises:
            SettingError: it cannot be read, or names no network, or code that is not trusted.
        """
        return loading.load_module(cls, checkpoint_path, settings, map_location, strict, trust)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the chunk size, so that a resumed run sums in the same order, and what was trained on."""
        checkpoint["settings"], checkpoint["fresh"] = self.run_settings, self._fresh
        checkpoint["hyper_parameters"].setdefault("loss", loading.loss_path(self.loss))
        checkpoint.update(loading.to_keep(self._inner_loop.chosen, self.inputs, self.calibration))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that it is of the same network; when a run is resumed, keep the settings of its callbacks."""
        checks.check_same_network(self, checkpoint)
        self._inner_loop.chosen, self.inputs, self.calibration = loading.measured(checkpoint)
        if self._trainer is not None and resume.prepares(self, self.trainer, checkpoint):
            self._resumed = checkpoint

    def on_fit_start(self) -> None:
        """Apply this run's settings of optimizer and scheduler instead of those in the checkpoint."""
        checkpoint, self._resumed = self._resumed, None
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        self._fresh = resume.fresh(self.trainer.optimizers, schedulers)
        if checkpoint is not None:
            resume.keep_optimizer_settings(checkpoint, self.trainer.optimizers, schedulers)

    def begin_with(self, checkpoint: dict[str, Any]) -> None:
        """Take the weights and learned inner learning rates of a checkpoint of the same network, nothing else."""
        checks.check_same_network(self, checkpoint, start=True)
        self.load_state_dict(checkpoint["state_dict"])
