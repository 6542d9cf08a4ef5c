import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from maml_lightning import MAML, MLP, ConvNet, Episode, GlyphsDataModule, SettingError
from tests.reference import images


def glyphs(**changes):
    settings = {"ways": 3, "meta_batch_size": 8, "train_episodes": 480, "val_episodes": 40, "test_episodes": 20}
    return GlyphsDataModule(**{**settings, "train_classes": 30, "val_classes": 12, "test_classes": 12, **changes})


def trainer(folder, **changes):
    settings = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, **{**settings, "log_every_n_steps": 1, **changes})


def small_maml(**changes):
    torch.manual_seed(0)
    net = ConvNet(out_features=3, hidden_channels=8, blocks=3)
    return MAML(
        **{"net": net, "inner_lr": 0.4, "outer_lr": 1e-2, "eval_inner_steps": 2, "tasks_per_chunk": None, **changes}
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    maml, data, run = small_maml(), glyphs(), trainer(folder)
    untrained = trainer(folder, logger=False).validate(maml, data, verbose=False)[0]
    run.fit(maml, data)
    return maml, data, run, untrained


def test_training_raises_accuracy_on_classes_never_trained_on(trained):
    maml, data, run, untrained = trained
    after = trainer(run.default_root_dir, logger=False).validate(maml, data, verbose=False)[0]
    assert after["val/accuracy"] > untrained["val/accuracy"] + 0.1
    assert after["val/loss"] < untrained["val/loss"]


def test_logged_tags_are_those_of_the_contract(trained):
    _, _, run, _ = trained
    events = EventAccumulator(run.log_dir)
    events.Reload()
    steps = {f"val/accuracy_step_{step}" for step in range(3)}
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy", *steps} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("train/loss")) == 60


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_adapts_whatever_the_inference_mode(trained, stage, inference_mode):
    maml, data, run, _ = trained
    runner = trainer(run.default_root_dir, inference_mode=inference_mode, logger=False)
    logged = getattr(runner, stage)(maml, data, verbose=False)[0]
    prefix = {"validate": "val", "test": "test"}[stage]
    assert logged[f"{prefix}/accuracy_step_2"] > logged[f"{prefix}/accuracy_step_0"] + 0.1
    assert logged[f"{prefix}/accuracy"] == logged[f"{prefix}/accuracy_step_2"]


@pytest.mark.parametrize("inference_mode", [True, False])
def test_predict_gives_the_probabilities_of_adapted_networks(trained, inference_mode):
    maml, data, run, _ = trained
    batches = trainer(run.default_root_dir, inference_mode=inference_mode, logger=False).predict(maml, data)
    data.setup("predict")
    episode = next(iter(data.predict_dataloader()))
    by_hand = maml.adapt(episode.support_inputs[0], episode.support_targets[0])(episode.query_inputs[0]).softmax(-1)
    assert torch.allclose(batches[0][0], by_hand, atol=1e-4)
    assert not torch.allclose(batches[0][0], maml(episode.query_inputs[0]).softmax(-1), atol=1e-2)


@pytest.mark.parametrize("inference", [True, False])
def test_adapt_takes_the_gradient_steps(inference):
    maml = MAML(net=nn.Linear(2, 2), inner_lr=0.5, eval_inner_steps=2)
    x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
    with torch.inference_mode(inference):
        adapted = maml.adapt(x, y)
    weight, bias = (value.detach().clone() for value in (maml.net.weight, maml.net.bias))
    for _ in range(2):  # the gradient of cross-entropy at the logits is softmax - one-hot
        error = ((x @ weight.T + bias).softmax(-1) - F.one_hot(y)) / 2
        weight, bias = weight - 0.5 * error.T @ x, bias - 0.5 * error.sum(0)
    assert torch.allclose(adapted.weight, weight, atol=1e-6)
    assert torch.allclose(adapted.bias, bias, atol=1e-6)
    assert not torch.equal(adapted.weight, maml.net.weight)
    assert type(adapted) is nn.Linear


def test_accumulated_halves_equal_the_whole_meta_batch(tmp_path):
    whole = images(tasks=4)
    halves = [Episode(*(tensor[part] for tensor in whole)) for part in (slice(0, 2), slice(2, 4))]
    results = []
    for batches, accumulate in (([whole], 1), (halves, 2)):
        maml = small_maml().double()
        maml.configure_optimizers = lambda maml=maml: torch.optim.SGD(maml.parameters(), lr=0.1)
        loader = DataLoader(batches, batch_size=None)
        clipped = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5, "limit_val_batches": 0}
        run = trainer(tmp_path, logger=False, enable_checkpointing=False, precision="64-true", **clipped)
        run.fit(maml, loader, loader)
        results.append(torch.cat([value.flatten() for value in maml.parameters()]))
    start = torch.cat([value.flatten() for value in small_maml().double().parameters()])
    assert torch.allclose(*results, rtol=0, atol=1e-12)
    # clipped to a norm of 0.5 over net's parameters, times the learning rate 0.1
    assert (results[0] - start).norm().item() == pytest.approx(0.05, rel=1e-4)


def test_same_seed_same_weights(tmp_path):
    weights = []
    for _ in range(2):
        seed_everything(1, verbose=False)
        maml = small_maml()
        run = trainer(tmp_path, logger=False, enable_checkpointing=False, max_steps=5, limit_val_batches=0)
        run.fit(maml, glyphs())
        weights.append(torch.cat([value.flatten() for value in maml.parameters()]))
    assert torch.equal(*weights)


def test_eval_does_not_change_the_normalisation():
    maml, x = small_maml(), torch.rand(6, 1, 28, 28)
    assert torch.equal(copy.deepcopy(maml).eval()(x), maml.train()(x))


def test_output_size_is_checked():
    maml = MAML(net=ConvNet(out_features=2, hidden_channels=4, blocks=2))
    with pytest.raises(SettingError, match="2 outputs, but the episodes have 3 classes"):
        maml.training_step(Episode(*(t.float() if t.is_floating_point() else t for t in images())), 0)


def test_checkpoint_of_other_ways_is_refused(trained, tmp_path):
    run = trained[2]
    run.save_checkpoint(tmp_path / "three.ckpt")
    four = MAML(net=ConvNet(out_features=4, hidden_channels=8, blocks=3))
    with warnings.catch_warnings(), pytest.raises(SettingError, match=r"net.head.weight is \(3, 8\).*\(4, 8\)"):
        trainer(tmp_path, logger=False).test(four, glyphs(ways=4), ckpt_path=tmp_path / "three.ckpt")
    restored = MAML.load_from_checkpoint(
        tmp_path / "three.ckpt", net=ConvNet(out_features=3, hidden_channels=8, blocks=3)
    )
    assert restored.eval_inner_steps == 2
    assert torch.equal(restored.net.head.weight, trained[0].net.head.weight)


def test_regression_logs_mean_squared_error(tmp_path):
    x = torch.rand(4, 10, 1)
    episode = Episode(x, 3 * x, x, 3 * x)
    maml = MAML(net=MLP(), inner_lr=0.05, inner_steps=2, loss=F.mse_loss)
    logged = trainer(tmp_path, logger=False).validate(maml, DataLoader([episode], batch_size=None), verbose=False)[0]
    assert {"val/mse", "val/mse_step_0", "val/mse_step_2"} <= set(logged)
    with torch.no_grad():
        expected = F.mse_loss(maml.net(x.flatten(0, 1)), 3 * x.flatten(0, 1)).item()
    assert logged["val/mse_step_0"] == pytest.approx(expected, rel=1e-5)
    assert logged["val/mse_step_2"] < logged["val/mse_step_0"]


@pytest.mark.parametrize(("setting", "value"), [("inner_lr", 0.0), ("inner_steps", -1), ("outer_lr", -1.0)])
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(SettingError, match=f"model.{setting} .*{value}"):
        MAML(net=nn.Linear(1, 2), **{setting: value})


def test_validation_logs_half_the_width_of_the_interval(trained):
    maml, data, run, _ = trained
    runner = trainer(run.default_root_dir, logger=False)
    data.setup("test")
    runner.test(maml, data.test_dataloader(), verbose=False)
    scores = maml.test_scores["accuracy"][:, -1]
    logged = runner.validate(maml, data.test_dataloader(), verbose=False)[0]
    assert logged["val/accuracy_ci95"] == pytest.approx(1.96 * scores.std().item() / len(scores) ** 0.5, rel=1e-6)
