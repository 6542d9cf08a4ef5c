import copy
import gc
import pickle
import weakref
from array import array
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maml_lightning import ConvNet
from maml_lightning.engine import fingerprints
from maml_lightning.engine.fingerprints import fingerprint, has_hooks


def fingerprint_of(value):
    return fingerprint((value,))


@dataclass
class Options:
    temperature: float = 1.0


def network():
    net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.ReLU())
    net.options, net.scales, net.own, net.act = Options(), [1.0, 2.0], SimpleNamespace(bias=1), torch.tanh
    net.table = torch.zeros(2)
    return net


def assert_changes(change, net):
    """A change makes another fingerprint, which stays the same without one."""
    before = fingerprint_of(net)
    assert fingerprint_of(net) == before
    change(net)
    assert fingerprint_of(net) != before
    assert fingerprint_of(net) == fingerprint_of(net)


CHANGES = {
    "mode": lambda net: net[1].eval(),
    "plain attribute": lambda net: setattr(net[1], "p", 0.1),
    "attribute's type": lambda net: setattr(net[1], "p", True),
    "new attribute": lambda net: setattr(net, "counter", 0),
    "layer": lambda net: net.__setitem__(2, nn.Tanh()),
    "order of layers": lambda net: net.insert(0, net.pop(2)),
    "hook": lambda net: net[0].register_forward_hook(print),
    "inside a list": lambda net: net.scales.append(3.0),
    "inside a dataclass": lambda net: setattr(net.options, "temperature", 5.0),
    "inside an object": lambda net: setattr(net.own, "bias", 2),
    "function": lambda net: setattr(net, "act", torch.relu),
    "method": lambda net: setattr(net, "forward", lambda x: x),
    "tensor replaced": lambda net: setattr(net, "table", torch.zeros(2)),
    "tensor written": lambda net: net.table.add_(1),
    "bias removed": lambda net: setattr(net[0], "bias", None),
    "parametrized": lambda net: torch.nn.utils.parametrizations.orthogonal(net[0]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_forward_may_read_is_another_fingerprint_of(change):
    net = network()
    assert_changes(CHANGES[change], net)


def test_values_of_parameters_and_copies_do_not_matter():
    net = ConvNet(hidden_channels=2)
    before = fingerprint_of(net)
    with torch.no_grad():
        net.head.weight += 1
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), ConvNet(hidden_channels=2)]
    assert all(fingerprint_of(each) == before and hash(fingerprint_of(each)) == hash(before) for each in (net, *copies))


def test_partials_and_closures_are_looked_into():
    assert fingerprint_of(partial(F.cross_entropy, label_smoothing=0.1)) == fingerprint_of(
        partial(F.cross_entropy, label_smoothing=0.1)
    )
    assert fingerprint_of(partial(F.cross_entropy, label_smoothing=0.1)) != fingerprint_of(
        partial(F.cross_entropy, label_smoothing=0.2)
    )
    scale = 1.0

    def loss(outputs, targets):
        return scale * F.mse_loss(outputs, targets)

    before = fingerprint_of(loss)
    scale = 2.0
    assert fingerprint_of(loss) != before


def test_networks_that_contain_themselves_end():
    net = network()
    net.options.owner, net.scales = net, [net]
    assert fingerprint_of(net) == fingerprint_of(net)


def test_nothing_is_kept_alive_and_an_address_that_is_used_again_is_another_object():
    net = network()
    net.act = lambda x: x
    kept, gone = fingerprint_of(net), weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
    assert kept != fingerprint_of(network())


def test_hooks_are_found():
    net = ConvNet(hidden_channels=2)
    assert not has_hooks((net, F.cross_entropy))
    handle = net.body[0].register_forward_pre_hook(lambda module, args: None)
    assert has_hooks((net, F.cross_entropy))
    handle.remove()
    assert not has_hooks((net, F.cross_entropy))


def test_recurrent_layers_are_the_same_after_a_call():
    net = nn.LSTM(3, 2)
    before = fingerprint_of((net,))
    torch.func.functional_call(net, {n: v * 2 for n, v in net.named_parameters()}, (torch.rand(2, 1, 3),))
    assert fingerprint_of((net,)) == before
    net.batch_first = True
    assert fingerprint_of((net,)) != before


def words():
    net = nn.Linear(2, 3)
    net.words, net.names = {f"word {i}": i for i in range(1000)}, [f"word {i}" for i in range(1000)]
    net.known, net.numbers = set(net.names), tuple(range(1000))
    return net


LARGE_CHANGES = {
    "value": lambda net: net.words.update({"word 7": -1}),
    "value of the same hash": lambda net: net.words.update({"word 7": -2}),
    "type": lambda net: net.words.update({"word 1": True}),
    "key": lambda net: net.words.update({"new": net.words.pop("word 999")}),
    "order": lambda net: net.names.reverse(),
    "element of a set": lambda net: net.known.discard("word 1"),
    "number of a tuple": lambda net: setattr(net, "numbers", (*net.numbers[:-1], 1000.0)),
    "something that is not plain": lambda net: net.words.update({"word 7": [1]}),
}


@pytest.mark.parametrize("change", LARGE_CHANGES)
def test_a_change_in_a_large_container_is_another_fingerprint(change):
    net = words()
    if "hash" in change:
        net.words["word 7"] = -1  # hash(-1) == hash(-2)
    assert_changes(LARGE_CHANGES[change], net)


def test_a_large_container_that_is_not_plain_is_looked_into():
    net = words()
    net.words["word 7"] = [1]
    before = fingerprint_of(net)
    net.words["word 7"].append(2)
    assert fingerprint_of(net) != before


def test_what_containers_hold_is_not_looked_at_one_by_one(monkeypatch):
    calls, of = [], fingerprints._of
    monkeypatch.setattr(fingerprints, "_of", lambda value, seen: calls.append(value) or of(value, seen))
    fingerprint_of(words())
    assert len(calls) < 200


def first_of(large):
    large[0] += 1


VALUES = {  # before, and what changes them
    "the sign of zero": (lambda: 0.0, lambda net: setattr(net, "own", -0.0)),
    "the sign of an imaginary zero": (lambda: 1 + 0j, lambda net: setattr(net, "own", complex(1, -0.0))),
    "the sign of zero among many": (lambda: [1.0] * 99 + [0.0], lambda net: net.own.__setitem__(99, -0.0)),
    "the sign of zero among many kinds": (lambda: [1] * 99 + [0.0], lambda net: net.own.__setitem__(99, -0.0)),
    "an object in an array": (lambda: np.array([[1.0], None, [2.0]], dtype=object), lambda net: net.own[0].append(1)),
    "an array's shape": (lambda: np.zeros(6), lambda net: setattr(net, "own", np.zeros((2, 3)))),
    "the type of an array of Python's": (lambda: array("i", [0]), lambda net: setattr(net, "own", array("f", [0.0]))),
    "data of a large tensor": (lambda: torch.zeros(1000), lambda net: net.own.data.add_(1)),
    "one number of a large tensor": (lambda: torch.zeros(1000), lambda net: first_of(net.own.data)),
    "a large tensor through NumPy": (lambda: torch.zeros(1000), lambda net: first_of(net.own.numpy())),
    "the sign of zero in a large tensor": (lambda: torch.zeros(1000), lambda net: net.own.data.neg_()),
    "data of a large complex tensor": (
        lambda: torch.zeros(99, dtype=torch.complex64),
        lambda net: net.own.data.add_(1),
    ),
    "data of a view": (lambda: torch.zeros(99, 2)[:, 0], lambda net: first_of(net.own.data)),
    "other data": (lambda: torch.zeros(99), lambda net: setattr(net.own, "data", torch.zeros(98))),
    "data of another type": (lambda: torch.zeros(9), lambda net: setattr(net.own, "data", torch.zeros(9).double())),
}


@pytest.mark.parametrize("kind", VALUES)
def test_a_change_of_bits_is_another_fingerprint(kind):
    make, change = VALUES[kind]
    net = nn.Linear(2, 3)
    net.own = make()
    assert_changes(change, net)


@pytest.mark.parametrize("make", [lambda: float("nan"), lambda: [float("nan")] * 99, lambda: np.full(9, np.nan)])
def test_no_number_is_like_no_number(make):
    net = nn.Linear(2, 3)
    net.own = make()
    before = fingerprint_of(net)
    net.own = make()
    assert fingerprint_of(net) == before


def test_a_large_tensor_of_no_numbers_stays_the_same():
    net = nn.Linear(2, 3)
    net.own = torch.full((1000,), float("nan"))
    assert fingerprint_of(net) == fingerprint_of(net)


def test_objects_in_arrays_are_not_taken_for_others():
    net = nn.Linear(2, 3)
    net.own, net.other = np.array([[1.0], [2.0]], dtype=object), [[3.0]]
    assert_changes(lambda net: net.other[0].append(1), net)
