"""The protocol that a test states."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from cli import main
from maml_lightning import MAML, ConvNet, Episode
from maml_lightning.training.reports import is_transductive, protocol_text
from tests.runs import DATA, TINY, words

LESS = {"in_channels": 1, "out_features": 3, "hidden_channels": 4, "blocks": 2, "pooling": False}


class Centered(nn.Module):
    """Depends on its batch without a layer that says so; draws random numbers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        random.random(), torch.rand(1)
        return self.head((x - x.mean(0)).flatten(1))


class Pairs(Centered):
    """Takes no single example."""

    def forward(self, x):
        assert len(x) > 1
        return super().forward(x)


def episode():
    return Episode(
        torch.rand(2, 3, 1, 8, 8), torch.arange(3).repeat(2, 1), torch.rand(2, 6, 1, 8, 8), torch.zeros(2, 6).long()
    )


@pytest.mark.parametrize(
    ("net", "settings", "expected"),
    [
        (ConvNet(**LESS), {}, True),
        (ConvNet(**LESS), {"query_statistics": "support"}, False),
        (ConvNet(**LESS), {"query_statistics": "support", "head": "prototypes"}, False),
        (ConvNet(**LESS, normalization="group"), {}, False),
        (ConvNet(**LESS, normalization="instance"), {}, False),
        (ConvNet(**LESS, normalization="tasknorm"), {}, True),
        (Centered(), {}, True),
        (Centered(), {"query_statistics": "support"}, True),
        (Pairs(), {}, None),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double(), {}, False),
    ],
)
def test_whether_predictions_depend_on_other_queries(net, settings, expected):
    maml = MAML(net, **settings).eval()
    dtype = next(net.parameters()).dtype
    given = Episode(*(part.to(dtype) if part.is_floating_point() else part for part in episode()))
    before = {name: value.clone() for name, value in maml.state_dict().items()}
    states = random.getstate(), torch.get_rng_state()
    with torch.inference_mode():
        assert is_transductive(maml, given) is expected
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert all(torch.equal(value, before[name]) for name, value in maml.state_dict().items())


def test_a_test_says_that_each_query_is_by_itself(folder):
    flags = {"model.query_statistics": "support", "model.head": "prototypes", "data.query_shots": 2}
    main(words("fit", **TINY, **flags, **{"trainer.limit_train_batches": 1}))
    checkpoint = folder / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    cli = main(words("test", **DATA, **flags, ckpt_path=checkpoint))
    results = json.loads((Path(cli.trainer.log_dir) / "test_results.json").read_text())
    assert (results["transductive"], results["query_layout"]) == (False, "balanced")
    assert (results["query_statistics"], results["head"]) == ("support", "prototypes")
    assert protocol_text(results) == "3-way 1-shot, 2 queries per class, each query by itself"


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({}, "5-way 1-shot, 1 query per class, transductive"),
        ({"query_layout": "random"}, "5-way 1-shot, 1 query per class on average, random, transductive"),
        (
            {"ways": None, "query_shots": 15, "transductive": False},
            "1-shot, 15 queries per episode, each query by itself",
        ),
        ({"ways": None, "shots": None, "query_shots": None, "transductive": None}, ""),
        ({"eval_rotations": True}, "5-way 1-shot, 1 query per class, each class rotated at random, transductive"),
    ],
)
def test_the_protocol_in_words(changed, text):
    usual = {"ways": 5, "shots": 1, "query_shots": 1, "query_layout": "balanced", "transductive": True}
    assert protocol_text({**usual, **changed}) == text
