import pytest
import torch

from maml_lightning.callbacks import test_results as summarise


def test_mean_and_interval_by_hand():
    results = summarise(
        torch.tensor([[0.0, 0.5], [0.5, 1.0], [0.25, 0.75], [0.25, 0.75]], dtype=torch.float64), "accuracy"
    )
    # deviations of the last column: -1/4, 1/4, 0, 0; s^2 = (1/16 + 1/16) / 3
    assert results == {
        "accuracy": 0.75,
        "ci95": pytest.approx(1.96 * (1 / 24) ** 0.5 / 2, abs=1e-7),
        "episodes": 4,
        "inner_steps": 1,
        "accuracy_per_step": [0.25, 0.75],
    }
