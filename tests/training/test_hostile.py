"""Checkpoints and configs that try to run code: nothing that they name is imported or called."""

import os
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from cli import main
from maml_lightning import MAML, SettingError, load
from maml_lightning.files import write_whole
from maml_lightning.trained import strip
from maml_lightning.training.checkpoints import last_checkpoint, read_checkpoint
from tests.own_network import FixedNet
from tests.runs import TINY, words

CANARY = "canary"  # a file that exists once anything hostile has run
MODULE = "hostile_module"
# Imported, constructed or called, each leaves the canary.
CODE = f"""
from pathlib import Path
from torch import Tensor, nn, optim
Path("{CANARY}").touch()
class Net(nn.Module):
    pass
class Child(nn.Linear):
    pass
class Adam(optim.Adam):
    pass
def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.mean()
"""


class Pickled:
    def __reduce__(self):
        return os.mkdir, (CANARY,)


@pytest.fixture(autouse=True)
def hostile_folder(folder, monkeypatch):
    """The working directory, with a module of a stranger's that can be imported from it."""
    (folder / f"{MODULE}.py").write_text(CODE)
    (folder / "evil").write_text(f"class_path: {MODULE}.Net\n")
    (folder / "evil.yaml").write_text(f"class_path: {MODULE}.Net\n")
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop(MODULE, None)


@pytest.fixture
def nothing_ran(hostile_folder):
    """Asserts in the end that no hostile code ran and no module of it was imported."""
    before = set(sys.modules)
    yield
    assert not (hostile_folder / CANARY).exists()
    assert MODULE not in sys.modules
    assert not {name for name in set(sys.modules) - before if name.split(".")[0] in ("antigravity", "this", "turtle")}


def convnet(**arguments):
    return {"class_path": "maml_lightning.ConvNet", "init_args": {"hidden_channels": 4, "blocks": 2, **arguments}}


SHELL = {"class_path": "os.system", "init_args": {"command": f"touch {CANARY}"}}
# What the hyperparameters of a checkpoint name.
NAMED = {
    "function": {"net": SHELL},
    "process": {"net": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", CANARY]}}},
    "builtin": {"net": {"class_path": "builtins.exec", "init_args": {"source": f"open('{CANARY}', 'w')"}}},
    "no module": {"net": {"class_path": "pathlib.Path", "init_args": {}}},
    "stranger's network": {"net": {"class_path": f"{MODULE}.Net"}},
    "import alone": {"net": {"class_path": "antigravity.fly_geohash", "init_args": {}}},
    "hub": {"net": {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": ".", "source": "local"}}},
    "graph module": {"net": {"class_path": "torch.fx.GraphModule", "init_args": {"root": {}, "graph": {}}}},
    "nested function": {"net": convnet(in_channels=SHELL)},
    "nested in a list": {"net": convnet(hidden_channels=[1, {"x": SHELL}])},
    "nested class": {
        "net": {
            "class_path": "torch.nn.TransformerEncoder",
            "init_args": {"encoder_layer": {"class_path": f"{MODULE}.Child"}, "num_layers": 1},
        }
    },
    "nested name": {
        "net": {
            "class_path": "torch.nn.TransformerEncoderLayer",
            "init_args": {"d_model": 4, "nhead": 1, "activation": f"{MODULE}.loss"},
        }
    },
    "nested file": {
        "net": {"class_path": "torch.nn.TransformerEncoder", "init_args": {"encoder_layer": "evil", "num_layers": 1}}
    },
    "keyword arguments": {"net": {"class_path": "torch.nn.Linear", "dict_kwargs": {"in_features": SHELL}}},
    "network by file": {"net": "evil.yaml"},
    "network by name": {"net": f"{MODULE}.Net"},
    "loss": {"net": convnet(), "loss": "os.system"},
    "stranger's loss": {"net": convnet(), "loss": f"{MODULE}.loss"},
    "loss that loads": {"net": convnet(), "loss": "torch.load"},
    "loss of the package": {"net": convnet(), "loss": "maml_lightning.trained.strip"},
    "loss by class": {"net": convnet(), "loss": SHELL},
    "setting": {"net": convnet(), "inner_lr": SHELL},
    "setting in a list": {"net": convnet(), "adapted_parameters": [SHELL]},
    "instantiator": {"_instantiator": "os.system", "net": {"class_path": f"{MODULE}.Net"}},
    "class of the module": {"_class_path": f"{MODULE}.Net", "net": {"class_path": f"{MODULE}.Net"}},
}
TRAINING = {
    "optimizer_states": [],
    "lr_schedulers": [],
    "loops": {"fit_loop": {}},
    "callbacks": {},
    "global_step": 0,
    "epoch": 0,
}
# What the settings of its run name.
RUN = {
    "optimizer": {"optimizer": {"class_path": f"{MODULE}.Adam", "init_args": {"lr": 0.1}}},
    "optimizer that is none": {"optimizer": SHELL},
    "scheduler": {"lr_scheduler": SHELL},
    "scheduler's argument": {
        "lr_scheduler": {
            "class_path": "torch.optim.lr_scheduler.LambdaLR",
            "init_args": {"lr_lambda": f"{MODULE}.loss"},
        }
    },
}


def write(named, file="evil.ckpt", **more):
    content = {"state_dict": {"net.head.weight": torch.ones(3, 4)}, "hyper_parameters": named, **TRAINING, **more}
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file)
    return file


DATA = {key: value for key, value in TINY.items() if not key.startswith("model.")}
LAST = "lightning_logs/version_0/checkpoints/last.ckpt"
WAYS = {
    "load": lambda: load("evil.ckpt"),
    "load_from_checkpoint": lambda: MAML.load_from_checkpoint("evil.ckpt"),
    "test": lambda: main(words("test", **DATA, ckpt_path="evil.ckpt")),
    "resume": lambda: main(words("fit", **DATA, ckpt_path="evil.ckpt")),
    "initial": lambda: main(words("fit", **DATA, initial_checkpoint="evil.ckpt")),
    "last": lambda: main(words("fit", **DATA, ckpt_path="last")),
}


@pytest.mark.usefixtures("nothing_ran")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMED)
def test_nothing_that_a_checkpoint_names_runs(name, way):
    write(NAMED[name], LAST if way == "last" else "evil.ckpt")
    with pytest.raises(SettingError) as error:
        WAYS[way]()
    assert len(str(error.value).splitlines()) == 1
    assert "evil.ckpt" in str(error.value) or "last.ckpt" in str(error.value)


@pytest.mark.usefixtures("nothing_ran")
@pytest.mark.parametrize("way", ["resume", "last"])
@pytest.mark.parametrize("name", RUN)
def test_nothing_that_the_settings_of_a_run_name_runs(name, way):
    write({"net": convnet()}, LAST if way == "last" else "evil.ckpt", settings=RUN[name])
    with pytest.raises(SettingError, match=r"names (optimizer|lr_scheduler).*so nothing runs"):
        WAYS[way]()


def pickled(file):
    torch.save({"state_dict": {}, "callbacks": Pickled()}, file)


def bare_pickle(file):
    file.write_bytes(pickle.dumps({"state_dict": Pickled()}))


def old_format(file):
    torch.save({"state_dict": Pickled()}, file, _use_new_zipfile_serialization=False)


def two_in_one(file):
    torch.save({"state_dict": {"w": torch.ones(1)}, "hyper_parameters": {}}, file)
    name = next(name for name in zipfile.ZipFile(file).namelist() if name.endswith("data.pkl"))
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr(name, pickle.dumps({"state_dict": Pickled()}, protocol=2))


def bomb(file):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))


def climbing(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"../{CANARY}", "x")
        archive.writestr("archive/data.pkl", pickle.dumps(Pickled()))


def scripted(file):
    class Net(nn.Module):
        def forward(self, x):
            return x

    torch.jit.save(torch.jit.trace(Net(), torch.ones(1)), file)


FILES = [pickled, bare_pickle, old_format, two_in_one, bomb, climbing, scripted]


@pytest.mark.usefixtures("nothing_ran")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("link", [False, True], ids=["file", "link"])
@pytest.mark.parametrize("make", FILES)
def test_files_that_hold_code_are_not_loaded(make, link, hostile_folder):
    place = hostile_folder / LAST
    place.parent.mkdir(parents=True)
    make(hostile_folder / "evil.ckpt")
    if link:
        place.symlink_to(hostile_folder / "evil.ckpt")
    else:
        place.write_bytes((hostile_folder / "evil.ckpt").read_bytes())
    for way in WAYS.values():
        with pytest.raises(SettingError):
            way()
    with pytest.raises(SettingError):
        strip(hostile_folder / "evil.ckpt", hostile_folder / "out.ckpt")


@pytest.mark.usefixtures("nothing_ran")
def test_what_is_no_file_is_passed_over(hostile_folder):
    checkpoints = (hostile_folder / LAST).parent
    checkpoints.mkdir(parents=True)
    (checkpoints / "last.ckpt").symlink_to("nowhere")
    (checkpoints / "folder.ckpt").mkdir()
    os.mkfifo(checkpoints / "pipe.ckpt")
    assert last_checkpoint(checkpoints, "") is None
    with pytest.raises(SettingError, match="is not a file"):
        read_checkpoint(checkpoints / "pipe.ckpt")


def test_a_link_in_the_place_of_a_growing_file_is_not_followed(hostile_folder):
    mine = hostile_folder / "mine"
    mine.write_text("kept")
    (hostile_folder / ".last.part").symlink_to(mine)
    write_whole(hostile_folder / "last.ckpt", lambda file: file.write(b"new"), ".last.part")
    assert (mine.read_text(), (hostile_folder / "last.ckpt").read_bytes()) == ("kept", b"new")


BY_HAND = [
    {"model.net": "os.system"},
    {"model.net": "subprocess.Popen"},
    {"model.net": "pathlib.Path"},
    {"model.loss": "os.system"},
    {"model.loss": "torch.load"},
    {"model.loss": "subprocess.Popen"},
    {"model.loss": "tests.training.test_hostile.one_argument"},
    {"optimizer": "os.system"},
    {"lr_scheduler": "os.system"},
    {"trainer.callbacks": "os.system"},
    {"trainer.logger": "os.system"},
    {"data": "os.system"},
]


def one_argument(command: str) -> torch.Tensor:
    Path(CANARY).touch()
    return torch.zeros(())


@pytest.mark.usefixtures("nothing_ran")
@pytest.mark.parametrize("flags", BY_HAND)
def test_what_is_given_by_hand_is_not_called_where_it_is_of_another_type(flags):
    with pytest.raises((SystemExit, SettingError)):
        main(words("fit", **{**DATA, **flags}))


@pytest.fixture
def own(hostile_folder):
    """A checkpoint of a network of the user's own."""
    flags = {**DATA, "model.net": "tests.own_network.FixedNet", "model.tasks_per_chunk": "null"}
    main(words("fit", **flags))
    return Path(LAST)


def test_ones_own_network_is_given_by_hand_or_trusted(own):
    with pytest.raises(SettingError, match=r"'tests.own_network.FixedNet', which is not .*--trust_checkpoint true"):
        main(words("test", **DATA, ckpt_path=own))
    for flags in ({"model.net": "tests.own_network.FixedNet"}, {"trust_checkpoint": "true"}):
        assert type(main(words("test", **DATA, **flags, ckpt_path=own)).model.net).__name__ == "FixedNet"
    with pytest.raises(SettingError, match=r"names net 'tests.own_network.FixedNet'.* trust=True"):
        load(own)
    assert type(load(own, trust=True).net).__name__ == "FixedNet"
    weights = load(own, trust=True).net.head.weight
    by_hand = MAML.load_from_checkpoint(own, net=FixedNet())
    assert torch.equal(by_hand.net.head.weight, weights)


def test_the_hostile_checkpoints_are_real_ones(hostile_folder):
    write(NAMED["stranger's network"])
    with pytest.raises(SettingError):
        load("evil.ckpt", trust=True)  # the weights are another network's
    assert (hostile_folder / CANARY).exists()


def test_a_loss_and_a_network_of_pytorch_load():
    net = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 1}}
    weights = {f"net.{name}": value for name, value in nn.Linear(2, 1).state_dict().items()}
    write({"net": net, "loss": "torch.nn.functional.mse_loss"}, "linear.ckpt", state_dict=weights)
    maml = load("linear.ckpt")
    assert torch.equal(maml.net.weight, weights["net.weight"])
    assert maml.loss is nn.functional.mse_loss
