"""Old names import for one release, with a warning that gives the new one."""

import importlib

import pytest

import maml_lightning
from maml_lightning import data, episodes


@pytest.mark.parametrize("module", ["maml_lightning", "maml_lightning.episodes"])
def test_inputs_is_now_input_spec(module: str):
    with pytest.warns(DeprecationWarning, match=rf"^{module}.Inputs is now {module}.InputSpec; "):
        old = importlib.import_module(module).Inputs
    assert old is maml_lightning.InputSpec is episodes.InputSpec


def test_every_old_name_of_the_sampling_of_episodes():
    episodic = importlib.import_module("maml_lightning.data.episodic")
    for name in ("TaskDataModule", "EpisodicDataModule", "EpisodeDataset", "TaskDataset", "Split"):
        with pytest.warns(DeprecationWarning, match=rf"episodic.{name} is now maml_lightning.data.{name}; "):
            assert getattr(episodic, name) is getattr(data, name)
    for name in ("EpisodeSampler", "EpisodeLoader", "random_bits", "below", "choose", "at_least"):
        with pytest.warns(DeprecationWarning, match=rf"episodic.{name} is now maml_lightning.data."):
            assert getattr(episodic, name).__name__ == name


def test_another_name_is_an_error_as_ever():
    with pytest.raises(AttributeError, match="module 'maml_lightning' has no attribute 'Input'"):
        _ = maml_lightning.Input
