"""Adapters over a frozen transformer, by the code of docs/finetuning.md."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maml_lightning import MAML, Episode, TextNet
from tests.runs import ROOT
from tests.zoo.case import CLASSES, TOKENS, Case
from tests.zoo.loop import meta_gradient
from tests.zoo.memory import peak_bytes
from tests.zoo.test_zoo import TOLERANCE, step_error

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
LR, VOCABULARY = 0.1, 11
VARIANTS: dict[str, dict[str, Any]] = {
    "MAML": {"adapted_parameters": "*lora*"},
    "MAML, with the head": {"adapted_parameters": ["*lora*", "head.*"]},
    "ANIL": {"adapted_parameters": "head"},
    "first order": {"adapted_parameters": "*lora*", "first_order": True},
}


@cache
def documented() -> dict[str, Any]:
    """What the page's Python blocks define, run one after the other."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "finetuning.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    return names


@cache
def add_lora() -> Callable[..., nn.Module]:
    """The page's function; what the page draws of random numbers differs from the first time to the next."""
    with torch.random.fork_rng():
        return documented()["add_lora"]


def lora(rank: int = 2, width: int = 4, blocks: int = 1) -> nn.Module:
    net = TextNet(VOCABULARY, CLASSES, width, blocks=blocks, heads=2, max_length=6)
    return add_lora()(net, rank)


CASE = Case("LoRA", lora, TOKENS, VOCABULARY)


def adapts(which: str | list[str]) -> Callable[[str], bool]:
    patterns = {"*lora*": ["lora"], "head": ["head"]}.get(which, ["lora", "head"]) if isinstance(which, str) else which
    return lambda name: any(pattern.strip("*.") in name for pattern in patterns)


def test_the_page_runs_and_only_adapters_and_head_have_a_gradient():
    names = documented()
    net = names["net"]
    assert {n for n, value in net.named_parameters() if value.grad is not None} == {
        n for n, value in net.named_parameters() if "lora" in n or n.startswith("head")
    }
    before, after = net.state_dict(), names["classifier"].state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {n for n in after if "lora" in n or n.startswith("head")}
    assert names["classifier"](names["tokens"][0]).shape == (10, 5)


def test_adapters_begin_at_the_frozen_network():
    torch.manual_seed(0)
    plain = TextNet(VOCABULARY, CLASSES, 4, blocks=2, heads=2, max_length=6)
    tokens = torch.randint(VOCABULARY, (3, 6))
    before = plain(tokens)
    assert torch.equal(add_lora()(plain)(tokens), before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_meta_gradient_of_adapters_is_that_of_the_plain_loop(variant):
    settings = VARIANTS[variant]
    net, plain = CASE.network(), CASE.network()
    maml = MAML(net, inner_lr=LR, inner_steps=2, tasks_per_chunk=2, **settings)
    for number in range(2):
        episode = CASE.episode(number)
        expected = meta_gradient(
            plain, episode, LR, 2, F.cross_entropy, settings.get("first_order", False),
            adapted=adapts(settings["adapted_parameters"]),
        )  # fmt: skip
        assert step_error(maml, episode, [expected]) < TOLERANCE
        assert {name for name, value in net.named_parameters() if value.requires_grad} == expected.gradient.keys()
        assert all(value.grad is None for value in net.parameters() if not value.requires_grad)


def peak_of_step(net: nn.Module, steps: int, **settings: Any) -> int:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (4, 5, 4), generator=generator)
    episode = Episode(tokens, torch.arange(5).repeat(4, 1) % CLASSES, tokens, torch.arange(5).repeat(4, 1) % CLASSES)
    maml = MAML(net, inner_lr=LR, inner_steps=steps, tasks_per_chunk=None, flat_memory=False, **settings)
    maml.training_step(episode, 0)  # traces
    return peak_bytes(lambda: maml.training_step(episode, 0).backward())


@pytest.mark.exhaustive
def test_memory_grows_with_the_adapters_not_with_the_network():
    def network(width: int) -> nn.Module:
        return TextNet(VOCABULARY, CLASSES, width, blocks=2, heads=2, max_length=6)

    full = peak_of_step(network(128), 3)
    adapters = {width: peak_of_step(lora(2, width, 2), 3, adapted_parameters="*lora*") for width in (128, 256)}
    assert adapters[128] < full / 3
    assert adapters[256] < 3 * adapters[128]  # the network has 4 times as many weights
