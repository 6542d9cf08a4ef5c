"""What a run leaves behind for people: the test report."""

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor

from maml_lightning.module import MAML

DIGITS = 7  # an episode's score is a float32


def test_results(scores: Tensor, name: str) -> dict:
    """Mean and 95 % interval over episodes.

    Args:
        scores: ``[episodes, steps + 1]``, one accuracy (or mean squared error) per episode and inner step.
        name: what the scores are, ``accuracy`` or ``mse``.

    Returns:
        ``{name, ci95, episodes, inner_steps, name_per_step}``; ``ci95`` is the half-width 1.96 s / sqrt(episodes).
    """
    final = scores[:, -1]
    return {
        name: round(final.mean().item(), DIGITS),
        "ci95": round(1.96 * final.std().item() / len(final) ** 0.5, DIGITS) if len(final) > 1 else None,
        "episodes": len(final),
        "inner_steps": scores.shape[1] - 1,
        f"{name}_per_step": [round(score, DIGITS) for score in scores.mean(0).tolist()],
    }


class TestReport(Callback):
    """Writes ``test_results.json`` into the run's log folder and prints its headline."""

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and print."""
        if not isinstance(pl_module, MAML) or pl_module.test_scores is None:
            return
        scores, name = pl_module.test_scores, pl_module.score_name
        results = test_results(scores.cpu(), name)
        data = getattr(trainer, "datamodule", None)
        task = {setting: getattr(data, setting, None) for setting in ("ways", "shots", "query_shots")}
        results = {**results, **task, "checkpoint": None if trainer.ckpt_path is None else str(trainer.ckpt_path)}
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "test_results.json"
        file.write_text(json.dumps(results, indent=2) + "\n")
        scale, unit = (100, " %") if name == "accuracy" else (1, "")
        interval = "" if results["ci95"] is None else f" ± {scale * results['ci95']:.2f}"
        rank_zero_info(
            f"Test {name} after {results['inner_steps']} inner steps: {scale * results[name]:.2f}{interval}{unit} "
            f"over {results['episodes']} episodes ({file})"
        )
