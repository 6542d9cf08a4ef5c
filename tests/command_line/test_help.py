"""Help that fits a screen, and the ways to the rest."""

import re

import pytest

from cli import main
from maml_lightning.command_line.class_paths import explanation, known, problem
from maml_lightning.training.module import MAML
from tests.runs import TINY, words

pytestmark = pytest.mark.usefixtures("folder")


def printed(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    output = capsys.readouterr()
    assert end.value.code in (0, None), output.err
    return output.out


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("(--help_all describes every setting)")
    return line


def test_the_overview_fits_a_screen(capsys):
    text = printed(capsys, "--help")
    assert len(text.splitlines()) <= 40
    for word in ("fit ", "validate ", "test ", "predict ", "configs "):
        assert f"  {word}" in text
    for name in (
        "--help_all",
        "glyphs_5way_1shot",
        "variants/anil",
        "omniglot, omniglot_20way_1shot, omniglot_5way_1shot, omniglot_lake_20way\n",
    ):
        assert name in text


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_the_first_screen_of_a_command(capsys, command):
    text = printed(capsys, command, "--help")
    assert len(text.splitlines()) <= 60
    assert max(map(len, text.splitlines())) <= 100
    assert f"{command} [--config NAME]" in text
    for name in ("OmniglotDataModule", "ImagesDataModule", "maml_lightning.ConvNet", "--data.ways", "--help_all"):
        assert name in text
    assert "--model.inner_steps          adaptation steps in training, 0 or more (1)" in text
    assert "--trainer.max_epochs         20 by default" in text


def test_the_first_screen_names_every_setting_of_the_model(capsys):
    text = printed(capsys, "fit", "--help")
    parameters = MAML.__init__.__annotations__.keys() - {"return"}
    assert [name for name in parameters if not re.search(rf"\b{name}\b", text)] == []


def test_everything(capsys):
    text = printed(capsys, "fit", "--help_all")
    assert len(text.splitlines()) < 900
    assert "torch.nn.Linear" not in text
    flags = ["model.net", "model.implicit_iterations", "checkpoint.monitor", "trainer.max_epochs", "data", "ckpt_path"]
    assert [flag for flag in flags if not re.search(rf"^  --{flag}[ ,]", text, re.MULTILINE)] == []
    assert "1000" not in text[text.index("--trainer.max_epochs") : text.index("--trainer.limit_train_batches")]


def test_help_of_a_group(capsys):
    text = printed(capsys, "fit", "--model.help")
    parameters = MAML.__init__.__annotations__.keys() - {"return"}
    assert [name for name in parameters if not re.search(rf"^  --model.{name}[ ,]", text, re.MULTILINE)] == []
    assert "--trainer" not in text
    assert re.search(r"^  --trainer.devices[ ,]", printed(capsys, "fit", "--trainer.help"), re.MULTILINE)
    assert "  --checkpoint.monitor " in printed(capsys, "test", "--checkpoint.help")


def test_help_without_a_name_gives_the_names(capsys):
    text = printed(capsys, "fit", "--data.help")
    for name in known("data"):
        assert re.search(rf"^  {name}  +\w", text, re.MULTILINE)
    assert {"GlyphsDataModule", "ImagesDataModule", "OmniglotDataModule"} < known("data").keys()
    assert "my_module.MyData" in text
    assert re.search(r"^  maml_lightning.ConvNet  +Blocks", printed(capsys, "fit", "--model.net.help"), re.MULTILINE)
    assert re.search("^  SGD ", printed(capsys, "fit", "--optimizer.help"), re.MULTILINE)
    assert re.search("^  CosineAnnealingLR ", printed(capsys, "fit", "--lr_scheduler.help"), re.MULTILINE)


def test_help_of_a_class(capsys):
    assert "--data.split" in printed(capsys, "fit", "--data.help", "OmniglotDataModule")
    assert "--data.split" in printed(capsys, "fit", "--data.help=maml_lightning.OmniglotDataModule")
    assert "--model.net.hidden_features" in printed(capsys, "fit", "--model.net.help", "MLP")  # torchvision has one too
    assert "--model.net.width" in printed(capsys, "fit", "--model.net.help", "tests.own_network.OwnNet")
    message = refused(capsys, "fit", "--data.help", "Omniglot")
    assert message.startswith("error: --data.help Omniglot: there is no such class; did you mean OmniglotDataModule?")


NAMES = "GlyphsDataModule, ImagesDataModule, OmniglotDataModule, SinusoidsDataModule, SupportQueryDataModule"


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("data", "Omniglot", "there is no such class; did you mean OmniglotDataModule? Or give one of "),
        ("data", "Zzz", "there is no such class; give one of "),
        ("data", "nowhere.MyData", "there is no module nowhere in the current folder or the environment; give one of "),
        ("data", "maml_lightning.data.Omniglot", "maml_lightning.data has no Omniglot; did you mean maml_lightning"),
        ("data", "tests.own_network.OwnNet", "it is a class, but not a LightningDataModule; give one of "),
        ("model.net", "tests.own_network.OwnNett", "has no OwnNett; did you mean tests.own_network.OwnNet? "),
        ("model.net", "torch.nn.functional.relu", "it is a function, and a class is needed, so that its settings"),
        (
            "model.net",
            "tests.command_line.test_help.annotated",
            "it is a function, and a class is needed, so that its settings",
        ),
        ("model.net", "maml_lightning.OmniglotDataModule", "it is a class, but not a torch.nn.Module; give one of "),
        ("model.net", "ConvNett", "there is no such class; did you mean maml_lightning.ConvNet? "),
        ("model.net", "tests.broken_module.Net", "importing tests.broken_module fails: No module named 'not_there'."),
        ("optimizer", "Adm", "there is no such class; did you mean Adam? "),
        ("lr_scheduler", "CosineAnnealing", "there is no such class; did you mean CosineAnnealingLR? "),
    ],
)
def test_a_class_that_cannot_be_used_is_refused_in_a_line(capsys, folder, setting, value, message):
    others = {key: flag for key, flag in TINY.items() if not f"{key}.".startswith(f"{setting}.")}
    error = refused(capsys, *words("fit", **others, **{setting: value}))
    assert error.startswith(f"error: {setting}")
    assert message in error
    if setting == "data":
        assert NAMES in error
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("data: Omniglot", "data Omniglot: there is no such class; did you mean OmniglotDataModule?"),
        ("data: {class_path: Omniglot, init_args: {ways: 3}}", "data Omniglot: there is no such class; did you mean"),
        ("data: {class_path: tests.own_network.OwnNet}", "data tests.own_network.OwnNet: it is a class, but not a "),
        (
            "{data: GlyphsDataModule, model: {net: {class_path: torch.relu}}}",
            "model.net: it is a function, and a class is needed",
        ),
    ],
)
def test_a_class_in_a_config_that_cannot_be_used(capsys, folder, config, message):
    (folder / "config.yaml").write_text(config)
    assert refused(capsys, "fit", "--config", "config.yaml").startswith(f"error: {message}")


def annotated(out_features: int = 2) -> MAML:
    raise AssertionError


@pytest.mark.parametrize(
    "flags",
    [
        ("--data.meta_batch_size", "8", "--data", "GlyphsDataModule"),
        ("--data", "GlyphsDataModule", "--model.net", "maml_lightning.MLP", "--model.net.meta_batch_size", "8"),
    ],
)
def test_a_setting_that_no_class_before_it_has_is_told_with_what_to_do(capsys, flags):
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *flags])
    assert capsys.readouterr().err == (
        "error: Option 'meta_batch_size' is not accepted; check its spelling, and give a class "
        "(--data NAME, --model.net CLASS) before its settings (--help describes every setting)\n"
    )


@pytest.mark.parametrize(
    ("setting", "near"),
    [("model.inner_learning_rate", "model.inner_lr"), ("trainr.max_epochs", "trainer.max_epochs"), ("zzzz", None)],
)
@pytest.mark.parametrize("of_file", [True, False], ids=["config", "flag"])
def test_a_setting_that_there_is_none_of_is_told_with_the_nearest_one(setting, near, of_file, folder, capsys):
    section, _, name = setting.rpartition(".")
    (folder / "config.yaml").write_text(f"{section}:\n  {name}: 1\n" if section else f"{name}: 1\n")
    words = ["--config", "config.yaml"] if of_file else ["--data", "GlyphsDataModule", f"--{setting}", "1"]
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *words])
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    assert setting in printed
    assert ("; did you mean" in printed) == (near is not None)
    assert near is None or f"; did you mean {near}? (--help" in printed


def test_a_network_without_a_class_path_is_told_with_an_example(folder, capsys):
    (folder / "config.yaml").write_text(
        "data: GlyphsDataModule\nmodel:\n  net:\n    classpath: nets.Mine\n    init_args: {width: 8}\n"
    )
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", "config.yaml"])
    assert capsys.readouterr().err.startswith(
        "error: model.net has no class_path (got {'classpath': 'nets.Mine', 'init_args': {'width': 8}}); give "
        "class_path: my_module.MyNet, and its arguments in init_args. ("
    )


def test_other_messages_are_left_alone():
    assert explanation('Parser key "model.inner_lr": Expected a <class float>. Given value: x') is None
    assert explanation("Option 'hiden' is not accepted") is None
    assert (
        explanation("Parser key \"model.net\": Problem with given class_path 'maml_lightning.ConvNet': blocks") is None
    )
    assert problem("maml_lightning.ConvNet", "model.net") is None
    assert problem("MLP", "model.net") is None


@pytest.mark.parametrize("name", ["DatasetDataModule", "FunctionDataModule", "ImagesDataModule"])
def test_help_of_a_data_module_lists_its_settings_and_not_every_class_there_is(name, capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--data.help", name])
    printed = capsys.readouterr().out
    assert end.value.code == 0
    assert "--data.query_layout" in printed or name == "FunctionDataModule"
    assert "--data.num_workers" in printed
    assert "subclasses" not in printed
    assert len(printed.splitlines()) < 150
