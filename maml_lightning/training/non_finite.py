"""Losses, gradients and outputs that are not finite: which episodes they are of, and what to report of the others."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from maml_lightning.episodes import Episode
from maml_lightning.errors import NonFiniteError
from maml_lightning.processes import reduce_logged, rows_of_every_process
from maml_lightning.structures import leaves
from maml_lightning.training.scores import FINITE, NUMBER

SKIPPED = "their networks' outputs are not finite, or none of their query targets counts"


def sampler_indices(trainer: Trainer, split: str) -> Callable[[int], Sequence[int]] | None:
    """The function from a batch to the numbers of its episodes on this process; None of data that has none."""
    loaders = {"train": trainer.train_dataloader, "val": trainer.val_dataloaders, "test": trainer.test_dataloaders}
    return getattr(getattr(loaders[split], "sampler", None), "indices", None)


def episode_numbers(module: Any, split: str, batch_idx: int, episode: Episode) -> list[int]:
    """The numbers of a batch's episodes in their split, or of each its batch's where the data has none.

    Raises:
        NonFiniteError: such data, which nothing has checked, have a value that is NaN or infinite.
    """
    indices = sampler_indices(module.trainer, split)
    if indices is not None:
        return list(indices(batch_idx))
    if module.non_finite == "stop":
        finite = [torch.stack([leaf.isfinite().all() for leaf in leaves(part)]).all() for part in episode]
        known = dict(zip(episode._fields, torch.stack(finite).tolist(), strict=True))  # a GPU is waited for once
        if not all(known.values()):
            name = next(name for name, is_finite in known.items() if not is_finite)
            raise NonFiniteError(
                f"Batch {batch_idx} of the {split} data has {name} with a value that is NaN or infinite; replace the "
                "value, or skip such meta-steps with --model.non_finite skip."
            )
    return [batch_idx] * episode.tasks


def report_skipped(skipped: int, steps: int) -> None:
    """Say how many of the meta-steps of a training were skipped.

    Raises:
        NonFiniteError: all were, so that nothing was learned.
    """
    if not skipped:
        return
    message = f"{skipped} of {steps} meta-steps were skipped, because their gradient was not finite"
    if skipped >= steps:
        raise NonFiniteError(f"{message}: nothing was learned; lower model.inner_lr or the outer learning rate.")
    rank_zero_info(f"{message} (train/skipped_steps).")


def describe(what: str, split: str, rows: Tensor, module: Any) -> str:
    """What is not finite, of which episodes, and the remedies, in one line.

    Args:
        what: such as ``The meta-gradient of meta-step 4``.
        split: of the episodes.
        rows: of the episodes, see `episode_rows`.
        module: MAML, for its data and its inner learning rate.
    """
    noun = "batches" if sampler_indices(module.trainer, split) is None else "episodes"
    numbers = sorted({int(number) for number in rows[rows[:, FINITE] == 0, NUMBER].tolist()})
    if numbers:
        where = f"{noun} {', '.join(map(str, numbers))}"
    else:
        first, last = int(rows[:, NUMBER].min()), int(rows[:, NUMBER].max())
        where = f"{noun} {first} to {last}, whose outputs are finite"
    return (
        f"{what} is not finite ({split} split, {where}): lower model.inner_lr ({module.inner_lr}) or the outer "
        "learning rate, look at these episodes, or skip such meta-steps with --model.non_finite skip."
    )


def scored(rows: Tensor, split: str, module: Any) -> tuple[Tensor, int]:
    """The rows of the episodes that have a score, and how many have none.

    Args:
        rows: of all evaluated episodes, see `Scoring.rows`.
        split: of the episodes, for messages.
        module: MAML.

    Raises:
        NonFiniteError: an output is not finite and ``non_finite`` is stop; or no episode has a score, unless it is the
            sanity check before training, after which outputs may become finite.
    """
    if module.non_finite == "stop" and not rows[:, FINITE].all():
        raise NonFiniteError(describe("An adapted network's output", split, rows, module))
    headline = next(iter(module.scoring.by_name(rows).values()))
    kept = rows[~headline.isnan().any(1)]
    skipped = len(rows) - len(kept)
    if skipped and (len(kept) or not module.trainer.sanity_checking):
        message = f"{skipped} of {len(rows)} episodes of the {split} split are left out: {SKIPPED}"
        if not len(kept):
            raise NonFiniteError(f"{message}; lower model.inner_lr ({module.inner_lr}), or look at these episodes.")
        rank_zero_info(f"{message}.")
    return kept, skipped


def report_scores(module: Any, split: str, rows: list[Tensor]) -> dict[str, Tensor]:
    """Log the means over an evaluation's episodes, the same numbers on every process.

    Args:
        module: MAML, which then knows how many episodes were skipped.
        split: of the episodes.
        rows: of each batch's episodes on this process, see `Scoring.rows`; emptied.

    Returns:
        each episode's scores by name, ``[episodes, steps + 1]``.
    """
    reduce_logged(module.trainer)
    everywhere = rows_of_every_process(torch.cat(rows)).cpu().double()
    rows.clear()
    kept, module.skipped_episodes = scored(everywhere, split, module)
    if len(kept):
        for name, mean in module.scoring.means(kept).items():
            module.log(f"{split}/{name}", mean, prog_bar="_step_" not in name)
    by_name = module.scoring.by_name(kept)
    if split == "val" and len(kept) > 1:
        for name, values in by_name.items():  # half the width of the 95 % interval, as in test_results.json
            module.log(f"val/{name}_ci95", 1.96 * values[:, -1].std() / len(kept) ** 0.5)
    return by_name
