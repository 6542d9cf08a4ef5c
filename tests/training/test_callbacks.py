import io
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.data import DataLoader

import maml_lightning
from cli import main
from maml_lightning import AdaptationMonitor, CostMonitor, SettingError
from maml_lightning.analysis.runs import read_scalars
from maml_lightning.training import inspection
from maml_lightning.training.reports import test_results as summarise
from tests.runs import DATA, SINUSOIDS, TINY, words


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


class Clocked(BoringModel):
    """A meta-step takes 2 seconds on a clock of its own, validation 100 and saving 1000."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def training_step(self, batch, batch_idx):
        self.now += 2
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.now += 100

    def on_save_checkpoint(self, checkpoint):
        self.now += 1000

    def train_dataloader(self):
        return DataLoader(RandomDataset(32, 8))

    def val_dataloader(self):
        return DataLoader(RandomDataset(32, 1))


@pytest.fixture
def clocked(monkeypatch):
    model = Clocked()
    monkeypatch.setattr("maml_lightning.training.cost.time", SimpleNamespace(perf_counter=lambda: model.now))
    return model


NOTHING_WRITTEN = {"logger": False, "enable_checkpointing": False}


def quiet(**settings):
    return Trainer(
        accelerator="cpu", log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False, **settings
    )


@pytest.mark.parametrize(("accumulate", "seconds"), [(1, 2.0), (2, 4.0)])
def test_seconds_of_a_meta_step_leave_out_validation_and_saving(clocked, tmp_path, accumulate, seconds):
    trainer = quiet(
        max_epochs=3,
        val_check_interval=0.5,
        accumulate_grad_batches=accumulate,
        callbacks=[CostMonitor(), ModelCheckpoint(save_top_k=-1)],
        logger=TensorBoardLogger(tmp_path, name=None, version=""),
    )
    trainer.fit(clocked)
    assert clocked.now == 3 * 8 * 2 + 7 * 100 + 6 * 1000  # validated once before training
    scalars = read_scalars(tmp_path)
    steps = 8 // accumulate
    ends = [steps - 1, 2 * steps - 1, 3 * steps - 1]
    # the first 5 meta-steps are not counted: with accumulation all of the first epoch's
    assert scalars["train/seconds_per_step"] == [(end, seconds) for end in ends if end >= 5]
    # an epoch is 8 batches, 2 validations and 2 checkpoints; the validation before training is not training's
    assert [value * 60 for _, value in scalars["train/minutes"]] == pytest.approx([2216, 4432, 6648])
    memory = [value for _, value in scalars["train/peak_memory_mb"]]
    assert len(memory) == 3
    assert memory == sorted(memory)


def test_minutes_go_on_where_a_checkpoint_was_saved(clocked, tmp_path):
    trainer = quiet(max_epochs=1, logger=False, enable_checkpointing=False, callbacks=[CostMonitor()])
    trainer.fit(clocked)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    clocked.now += 1e6
    cost = CostMonitor()
    for ckpt_path in (tmp_path / "a.ckpt", None):  # then anew, from the start
        trainer = quiet(max_epochs=2, logger=False, enable_checkpointing=False, callbacks=[cost])
        trainer.fit(clocked, ckpt_path=ckpt_path)
        assert trainer.callback_metrics["train/minutes"] * 60 == pytest.approx(2 * (8 * 2 + 100))


def test_old_names_and_checkpoints_of_callbacks_keep_working():
    with pytest.warns(DeprecationWarning, match=r"maml_lightning.Cost is now maml_lightning.CostMonitor"):
        assert maml_lightning.Cost is CostMonitor
    with pytest.warns(DeprecationWarning, match=r"Inspection is now maml_lightning.AdaptationMonitor"):
        from maml_lightning import Inspection
    assert Inspection is AdaptationMonitor
    with pytest.raises(AttributeError, match="has no attribute 'Costs'"):
        maml_lightning.Costs  # noqa: B018
    assert CostMonitor().state_key == "Cost"  # the key of the state in checkpoints of earlier releases


def test_steps_that_draw_their_data_slowly_show_it(clocked):
    class Slow(RandomDataset):
        def __getitem__(self, index):
            clocked.now += 4
            return super().__getitem__(index)

    trainer = quiet(
        max_epochs=2, limit_val_batches=0, logger=False, enable_checkpointing=False, callbacks=[CostMonitor()]
    )
    trainer.fit(clocked, DataLoader(Slow(32, 8)))
    assert trainer.callback_metrics["train/seconds_per_step"] == (8 * 2 + 7 * 4) / 8  # the epoch's first is ready


def test_nothing_to_time_in_a_run_of_few_steps(clocked):
    trainer = quiet(
        max_steps=5, limit_val_batches=0, logger=False, enable_checkpointing=False, callbacks=[CostMonitor()]
    )
    trainer.fit(clocked)
    assert "train/seconds_per_step" not in trainer.callback_metrics
    assert trainer.callback_metrics["train/peak_memory_mb"] > 50  # torch alone takes more


def inspected(folder, **flags):
    cli = main(words("fit", **{**TINY, "trainer.default_root_dir": folder, "trainer.max_epochs": 2, **flags}))
    events = EventAccumulator(cli.trainer.log_dir, size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    return cli, events


def test_inspection_shows_what_adaptation_does(tmp_path):
    cli, events = inspected(tmp_path, **{"model.learn_inner_lr": "step", "model.inner_steps": 2})
    tags = events.Tags()
    assert set(tags["images"]) == {"inspect/episodes", "inspect/adaptation"}
    assert {"val/inner_update_norm", "train/gradient_norm", "train/loss", "val/accuracy"} <= set(tags["scalars"])
    rates = {name.replace("/", "."): rate for name, rate in cli.model.adaptation.learnt.items()}
    assert {tag for tag in tags["scalars"] if tag.startswith("variables/inner_lr/")} == {
        f"variables/inner_lr/{name}/step_{step}" for name in rates for step in (0, 1)
    }
    for name, rate in rates.items():
        shown = [events.Scalars(f"variables/inner_lr/{name}/step_{step}")[-1].value for step in (0, 1)]
        assert shown == rate.tolist()
    assert "hp_metric" not in tags["scalars"]
    assert tags["histograms"] == []
    for tag in tags["images"]:
        assert [image.step for image in events.Images(tag)] == [2, 4]
    with Image.open(io.BytesIO(events.Images("inspect/episodes")[0].encoded_image_string)) as sheet:
        # two episodes of 3 ways, 1 query per class: 3 tiles wide, 3 parts each
        assert sheet.size == (3 * 90 + 6, 2 * 3 * (28 + 108))
        red, green, blue = np.asarray(sheet.convert("RGB")).astype(int).transpose(2, 0, 1)
    assert ((red > green + 100) & (red > blue + 100)).any()  # captions of wrong predictions
    assert len(events.Scalars("train/gradient_norm")) == 4


def test_the_update_norm_is_that_of_the_parameters(tmp_path):
    cli, events = inspected(tmp_path)
    data, maml = cli.datamodule, cli.model
    batch = next(iter(data.val_dataloader()))
    expected = []
    for inputs, targets in zip(batch.support_inputs[:2], batch.support_targets[:2], strict=True):
        adapted = maml.adapt(inputs, targets).parameters()
        moved = [(a - b).flatten() for a, b in zip(adapted, maml.net.parameters(), strict=True)]
        expected.append(torch.cat(moved).norm().item())
    shown = events.Scalars("val/inner_update_norm")[-1]
    assert shown.value == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_inspection_is_off_by_a_flag(tmp_path):
    _, events = inspected(tmp_path, **{"inspection.episodes": 0})
    assert events.Tags()["images"] == []
    with pytest.raises(SettingError, match=r"inspection.episodes must be at least 0 \(got -1\)"):
        AdaptationMonitor(episodes=-1)


def test_what_cannot_be_shown_does_not_stop_a_run(tmp_path, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no memory\nat all")

    logging.getLogger("lightning.pytorch").propagate = True  # to pytest
    monkeypatch.setattr(inspection, "_episodes_sheet", broken)
    cli, events = inspected(tmp_path)
    assert (cli.trainer.current_epoch, events.Tags()["images"]) == (2, [])
    said = {record.getMessage() for record in caplog.records if "inspection" in record.getMessage()}
    assert said == {"inspection shows nothing here (no memory); --inspection.episodes 0 leaves it out."}
    assert len({id(record) for record in caplog.records if record.getMessage() in said}) == 1


def test_regression_is_shown_as_curves(tmp_path, monkeypatch):
    figures = []
    drawn = inspection._regression_figure
    monkeypatch.setattr(
        inspection, "_regression_figure", lambda *given: figures.append((given, drawn(*given))) or figures[-1][1]
    )
    cli = main(words("fit", **{**SINUSOIDS, "trainer.default_root_dir": tmp_path}))
    events = EventAccumulator(cli.trainer.log_dir, size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"inspect/adaptation", "inspect/episodes"}
    ((first, outputs, episodes, steps), figure) = figures[-1]
    assert len(figure.axes) == episodes == 2
    assert [axes.get_subplotspec().colspan.start for axes in figure.axes] == [0, 0]  # TensorBoard shrinks wide figures
    for task, axes in enumerate(figure.axes):
        true, before, after, support = ({*zip(*line.get_data(), strict=True)} for line in axes.lines)
        inputs = first.query_inputs[task, :, 0].tolist()
        for line, values in ((true, first.query_targets), (before, outputs[0]), (after, outputs[steps])):
            assert line == {*zip(inputs, values[task, :, 0].tolist(), strict=True)}
        assert len(support) == first.support_inputs.shape[1]


def table_row(folder):
    """Settings and scores of a run in TensorBoard's table of hyperparameters."""
    events = EventAccumulator(str(folder))
    events.Reload()
    row, columns = (
        HParamsPluginData.FromString(events.summary_metadata[f"_hparams_/{part}"].plugin_data.content)
        for part in ("session_start_info", "experiment")
    )
    values = {key: getattr(value, value.WhichOneof("kind")) for key, value in row.session_start_info.hparams.items()}
    return events, values, [info.name.tag for info in columns.experiment.metric_infos]


def test_a_test_fills_the_row_of_the_run_that_trained_the_network(tmp_path):
    trained = main(words("fit", **{**TINY, "trainer.default_root_dir": tmp_path, "model.first_order": "true"}))
    folder = Path(trained.trainer.log_dir)
    path = folder / "checkpoints" / "best.ckpt"
    cli = main(words("test", **DATA, ckpt_path=path, **{"trainer.default_root_dir": tmp_path}))
    assert Path(cli.trainer.log_dir) != folder
    events, settings, scores = table_row(folder)
    assert {"val/accuracy", "test/accuracy"} == set(scores)
    assert (settings["network"], settings["ways"], settings["first_order"]) == ("ConvNet", 3, True)
    assert settings["inner_lr"] == pytest.approx(cli.model.inner_lr)
    assert not {"compile", "algorithm", "_instantiator"} & set(settings)  # as by default; Lightning's own
    (shown,) = events.Scalars("test/accuracy")
    assert shown.value == pytest.approx(cli.trainer.logged_metrics["test/accuracy"].item(), abs=1e-6)
    assert not list(Path(cli.trainer.log_dir).rglob("*.test"))


def test_without_the_run_that_trained_it_a_test_has_a_row_of_its_own(tmp_path, checkpoint):
    alone = shutil.copy(checkpoint, tmp_path / "alone.ckpt")
    cli = main(words("test", **DATA, ckpt_path=alone, **{"trainer.default_root_dir": tmp_path}))
    events, settings, scores = table_row(cli.trainer.log_dir)
    assert scores == ["test/accuracy"]
    assert settings["ways"] == 3
    assert events.Scalars("test/accuracy")[-1].value == pytest.approx(
        cli.trainer.logged_metrics["test/accuracy"].item(), abs=1e-6
    )


def test_one_rate_for_each_weight_is_shown_as_their_mean_and_a_histogram(tmp_path):
    cli, events = inspected(tmp_path, **{"model.learn_inner_lr": "weight"})
    for name, rate in cli.model.adaptation.learnt.items():
        tag = f"variables/inner_lr/{name.replace('/', '.')}"
        assert events.Scalars(tag)[-1].value == pytest.approx(rate.mean().item(), rel=1e-6)
        assert events.Histograms(tag)[-1].histogram_value.num == rate.numel()


def test_the_layout_has_scores_first_and_a_chart_for_each_rate(tmp_path):
    cli, events = inspected(tmp_path, **{"model.learn_inner_lr": "step", "model.inner_steps": 2})
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["accuracy", "loss", "inner learning rates"]
    charts = [chart for category in layout.category for chart in category.chart]
    assert len(charts) == 2 + 1 + len(cli.model.adaptation.learnt)
    for chart in charts:  # what TensorBoard would draw in it
        assert any(re.search(pattern, tag) for pattern in chart.multiline.tag for tag in events.Tags()["scalars"])
