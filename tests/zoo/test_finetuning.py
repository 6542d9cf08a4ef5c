"""Networks of transformers called by keywords, and adapters of peft over them, where both are installed."""

from fnmatch import fnmatch
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_lightning import MAML, Episode
from tests.zoo.case import CLASSES
from tests.zoo.loop import meta_gradient
from tests.zoo.memory import peak_bytes
from tests.zoo.test_zoo import TOLERANCE, step_error

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.exhaustive, pytest.mark.filterwarnings("default")]
VOCABULARY, LENGTH, LR = 30, 8, 0.1
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def bert(width: int = 16, dropout: float = 0.0) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=2 * width, max_position_embeddings=16, num_labels=CLASSES, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, num_labels=CLASSES, **SPECIAL,
    )  # fmt: skip
    return transformers.GPT2ForSequenceClassification(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, num_labels=CLASSES, **SPECIAL,
    )  # fmt: skip
    return transformers.LlamaForSequenceClassification(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        num_labels=CLASSES,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def lora(net: nn.Module, *targets: str) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=list(targets), modules_to_save=["classifier"], init_lora_weights=False
    )
    return peft.get_peft_model(net, config)


NETWORKS = {
    "Bert": bert,
    "GPT2": gpt2,
    "Llama": llama,
    "ViT": vit,
    "LoRA of Bert": lambda: lora(bert(), "query", "value"),
    "LoRA of ViT": lambda: lora(vit(), "q_proj", "v_proj"),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "MAML": {"inner_steps": 3, "tasks_per_chunk": 2},
    "ANIL": {"inner_steps": 3, "tasks_per_chunk": 1, "adapted_parameters": ["*classifier*", "score.*"]},
    "first order": {"inner_steps": 1, "tasks_per_chunk": None, "first_order": True},
    "auto": {"inner_steps": 1, "tasks_per_chunk": "auto"},
}


class Keywords(nn.Module):
    """The logits of a network that the plain loop calls with one argument."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.net(**inputs).logits


def episode(name: str, seed: int, padded: bool = True, tasks: int = 3) -> Episode:
    """Tasks of tokens and their mask, or of images."""
    generator = torch.Generator().manual_seed(seed)

    def part(examples: int) -> tuple[dict[str, Tensor], Tensor]:
        labels = torch.stack([torch.randperm(examples, generator=generator) % CLASSES for _ in range(tasks)])
        if "ViT" in name:
            shape = (tasks, examples, 3, 16, 16)
            return {"pixel_values": torch.randn(shape, generator=generator, dtype=torch.float64)}, labels
        ids = torch.randint(3, VOCABULARY, (tasks, examples, LENGTH), generator=generator)
        lengths = torch.randint(2, LENGTH + 1, (tasks, examples, 1), generator=generator)
        mask = (torch.arange(LENGTH) < (lengths if padded else LENGTH)).long().expand_as(ids).contiguous()
        return {"input_ids": ids * mask, "attention_mask": mask}, labels

    return Episode(*part(5), *part(4))


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = NETWORKS[name]().double()
    with torch.no_grad():
        for value in net.parameters():
            value += 0.05 * torch.randn_like(value)
    return net


def way(maml: MAML) -> str:
    return maml._inner_loop._executor.way(maml._inner_loop._state(3), 3)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NETWORKS)
def test_meta_gradients_are_those_of_the_plain_loop_and_traced(name, variant):
    settings = VARIANTS[variant]
    if name.startswith("LoRA") and variant != "ANIL":
        settings = {**settings, "adapted_parameters": ["*lora*"]}
    net, plain = network(name), Keywords(network(name))
    patterns = settings.get("adapted_parameters", ["*"])
    adapted = [pattern for pattern in patterns if any(fnmatch(n, pattern) for n, _ in net.named_parameters())]
    settings = {**settings, "adapted_parameters": adapted} if "adapted_parameters" in settings else settings
    maml = MAML(net, inner_lr=LR, **settings)
    for number in range(2):  # a mask that hides nothing, then one that does
        tasks = episode(name, number, padded=number == 1)
        expected = meta_gradient(
            plain, tasks, LR, settings["inner_steps"], F.cross_entropy, settings.get("first_order", False),
            adapted=lambda parameter: any(fnmatch(parameter.removeprefix("net."), pattern) for pattern in adapted),
        )  # fmt: skip
        assert step_error(maml, tasks, [expected]) < TOLERANCE
    assert way(maml) == "traced"


def test_dropout_draws_anew_at_each_step_and_is_traced():
    torch.manual_seed(0)
    maml = MAML(bert(dropout=0.5), inner_lr=LR, inner_steps=2)
    tasks = episode("Bert", 0)
    losses = {maml.training_step(tasks, 0).item() for _ in range(3)}
    assert len(losses) == 3
    assert way(maml) == "traced"


def test_memory_grows_with_the_adapters_not_with_the_network():
    def peak(width: int) -> int:
        net = lora(bert(width), "query", "value")
        maml = MAML(net, inner_lr=LR, inner_steps=3, adapted_parameters="*lora*", tasks_per_chunk=None)
        tasks = episode("Bert", 0)
        maml.training_step(tasks, 0)  # traces
        return peak_bytes(lambda: maml.training_step(tasks, 0).backward())

    assert peak(256) < 3 * peak(128)  # the network has 4 times as many weights
