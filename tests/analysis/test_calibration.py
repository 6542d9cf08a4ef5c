"""The confidence in a prediction: what it depends on, and its fit."""

import pytest
import torch

from maml_lightning import SettingError
from maml_lightning.analysis.calibration import check_threshold, confidences, fitted, kept, numbers_of


def test_of_prototypes_the_evidence_is_about_the_squared_distance_to_the_nearest():
    prototypes, features = torch.randn(3, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    logits = 2 * features @ prototypes.T - prototypes.square().sum(1)
    distances = (features[:, None] - prototypes).square().sum(-1)
    found = numbers_of(logits, features.square().sum(-1), torch.tensor([1, 2, 4]))
    evidence, odds, classes, inverse_shots = found.T
    assert torch.allclose(evidence, (-distances).logsumexp(-1), rtol=1e-9)
    assert torch.allclose(odds.sigmoid(), (-distances).softmax(-1).amax(-1).clamp(max=1 - 1e-6), rtol=1e-9)
    assert torch.allclose(classes.exp(), torch.full_like(classes, 3))
    nearest = distances.argmin(-1)
    assert inverse_shots.tolist() == [[1, 0.5, 0.25][k] for k in nearest.tolist()]
    assert torch.allclose(numbers_of(logits, None, torch.ones(3)).T[0], logits.logsumexp(-1))


def test_a_fit_finds_the_weights_that_made_the_data():
    numbers = torch.randn(100_000, 4, dtype=torch.float64) * torch.tensor([5.0, 3.0, 1.0, 0.3])
    numbers[:, 3] = 1  # one number of shots throughout
    weights = [0.5, 0.4, -0.7, 1.0, 0.0]
    probability = confidences(weights, numbers)
    right = torch.rand(len(numbers)) < probability
    found = fitted(numbers, right, torch.ones(len(numbers), dtype=torch.float64))
    assert found == pytest.approx(weights, abs=0.05)
    assert found[4] == 0  # nothing is known of other numbers of shots
    for part in (probability < 0.3, probability > 0.7):
        assert confidences(found, numbers[part]).mean() == pytest.approx(right[part].double().mean().item(), abs=0.01)


def test_what_is_perfectly_separated_has_finite_weights():
    numbers = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None].expand(20, 4)
    found = fitted(numbers, numbers[:, 0] > 0, torch.ones(20, dtype=torch.float64))
    assert torch.tensor(found).isfinite().all()
    assert (confidences(found, numbers)[-1] > 0.9).item()


@pytest.mark.parametrize("reject", [0, -1, 1.5, float("nan")])
def test_a_threshold_is_a_probability(reject):
    with pytest.raises(SettingError, match=r"^reject must be a probability above 0, at most 1 \(got "):
        check_threshold("reject", reject)
    check_threshold("reject", None)
    check_threshold("reject", 1)


WHOLE = {"weights": [0.0, 1.0, 2.0, 3.0, 4.0], "settings": {"head": "learned"}}


@pytest.mark.parametrize(
    "saved", [None, 3, {}, {"weights": [1.0]}, {**WHOLE, "weights": [1.0] * 4}, {**WHOLE, "weights": ["a"] * 5}]
)
def test_a_checkpoint_may_hold_anything(saved):
    assert kept(saved) is None
    assert kept(WHOLE) == WHOLE
