"""The packaged network ``omniglot``: pictures of any look, each by itself, among any number of classes."""

import pytest

from maml_lightning import Classifier, OmniglotDataModule, load
from tests.data.test_support_query import LOOKS, MORE_SYMBOLS, SYMBOLS, plain

NAMES = [*SYMBOLS, *MORE_SYMBOLS]


@pytest.mark.parametrize("classes", [5, 7, 12])
@pytest.mark.parametrize("look", LOOKS)
def test_drawn_symbols_one_at_a_time(look, classes):
    names = NAMES[:classes]
    support = {name: [plain(kind, 100 + 10 * kind + shot) for shot in range(2)] for kind, name in enumerate(names)}
    classifier = Classifier("omniglot", support)
    drawn = [(name, LOOKS[look](kind, 400 + 10 * kind + n)) for kind, name in enumerate(names) for n in range(2)]
    right = sum(classifier(picture).name == name for name, picture in drawn)
    assert right >= 0.9 * len(drawn)


@pytest.mark.parametrize("name", ["omniglot", "omniglot_5way_1shot"])
def test_drawn_symbols_of_no_class_are_rejected(name):
    support = {
        symbol: [plain(kind, 100 + 10 * kind + shot) for shot in range(2)] for kind, symbol in enumerate(SYMBOLS)
    }
    classifier = Classifier(name, support, reject=0.5)
    drawn = [(kind, classifier(plain(kind, 600 + 10 * kind + n))) for kind in range(12) for n in range(2)]
    known = [found.name == SYMBOLS[kind] for kind, found in drawn if kind < 5]
    unknown = [found.name is None for kind, found in drawn if kind >= 5]
    assert sum(known) >= 0.8 * len(known)
    assert sum(unknown) >= 0.8 * len(unknown)
    assert [found.name is None for _, found in drawn] == [found.confidence < 0.5 for _, found in drawn]


@pytest.mark.parametrize(("ways", "least"), [(5, 0.97), (50, 0.9)])
def test_test_classes_of_omniglot(ways, least, omniglot_root):
    maml = load("omniglot")
    data = OmniglotDataModule(root=str(omniglot_root), ways=ways, query_shots=1, meta_batch_size=10, test_episodes=20)
    data.prepare_data()
    data.setup("test")
    right = [
        (maml.trajectory(batch)[-1].argmax(-1) == batch.query_targets).double().mean()
        for batch in data.test_dataloader()
    ]
    assert sum(right) / len(right) >= least
