"""MAML as a LightningModule with automatic optimisation: Lightning sees a loss, autograd finds the meta-gradient."""

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pydoc import locate
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from maml_lightning.algorithms.adaptation import Adaptation
from maml_lightning.algorithms.algorithm import Settings
from maml_lightning.algorithms.inner_loop import InnerLoop, MetaGradient
from maml_lightning.algorithms.optimizers import Parameters
from maml_lightning.algorithms.optimizers import inner_optimizer as optimizer_of
from maml_lightning.algorithms.registry import find_algorithm
from maml_lightning.algorithms.unrolled import multi_step_weights
from maml_lightning.engine.memory import out_of_memory
from maml_lightning.episodes import Episode, Inputs
from maml_lightning.errors import NonFiniteError, SettingError
from maml_lightning.processes import every_process, rows_of_every_process
from maml_lightning.training import resume
from maml_lightning.training.checkpoints import read_checkpoint, settings_of
from maml_lightning.training.trust import build, check_settings

# MAML's metrics are reduced before they are logged, see MAML.training_step: Lightning's advice would reduce them twice.
warnings.filterwarnings("ignore", r"It is recommended to use `self.log\('(train|val|test)/")

LEFT_OUT = "their networks' outputs are not finite, or none of their query targets counts"
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
    """Model-agnostic meta-learning (Finn, Abbeel and Levine 2017) and its family, of any network.

    Each member is a setting: FOMAML is first_order; ANIL adapted_parameters=head, BOIL body; Meta-SGD
    learn_inner_lr=weight; MAML++ learn_inner_lr=step, multi_step_epochs, first_order_epochs and
    per_step_normalization together; iMAML and Reptile are algorithms. With inner_steps=0 the network is trained
    without an inner loop.

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
        algorithm: maml; imaml takes the implicit gradient of a proximal inner loop (Rajeswaran et al. 2019); reptile
            moves towards the adapted weights (Nichol et al. 2018), on support and query examples together.
        adapted_parameters: all; head, the last layer (ANIL, Raghu et al. 2020); body, all but it (BOIL, Oh et al.
            2021); or name patterns such as "body.3.*". The others are learnt by the outer loop alone.
        learn_inner_lr: learn the inner learning rate, from inner_lr on: one for the network, for each tensor, for
            each tensor and step (LSLR) or for each weight (Meta-SGD, Li et al. 2017); null keeps inner_lr.
        multi_step_epochs: judge after each inner step, in weights annealed to the last step over so many epochs
            (Antoniou et al. 2019); 0 judges after the last step alone.
        first_order_epochs: drop the second derivatives in so many epochs at the start (derivative-order annealing,
            Antoniou et al. 2019).
        per_step_normalization: learn the weights of normalisation layers for each inner step, and do not adapt them
            (Antoniou et al. 2019).
        inner_optimizer: sgd, momentum (0.9) or adam (0.9, 0.999), differentiated through.
        inner_weight_decay: of the inner loop, 0 or more, as in torch.optim.SGD.
        inner_clip_norm: clip each task's inner gradient to this norm, above 0; null does not clip.
        proximal: strength of imaml's pull to the initialisation, above 0.
        implicit_iterations: imaml's conjugate gradient iterations, 1 or more.
        non_finite: stop where a loss, a gradient or an output is not finite, naming the step and the episodes; or skip
            the meta-step, and count it in train/skipped_steps.

    Raises:
        SettingError: a setting is out of range, or does not go together with another.

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
        non_finite: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__()
        _at_least("inner_steps", inner_steps, 0)
        _at_least("eval_inner_steps", eval_inner_steps or 0, 0)
        _positive("inner_lr", inner_lr)
        _positive("outer_lr", outer_lr)
        _at_least("multi_step_epochs", multi_step_epochs, 0)
        _at_least("first_order_epochs", first_order_epochs, 0)
        _at_least("inner_weight_decay", inner_weight_decay, 0)
        _at_least("implicit_iterations", implicit_iterations, 1)
        _positive("inner_clip_norm", 1.0 if inner_clip_norm is None else inner_clip_norm)
        _positive("proximal", proximal)
        unrolled = {
            "first_order": first_order,
            "learn_inner_lr": learn_inner_lr,
            "multi_step_epochs": multi_step_epochs,
            "first_order_epochs": first_order_epochs,
            "per_step_normalization": per_step_normalization,
        }
        if algorithm != "maml":
            why = f"model.algorithm {algorithm} does not differentiate through the inner steps"
            _refuse(unrolled, why)
            _at_least("inner_steps", inner_steps, 1)
        if algorithm == "reptile":
            _refuse(
                {"adapted_parameters": adapted_parameters != "all" and adapted_parameters},
                "reptile moves only what adapts, so that the rest would not be learnt",
            )
        if inner_steps == 0:
            _refuse(unrolled, "model.inner_steps is 0: training has no inner loop")
        if first_order:
            _refuse({"first_order_epochs": first_order_epochs}, "model.first_order is true in every epoch")
        self.save_hyperparameters(ignore=["net", "loss"])
        _use_batch_statistics(net)
        self.net = net
        self.inner_lr, self.inner_steps, self.first_order, self.outer_lr = inner_lr, inner_steps, first_order, outer_lr
        self.eval_inner_steps = inner_steps if eval_inner_steps is None else eval_inner_steps
        self.algorithm, self.implicit_iterations = algorithm, implicit_iterations
        self.multi_step_epochs, self.first_order_epochs = multi_step_epochs, first_order_epochs
        self.adaptation = Adaptation(
            net, inner_lr, inner_steps, adapted_parameters, learn_inner_lr, per_step_normalization
        )
        self._loop = InnerLoop(
            net,
            loss,
            tasks_per_chunk,
            flat_memory,
            compile,
            optimizer_of(inner_optimizer, inner_weight_decay, inner_clip_norm),
            proximal if find_algorithm(algorithm).proximal else 0.0,
        )
        self.loss = loss
        self._checked = False
        self.inputs: Inputs | None = None  # what pictures it was trained on
        self.non_finite, self._skipped = non_finite, 0
        self._rows: list[Tensor] = []  # of each batch's episodes, see _row
        self.signal, self.agreed_signal = 0, 0  # that LastCheckpoint was sent here, and the largest sent to any process
        self.test_scores: Tensor | None = None
        self.skipped_episodes = 0  # of the last validation or test
        self.run_settings: dict[str, Any] = {}  # of the command line, for its checkpoints
        self._fresh: dict[str, Any] = {}  # optimizers and schedulers as configured
        self._resumed: dict[str, Any] | None = None  # a checkpoint that is being loaded

    @property
    def _inner_loop(self) -> InnerLoop:
        """The inner loop of what ``net`` and ``loss`` are now."""
        if self._loop.net is not self.net:
            _use_batch_statistics(self.net)
            self._loop.net = self.net
        self._loop.loss = self.loss
        return self._loop

    def forward(self, inputs: Tensor) -> Tensor:
        """The network before adaptation."""
        by_step = {name.replace("/", "."): value[0] for name, value in self.adaptation.by_step.items()}
        return torch.func.functional_call(self.net, by_step, (inputs,))

    def adapt(self, support_inputs: Tensor, support_targets: Tensor, steps: int | None = None) -> nn.Module:
        """A copy of the network, adapted to one task.

        Normalisation layers take the statistics of the batch that they see: give it queries together with the support
        inputs, and drop the outputs of those, where there are few queries or not all classes among them.

        Args:
            support_inputs: ``[N*K, C, H, W]``.
            support_targets: ``[N*K]``, int64 in ``[0, N)``.
            steps: inner steps; None takes ``eval_inner_steps``.
        """
        steps = self.eval_inner_steps if steps is None else steps
        parameters = self._inner_loop.adapt(self._params(), support_inputs, support_targets, self._rates(), steps)
        with torch.inference_mode(False):
            adapted = copy.deepcopy(self.net)
            adapted.load_state_dict(parameters, strict=False)
        return adapted

    def prepare_data(self) -> None:
        """Refuse what does not fit, the data to the network or the strategy, before Lightning writes anything."""
        check_trainer(self.trainer)
        for dataset in list(getattr(getattr(self.trainer, "datamodule", None), "datasets", {}).values())[:1]:
            episode = dataset[0]
            self._check(episode._replace(support_inputs=episode.support_inputs.to(next(self.net.parameters()))))

    def training_step(self, batch: Episode, batch_idx: int) -> Tensor:
        """The outer loss of a meta-batch; its backward leaves the exact meta-gradient in the parameters."""
        episode = self._check(batch)
        chosen, flat = dict(self._inner_loop.chosen), self._inner_loop.flat
        params, rates = self._params(), self._rates()
        with self._memory():
            result = self._gradient(params, rates, episode)
        if self._inner_loop.chosen != chosen:
            size = next(size for what, size in self._inner_loop.chosen.items() if what not in chosen)
            rank_zero_info(f"model.tasks_per_chunk: {size} of {episode.tasks} is fastest here.")
        if self._inner_loop.flat and not flat:
            rank_zero_info("model.flat_memory: inner steps are computed again on the way back, to save memory.")
        if self._trainer is not None:
            finite = result.predictions.isfinite().flatten(1).all(1)
            self._rows.append(self._row("train", batch_idx, finite))
            score = episode_scores([result.predictions], episode.query_targets, ignored_target(self.loss)).mean()
            # One collective answers all questions of a meta-step. Nothing is left for `sync_dist`: a metric that is
            # reduced when it is read hangs where one process alone reads it, such as for its progress bar.
            local = torch.stack([result.loss.detach(), score, torch.full_like(score, self.signal)])
            shared = every_process(local)
            loss, score, _ = shared.mean(0)
            self.agreed_signal = int(shared[:, 2].max()) if len(shared) > 1 else self.signal
            self.log_dict({"train/loss": loss, f"train/{_score_name(episode)}": score}, prog_bar=True)
        pairs = [
            (value, gradient[name])
            for values, gradient in ((params, result.gradient), (rates, result.rates))
            for name, value in values.items()
            if value.requires_grad
        ]
        parameters, gradients = zip(*pairs, strict=True)
        # A loss that is not finite makes the gradient so, which the other processes then see as well.
        gradients = (gradients[0] + 0 * result.loss, *gradients[1:])
        return _Surrogate.apply(result.loss, gradients, *parameters)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop at a gradient that is not finite, or skip the step.

        Raises:
            NonFiniteError: it is not, and ``non_finite`` is stop.
        """
        batches, self._rows = self._rows, []
        gradients = [value.grad for value in self.parameters() if value.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.log("train/gradient_norm", norm)
        if norm.isfinite():
            return
        rows = rows_of_every_process(torch.cat(batches))  # all are here: they share the gradient
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and rows[:, 1].all() and scaler.get_scale() > 1:
            return  # an overflow of 16-mixed: the scaler skips the step and lowers its scale
        if self.non_finite == "stop":
            raise NonFiniteError(self._where(f"The meta-gradient of meta-step {self.global_step}", "train", rows))
        for value in self.parameters():
            value.grad = None  # which optimizers leave alone, moments included
        self._skipped += 1
        self.log("train/skipped_steps", float(self._skipped))

    def _sampler_indices(self, split: str) -> Callable[[int], Sequence[int]] | None:
        """Which episodes are this process's in a batch of the split; None for data that does not tell."""
        trainer = self.trainer
        loaders = {"train": trainer.train_dataloader, "val": trainer.val_dataloaders, "test": trainer.test_dataloaders}
        return getattr(getattr(loaders[split], "sampler", None), "indices", None)

    def _row(self, split: str, batch_idx: int, finite: Tensor, *columns: Tensor) -> Tensor:
        """A row for each episode of a batch: its number (else its batch's), whether it is finite, and more.

        Args:
            split: the episodes' split.
            batch_idx: the batch's number.
            finite: whether the adapted networks' outputs are, ``[T]``.
            columns: what else is known of each, ``[T]`` or ``[T, n]``.
        """
        indices = self._sampler_indices(split)
        numbers = [batch_idx] * len(finite) if indices is None else list(indices(batch_idx))
        wide = torch.float32 if finite.device.type == "mps" else torch.float64
        parts = [torch.tensor(numbers, device=finite.device), finite, *columns]
        return torch.cat([part.to(wide).reshape(len(finite), -1) for part in parts], 1)

    def _where(self, what: str, split: str, rows: Tensor) -> str:
        """What is not finite, of which episodes, and what helps."""
        bad = sorted({int(number) for number in rows[rows[:, 1] == 0, 0].tolist()})
        noun = "batches" if self._sampler_indices(split) is None else "episodes"
        where = (
            f"{noun} {', '.join(map(str, bad))}"
            if bad
            else f"{noun} {int(rows[:, 0].min())} to {int(rows[:, 0].max())}, whose outputs are finite"
        )
        return (
            f"{what} is not finite ({split} split, {where}): lower model.inner_lr ({self.inner_lr}) or the outer rate, "
            "look at these episodes, or leave such meta-steps out with --model.non_finite skip."
        )

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """Name the remedies where memory runs out."""
        try:
            yield
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise SettingError(
                f"Memory ran out with model.tasks_per_chunk {self._inner_loop.tasks_per_chunk}: give a smaller number "
                "(1 needs least), --model.flat_memory true, or a smaller data.meta_batch_size."
            ) from error

    def _gradient(self, params: Parameters, rates: Parameters, episode: Episode) -> MetaGradient:
        first_order = self.first_order or self.current_epoch < self.first_order_epochs
        weights = multi_step_weights(self.inner_steps, self.current_epoch, self.multi_step_epochs)
        settings = Settings(first_order, weights, self.implicit_iterations)
        return self._inner_loop.gradient(self.algorithm, params, episode, rates, self.inner_steps, settings)

    def validation_step(self, batch: Episode, batch_idx: int) -> None:
        """Adapt to each task and judge before adaptation and after each inner step."""
        self._evaluate(batch, batch_idx)

    def test_step(self, batch: Episode, batch_idx: int) -> None:
        """As in validation."""
        self._evaluate(batch, batch_idx)

    def predict_step(self, batch: Episode, batch_idx: int) -> Tensor:
        """The adapted networks' class probabilities ``[T, N*Q, N]`` (regression: their outputs)."""
        episode = self._check(batch)
        outputs = self.trajectory(episode)[-1]
        if episode.support_targets.is_floating_point():
            return outputs
        return outputs[..., : int(episode.support_targets.max()) + 1].softmax(-1)  # a task may have fewer classes

    def on_validation_epoch_start(self) -> None:
        """Begin anew."""
        self._rows = []

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Log the means over all episodes."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Log the means over all episodes, and keep each episode's in ``test_scores`` ``[episodes, steps + 1]``."""
        self.test_scores = self._report("test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, the paper's choice."""
        parameters = list(self.parameters())
        # Its usual eps of 1e-8 is 0 in float16, and 0 / 0 no number.
        eps = max(1e-8, *(torch.finfo(value.dtype).tiny for value in parameters))
        return torch.optim.Adam(parameters, lr=self.outer_lr, eps=eps)

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
            checkpoint_path: a file that fit wrote.
            map_location: device of the module; None leaves it on the CPU.
            strict: whether all tensors must be there.
            trust: also import and call what it names outside this package and PyTorch.
            settings: instead of the checkpoint's, such as ``net``.

        Raises:
            SettingError: it cannot be read, or names no network, or code that is not trusted.
        """
        source = f"The checkpoint {checkpoint_path}"
        content = read_checkpoint(Path(checkpoint_path), "checkpoint_path")
        saved = {key: value for key, value in settings_of(content, cls).items() if key not in settings}
        if "net" not in settings and not isinstance(saved.get("net"), dict):
            raise SettingError(f"{source} does not name its network; use MAML.load_from_checkpoint(path, net=...).")
        if not trust:
            check_settings(saved, source, remedy="give net=..., loss=... by hand, or trust=True if you trust the file")
        if "net" in saved:
            saved["net"] = build(saved["net"], source)
        if "loss" in saved:
            saved["loss"] = locate(saved["loss"]) if saved["loss"] else F.cross_entropy
        try:
            maml = cls(**saved, **settings)
        except TypeError as error:
            raise SettingError(f"{source} holds unusable settings ({error}); give them by hand.") from error
        if strict:
            maml.on_load_checkpoint(content)
        maml.load_state_dict(content["state_dict"], strict=strict)
        return maml if map_location is None else maml.to(map_location)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the measured chunk size, so that a resumed run sums in the same order, and what was trained on."""
        checkpoint["settings"] = self.run_settings
        checkpoint["fresh"] = self._fresh
        checkpoint["tasks_per_chunk"] = dict(self._inner_loop.chosen)
        checkpoint["inputs"] = None if self.inputs is None else self.inputs._asdict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another network, naming the tensors that differ."""
        chosen = checkpoint.get("tasks_per_chunk")
        self._inner_loop.chosen = dict(chosen) if isinstance(chosen, dict) else {}
        inputs = checkpoint.get("inputs")
        self.inputs = Inputs(**inputs) if isinstance(inputs, dict) and set(inputs) == set(Inputs._fields) else None
        self._refuse_another(checkpoint)
        if self._trainer is not None:
            # Lightning (2.6) converts the module after it has loaded the weights: to float64 from rounded ones.
            self.trainer.precision_plugin.convert_module(self)
            if self.trainer.state.fn == TrainerFn.FITTING:
                resume.check_precision(self, checkpoint)
                resume.keep_callback_settings(checkpoint, self.trainer.callbacks)  # type: ignore[attr-defined]
                self._resumed = checkpoint

    def on_fit_start(self) -> None:
        """Have the settings of this run's optimizer and scheduler hold, not those in the checkpoint."""
        checkpoint, self._resumed = self._resumed, None
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        self._fresh = resume.fresh(self.trainer.optimizers, schedulers)
        if checkpoint is not None:
            resume.keep_optimizer_settings(checkpoint, self.trainer.optimizers, schedulers)

    def begin_with(self, checkpoint: dict[str, Any]) -> None:
        """Take a checkpoint's weights and learnt rates, and nothing else of its run.

        Raises:
            SettingError: it is of another network; names a tensor that differs.
        """
        self._refuse_another(checkpoint)
        self.load_state_dict(checkpoint["state_dict"])

    def _refuse_another(self, checkpoint: dict[str, Any]) -> None:
        ours = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        theirs = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
        if ours != theirs:
            name = next(n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n))
            raise SettingError(
                f"The checkpoint is of another network, or other rates were learnt: {name} is "
                f"{theirs.get(name, 'missing')} in it and {ours.get(name, 'missing')} here; give the data.ways and the "
                "model settings that it was trained with."
            )

    def _params(self) -> Parameters:
        return self.adaptation.params(self.net)

    def _rates(self) -> Parameters:
        return self.adaptation.rates(self.net, self.inner_lr)

    def _check(self, batch: Episode) -> Episode:
        episode = Episode(*batch).check()
        if self._loop.net is not self.net or not self._checked:
            self._check_fit(episode)
            self._checked = True
        if self.inputs is None and self.training and episode.support_targets.dtype == torch.int64:
            ways = getattr(getattr(self._trainer, "datamodule", None), "ways", int(episode.query_targets.max()) + 1)
            self.inputs = Inputs.of(episode.query_inputs, ways)
        return episode

    def _check_fit(self, episode: Episode) -> None:
        pretraining = episode.support_targets.numel() == 0
        if pretraining and self.inner_steps:
            raise SettingError(
                f"model.inner_steps is {self.inner_steps}, but the training episodes have no support set to adapt to "
                "(data.pretraining); set it to 0."
            )
        inputs, targets = (part[0] for part in (episode[2:] if pretraining else episode[:2]))
        modes = {layer: layer.training for layer in self.net.modules()}
        try:
            with torch.no_grad():
                outputs = self.net.train(pretraining)(inputs)
        except RuntimeError as error:
            raise SettingError(
                f"model.net does not take the episodes' inputs, {list(inputs.shape)} ({str(error).splitlines()[0]}); "
                "give a network for them, such as maml_lightning.ConvNet for images, maml_lightning.MLP for vectors."
            ) from error
        finally:
            for layer, training in modes.items():
                layer.training = training
        if targets.is_floating_point():
            if self.loss is F.cross_entropy:
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
        classes = getattr(data, "pretraining_classes" if pretraining else "ways", None) or int(targets.max()) + 1
        size = outputs.shape[-1]
        if size != classes and not (self._trainer and self.trainer.predicting and size > classes):
            where = " in training (ConvNet: pretraining_classes)" if pretraining else ""
            raise SettingError(
                f"model.net has {size} outputs, but the episodes have {classes} classes; give it {classes} "
                f"outputs{where}."
            )

    def trajectory(self, episode: Episode, steps: int | None = None) -> list[Tensor]:
        """The outputs on the query inputs before adaptation and after each inner step, without gradients.

        Args:
            episode: ``T`` tasks.
            steps: inner steps; None takes ``eval_inner_steps``.

        Returns:
            ``steps + 1`` tensors ``[T, N*Q, ...]``.
        """
        steps = self.eval_inner_steps if steps is None else steps
        with self._memory():
            return self._inner_loop.trajectory(self._params(), episode, self._rates(), steps)

    def inner_update_norms(self, episode: Episode) -> Tensor:
        """How far ``eval_inner_steps`` steps of adaptation move the parameters, in the Euclidean norm: ``[T]``."""
        with self._memory():
            return self._inner_loop.moved(self._params(), episode, self._rates(), self.eval_inner_steps)

    def _evaluate(self, batch: Episode, batch_idx: int) -> None:
        episode = self._check(batch)
        outputs, targets = self.trajectory(episode), episode.query_targets
        scores = episode_scores(outputs, targets, ignored_target(self.loss))
        finite = torch.stack(outputs, 1).isfinite().flatten(1).all(1)
        if targets.is_floating_point():
            finite &= scores.isfinite().all(1)
        scores[~finite] = torch.nan
        kept = ~scores.isnan().any(1)  # the others are left out of the report; or it raises
        loss = outputs[-1].new_zeros(())
        if kept.any():
            loss = self.loss(outputs[-1][kept].flatten(0, 1), targets[kept].flatten(0, 1))
        split = "test" if self.trainer.testing else "val"
        self._rows.append(self._row(split, batch_idx, finite, loss.expand(episode.tasks), scores))
        self.score_name = _score_name(episode)

    def _report(self, stage: str) -> Tensor:
        rows, self._rows = rows_of_every_process(torch.cat(self._rows)).cpu().double(), []
        if self.non_finite == "stop" and not rows[:, 1].all():
            raise NonFiniteError(self._where("An adapted network's output", stage, rows))
        kept = ~rows[:, 3:].isnan().any(1)
        scores, self.skipped_episodes = rows[kept, 3:], int((~kept).sum())
        if self.skipped_episodes:
            left = f"{self.skipped_episodes} of {len(kept)} episodes of the {stage} split are left out: {LEFT_OUT}"
            if not len(scores) and self.trainer.sanity_checking:  # it may become finite in training
                return scores
            if not len(scores):
                raise NonFiniteError(f"{left}; lower model.inner_lr ({self.inner_lr}), or look at these episodes.")
            rank_zero_info(f"{left}.")
        # The same numbers in every process, so that nothing is left to reduce when one of them reads them.
        self.log(f"{stage}/loss", rows[kept, 2].mean(), prog_bar=True)
        for step, score in enumerate(scores.mean(0)):
            self.log(f"{stage}/{self.score_name}_step_{step}", score)
        self.log(f"{stage}/{self.score_name}", scores[:, -1].mean(), prog_bar=True)
        return scores


def check_trainer(trainer: Trainer) -> None:
    """Check that the trainer does nothing that MAML cannot work with.

    Raises:
        SettingError: it does.
    """
    check_strategy(type(trainer.strategy).__name__)
    if getattr(trainer.strategy, "_layer_sync", None) is not None:
        raise SettingError(
            "trainer.sync_batchnorm true is not supported: normalization uses the statistics of one task, which one "
            "process has; leave it out."
        )
    averaging = any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if averaging and any(isinstance(layer, _BatchNorm) for layer in trainer.lightning_module.modules()):
        raise SettingError(
            "trainer.callbacks StochasticWeightAveraging is not supported with batch normalization, whose running "
            "statistics it collects; use EMAWeightAveraging or WeightAveraging."
        )


def _use_batch_statistics(net: nn.Module) -> None:
    """Switch running statistics off, which tasks cannot share."""
    tracking = [layer for layer in net.modules() if getattr(layer, "running_mean", None) is not None]
    if tracking:
        rank_zero_info("Running statistics of normalisation layers are off: MAML uses those of the batch at hand.")
    for layer in tracking:  # torch.func.replace_all_batch_norm_modules_ would leave instance normalisation as it is
        for name, off in {**dict.fromkeys(_RUNNING), "track_running_stats": False}.items():
            setattr(layer, name, off)


def check_strategy(strategy: str) -> None:
    """Refuse a strategy that spreads parameters over processes.

    Args:
        strategy: its name or its class's.

    Raises:
        SettingError: it does.
    """
    name = strategy.lower().replace("_", "")
    if any(word in name for word in ("fsdp", "deepspeed", "modelparallel")):
        why = "spreads parameters over processes, but each task's inner loop needs all of them"
        raise SettingError(f"trainer.strategy {strategy} {why}; use ddp.")


def _score_name(episode: Episode) -> str:
    return "mse" if episode.query_targets.is_floating_point() else "accuracy"


def ignored_target(loss: Callable[..., Tensor]) -> int:
    """The target that a loss leaves out: its ``ignore_index``, or that of `torch.nn.functional.cross_entropy`, -100."""
    if isinstance(loss, functools.partial):
        ignored = loss.keywords.get("ignore_index")
    else:
        ignored = getattr(loss, "ignore_index", None)
    return ignored if isinstance(ignored, int) else -100


def episode_scores(outputs: list[Tensor], targets: Tensor, ignored: int = -100) -> Tensor:
    """Accuracy, or of float targets mean squared error, of each episode after each step.

    Targets that are ignored, or no class of the network's, do not count. Where none of an episode's does, its accuracy
    is NaN.

    Args:
        outputs: of each step, ``[T, N*Q, ...]``.
        targets: ``[T, N*Q]`` or ``[T, Q, D]``.
        ignored: a target that does not count, see `ignored_target`.

    Returns:
        ``[T, steps]``.
    """
    if targets.is_floating_point():
        scores = [(output - targets).float().square().flatten(1).mean(1) for output in outputs]
    else:
        counts = (targets != ignored) & (targets >= 0) & (targets < outputs[0].shape[-1])
        right = [((output.argmax(-1) == targets) & counts).flatten(1).sum(1) for output in outputs]
        scores = [correct.float() / counts.flatten(1).sum(1) for correct in right]
    return torch.stack(scores, 1)


def _refuse(settings: dict[str, Any], why: str) -> None:
    for setting, value in settings.items():
        if value:
            raise SettingError(f"model.{setting} {value} has no meaning here: {why}; leave it at its default.")


def _at_least(setting: str, value: float, least: int) -> None:
    if value < least:
        raise SettingError(f"model.{setting} must be at least {least} (got {value}).")


def _positive(setting: str, value: float) -> None:
    if not value > 0:
        raise SettingError(f"model.{setting} must be above 0 (got {value}).")
