"""What counts in the scores of episodes, and what becomes of predictions."""

import csv
import functools
import json
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cli import main
from maml_lightning import MAML, Episode, NonFiniteError, PredictionReport, TestReport
from maml_lightning.training.reports import Predicted, prediction_rows
from maml_lightning.training.scores import Score, Scoring, episode_scores, ignored_target, score_of
from tests.runs import DATA, SINUSOIDS, TINY, run, words

pytestmark = pytest.mark.usefixtures("folder")


def outputs_of(predicted: list[list[int]], classes: int = 3) -> Tensor:
    return F.one_hot(torch.tensor(predicted), classes).float()


def test_ignored_targets_do_not_count():
    outputs = [outputs_of([[0, 1, 2, 0], [1, 1, 1, 1]]), outputs_of([[0, 0, 2, 2], [0, 0, 0, 0]])]
    targets = torch.tensor([[0, 1, -100, -100], [1, 0, 2, -100]])
    # by hand: 2 of 2 and 1 of 2 that count; 1 of 3 and 1 of 3
    expected = torch.tensor([[1, 0.5], [1 / 3, 1 / 3]])
    score = Score("accuracy", 1)
    assert torch.equal(episode_scores(outputs, targets, score), expected)
    # of another loss, 0 is left out, and -100 is no class
    scores = episode_scores(outputs, targets, score, 0)
    assert torch.equal(scores, torch.tensor([[1, 0], [0.5, 0]]))
    assert episode_scores(outputs, torch.full((2, 4), -100), score).isnan().all()
    assert torch.equal(
        episode_scores(outputs, targets.where(targets >= 0, 255), score), expected
    )  # 255: a loss of one's own


def test_the_ignored_target_is_the_losss():
    assert ignored_target(F.cross_entropy) == -100
    assert ignored_target(F.mse_loss) == -100
    assert ignored_target(nn.CrossEntropyLoss(ignore_index=7)) == 7
    assert ignored_target(functools.partial(F.cross_entropy, ignore_index=-1)) == -1


def test_shapes_and_loss_decide_how_outputs_are_scored():
    classes, labels, numbers = torch.tensor([0, 2, 1]), torch.tensor([0, 1, 1]), torch.rand(3, 2)
    pixels = torch.randint(3, (3, 5, 4))
    accuracy, binary, mse = Score("accuracy", 1), Score("accuracy"), Score("mse")
    for outputs, targets, loss, expected in (
        (torch.rand(3, 4), classes, F.cross_entropy, accuracy),
        (torch.rand(3, 4), classes, lambda o, t: F.cross_entropy(o, t), accuracy),
        (torch.rand(3, 4, 5, 4), pixels, F.cross_entropy, accuracy),
        (
            torch.rand(3, 5, 4, 7),
            pixels,
            lambda o, t: F.cross_entropy(o.flatten(0, 2), t.flatten()),
            Score("accuracy", 3),
        ),
        (torch.rand(3, 1), labels, F.mse_loss, binary),
        (torch.rand(3), labels, F.mse_loss, binary),
        (torch.rand(3), labels.bool(), F.mse_loss, binary),
        (torch.rand(3, 1, 5, 4), pixels.clamp(max=1), F.mse_loss, binary),
        (torch.rand(3, 1), classes, F.poisson_nll_loss, None),  # counts
        (torch.rand(3, 2), numbers, F.mse_loss, mse),
        (torch.rand(3, 1), numbers[:, 0], F.mse_loss, mse),
        (torch.rand(3, 4), numbers, F.mse_loss, None),
        (torch.rand(3, 2), numbers, nn.BCEWithLogitsLoss(), None),
        (torch.rand(3, 2), numbers, F.cross_entropy, None),
        (torch.rand(3, 4), {"class": classes}, F.cross_entropy, None),
        (torch.rand(6, 4), classes, F.cross_entropy, None),
    ):
        assert score_of(loss, outputs, targets) == expected
    # as many classes as places: the loss decides
    square, places = torch.rand(3, 5, 5), torch.randint(5, (3, 5))
    assert score_of(F.cross_entropy, square, places) == accuracy
    assert score_of(lambda o, t: F.cross_entropy(o, t), square, places) == accuracy
    assert score_of(lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()), square, places) == Score("accuracy", 2)


def test_pixels_and_single_logits_count_by_hand():
    outputs = torch.zeros(1, 1, 3, 2, 2)  # one picture of 2 by 2, all of class 0 but one
    outputs[0, 0, 2, 1, 1] = 1
    targets = torch.tensor([[[[0, 1], [255, 2]]]])
    assert episode_scores([outputs], targets, Score("accuracy", 1), 255).tolist() == [[pytest.approx(2 / 3)]]
    logits, labels = torch.tensor([[[-1.0], [2.0], [3.0], [-4.0]]]), torch.tensor([[0, 1, 0, -100]])
    assert episode_scores([logits, -logits], labels, Score("accuracy")).tolist() == [
        [pytest.approx(2 / 3), pytest.approx(1 / 3)]
    ]
    errors = episode_scores([torch.tensor([[[1.0], [3.0]]])], torch.tensor([[0.0, 1.0]]), Score("mse"))
    assert errors.tolist() == [[2.5]]


def test_the_loss_is_the_mean_of_the_episodes_losses():
    outputs, targets = torch.randn(3, 4, 2), torch.tensor([[0, 1, 0, 1], [0, -100, -100, -100], [-100] * 4])
    rows = Scoring(F.cross_entropy, Score("accuracy", 1)).rows([outputs], targets, [4, 5, 6])
    expected = [F.cross_entropy(outputs[task], targets[task]).item() for task in range(2)]
    assert rows[:2, 2].tolist() == pytest.approx(expected)
    assert rows[:, 0].tolist() == [4, 5, 6]
    assert rows[2, 2:].isnan().all()


def test_probabilities_are_of_classes_alone():
    outputs = torch.randn(2, 4, 3)
    classes, labels = torch.tensor([[0, 1], [1, 0]]), torch.randint(2, (2, 4, 3)).float()
    given = Scoring(F.cross_entropy, Score("accuracy", 1)).predictions(outputs, classes)
    assert torch.equal(given, outputs[..., :2].softmax(-1))
    pixels = torch.randn(2, 4, 3, 5, 5)
    given = Scoring(F.cross_entropy, Score("accuracy", 1)).predictions(
        pixels, torch.zeros(2, 4, 5, 5, dtype=torch.int64)
    )
    assert torch.equal(given, pixels.softmax(2))
    for score in (None, Score("mse"), Score("accuracy")):
        assert Scoring(F.cross_entropy, score).predictions(outputs, labels) is outputs


class Given(LightningDataModule):
    """Episodes of two classes told apart by the sign of the only input; some are spoilt."""

    shots = query_shots = 1
    ways = 2

    def __init__(self, spoilt: dict[int, str], episodes: int = 5):
        super().__init__()
        self.given = []
        for index in range(episodes):
            support, query = torch.tensor([[-1.0], [1.0]]), torch.tensor([[-1.0], [1.0], [-2.0], [2.0]])
            targets = torch.tensor([0, 1, 0, 1])
            how = spoilt.get(index)
            if how == "not finite":
                support = support * torch.inf
            elif how == "half":
                targets = torch.tensor([0, 1, -100, -100])
            elif how == "none":
                targets = torch.full((4,), -100)
            elif how == "wrong":
                targets = 1 - targets
            self.given.append(Episode(support, torch.tensor([0, 1]), query, targets))

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.given, batch_size=2)  # type: ignore[arg-type]

    val_dataloader = predict_dataloader = test_dataloader


def figures_of(spoilt: dict[int, str], folder: Path, **settings: object) -> dict:
    """What test_results.json says."""
    torch.manual_seed(0)
    maml = MAML(nn.Linear(1, 2), inner_lr=1.0, inner_steps=5, **settings)  # type: ignore[arg-type]
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[TestReport()],
    )
    trainer.test(maml, Given(spoilt), verbose=False)
    assert trainer.callback_metrics["test/loss"].isfinite()
    return json.loads((folder / "test_results.json").read_text())


def test_a_skipped_episode_is_in_no_figure(folder: Path, caplog: pytest.LogCaptureFixture):
    logging.getLogger("lightning.pytorch").propagate = True  # to pytest
    whole = figures_of({1: "wrong"}, folder, non_finite="skip")
    assert (whole["accuracy"], whole["episodes"], "skipped" in whole) == (0.8, 5, False)
    results = figures_of({1: "wrong", 2: "not finite"}, folder, non_finite="skip")
    assert (results["accuracy"], results["episodes"], results["skipped"]) == (0.75, 4, 1)
    # accuracies 1, 0, 1, 1: s^2 = (3/16 + 9/16) / 3
    assert results["ci95"] == pytest.approx(1.96 * 0.25**0.5 / 2)
    assert results["accuracy_per_step"][-1] == 0.75
    assert "over 4 episodes, 1 left out (" in caplog.text
    assert "1 of 5 episodes of the test split are left out: their networks' outputs are not finite" in caplog.text


def test_a_broken_episode_still_stops_by_default(folder: Path):
    with pytest.raises(NonFiniteError, match="Batch 1 of the test data has support_inputs with a value that is NaN"):
        figures_of({2: "not finite"}, folder)
    assert list(folder.iterdir()) == []


def test_nothing_left_to_report_is_one_line(folder: Path):
    for how in ("not finite", "none"):
        with pytest.raises(NonFiniteError, match="5 of 5 episodes of the test split are left out: their") as error:
            figures_of(dict.fromkeys(range(5), how), folder, non_finite="skip")
        assert "\n" not in str(error.value)
    assert list(folder.iterdir()) == []


def test_ignored_targets_are_in_no_figure(folder: Path):
    results = figures_of({0: "half", 1: "none", 2: "wrong"}, folder)
    assert (results["episodes"], results["skipped"], results["accuracy"]) == (4, 1, 0.75)


def test_no_checkpoint_is_said(folder: Path, checkpoint: Path):
    ended = run(*words("test", **{**TINY, "trainer.enable_progress_bar": None}))
    assert ended.returncode == 0, ended.stderr
    assert "No checkpoint was given (--ckpt_path): the weights are untrained.\n" in ended.stderr
    (results,) = folder.glob("lightning_logs/*/test_results.json")
    assert json.loads(results.read_text())["checkpoint"] is None


@pytest.mark.parametrize("given", ["ckpt_path", "initial_checkpoint"])
def test_a_checkpoint_is_nothing_to_be_said(
    folder: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture, given: str
):
    logging.getLogger("lightning.pytorch").propagate = True  # to pytest
    main(words("validate", **DATA, **{given: checkpoint}))
    assert "untrained" not in caplog.text


def predictions(folder: Path) -> list[list[str]]:
    (file,) = folder.glob("lightning_logs/*/predictions*.csv")
    with file.open(newline="") as opened:
        return list(csv.reader(opened))


def test_predictions_of_episodes_are_written_whatever_the_processes(folder: Path, checkpoint: Path):
    flags = {**DATA, "data.test_episodes": 7, "data.query_shots": 2, "ckpt_path": checkpoint}
    cli = main(words("predict", **flags, **{"trainer.default_root_dir": folder / "one"}))
    expected = torch.cat(cli.trainer.predict_loop.predictions)
    header, *rows = predictions(folder / "one")
    assert header == ["episode", "query", "label", "predicted", "probability_0", "probability_1", "probability_2"]
    assert [row[:2] for row in rows] == [[str(episode), str(query)] for episode in range(7) for query in range(6)]
    found = torch.tensor([[float(value) for value in row[4:]] for row in rows]).view_as(expected)
    assert torch.allclose(found, expected, atol=1e-6)
    assert [int(row[3]) for row in rows] == expected.argmax(-1).flatten().tolist()
    labels = torch.cat([batch.query_targets for batch in cli.datamodule.test_dataloader()]).flatten().tolist()
    assert [int(row[2]) for row in rows] == labels
    spread = {"trainer.strategy": "ddp", "trainer.devices": 2, "trainer.enable_progress_bar": None}
    ended = run(*words("predict", **{**flags, **spread, "trainer.default_root_dir": folder / "two"}))
    assert ended.returncode == 0, ended.stderr
    assert "Predictions of 7 episodes, 42 queries (" in ended.stderr
    again = predictions(folder / "two")
    assert [row[:4] for row in again[1:]] == [row[:4] for row in rows]
    found = torch.tensor([[float(value) for value in row[4:]] for row in again[1:]]).view_as(expected)
    assert torch.allclose(found, expected, atol=1e-5)


def test_predictions_of_regression_are_written(folder: Path):
    cli = main(words("predict", **{**SINUSOIDS, "data.test_episodes": 3, "data.query_shots": 2}))
    header, *rows = predictions(folder)
    assert header == ["episode", "query", "target_0", "predicted_0"]
    expected = torch.cat(cli.trainer.predict_loop.predictions).flatten()
    assert torch.allclose(torch.tensor([float(row[3]) for row in rows]), expected, rtol=1e-5)
    targets = torch.cat([batch.query_targets for batch in cli.datamodule.test_dataloader()]).flatten()
    assert torch.allclose(torch.tensor([float(row[2]) for row in rows]), targets, rtol=1e-5)
    assert [row[:2] for row in rows] == [["0", "0"], ["0", "1"], ["1", "0"], ["1", "1"], ["2", "0"], ["2", "1"]]


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")  # pytest resets the package's own filter
def test_predictions_of_ones_own_data_are_numbered(folder: Path):
    (folder / "predictions.csv").write_text("mine")
    maml = MAML(nn.Linear(1, 2), inner_lr=1.0, inner_steps=5)
    for loader in (Given({}).test_dataloader(), DataLoader([*Given({}).test_dataloader()], batch_size=None)):
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[PredictionReport()])
        trainer.predict(maml, loader)
    assert (folder / "predictions.csv").read_text() == "mine"
    first, second = ((folder / f"predictions-{number}.csv").read_text() for number in (1, 2))
    assert first == second
    rows = list(csv.reader(first.splitlines()))[1:]
    assert [row[0] for row in rows] == [str(episode) for episode in range(5) for _ in range(4)]
    assert all(row[2] == row[3] for row in rows)


def test_what_is_not_finite_is_not_predicted():
    inf, nan = torch.inf, torch.nan
    rows, broken = prediction_rows(
        [
            Predicted(0, torch.tensor([1, -100]), torch.tensor([[0.25, 0.75], [nan, nan]])),
            Predicted(1, torch.tensor([0]), torch.tensor([[0.5, 0.25, 0.25]])),
        ],
        Score("accuracy", 1),
    )
    assert broken == 1
    assert rows == [
        ["episode", "query", "label", "predicted", "probability_0", "probability_1", "probability_2"],
        [0, 0, 1, 1, "0.250000", "0.750000", ""],
        [0, 1, -100, "", "nan", "nan", ""],
        [1, 0, 0, 0, "0.500000", "0.250000", "0.250000"],
    ]
    given = [Predicted(4, torch.tensor([[1.0], [2.0]]), torch.tensor([[1.5], [inf]]))]
    rows, broken = prediction_rows(given, Score("mse"))
    assert rows[1:] == [[4, 0, "1", "1.5"], [4, 1, "2", ""]]
    assert broken == 1


def test_tables_of_other_predictions():
    logits = [Predicted(0, torch.tensor([1, 0]), torch.tensor([[0.5], [0.25]]))]
    rows, _ = prediction_rows(logits, Score("accuracy"))
    assert rows == [
        ["episode", "query", "label", "predicted", "output_0"],
        [0, 0, 1, 1, "0.500000"],
        [0, 1, 0, 1, "0.250000"],
    ]
    gaussian = [Predicted(0, torch.tensor([[1.0]]), torch.tensor([[0.5, 0.25]]))]
    rows, _ = prediction_rows(gaussian, None)
    assert rows == [["episode", "query", "target_0", "predicted_0", "predicted_1"], [0, 0, "1", "0.5", "0.25"]]
    labels = [Predicted(0, torch.tensor([[1, 0]]), torch.tensor([[0.5, -0.25]]))]
    assert prediction_rows(labels, Score("accuracy"))[0][1] == [0, 0, "1", "0", "0.5", "-0.25"]
