"""Recording a function leaves no mode active, also where it cannot be recorded."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from maml_lightning import MAML
from tests.engine.test_trials import episode, gradient
from tests.reference import reference, relative_error


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x):
        parts = torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)
        return self.body(torch.cat(list(parts.unbind())))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_run_in_a_loop_and_not_into_the_recursion_limit(caplog):
    net = Nested()
    ours = gradient(MAML(net, inner_lr=0.1, inner_steps=2))
    assert relative_error(ours, reference(net, episode(), 0.1, 2, F.cross_entropy)[1]) < 1e-9
    assert "of a NestedTensor cannot be recorded" in caplog.text
    assert not _get_current_dispatch_mode_stack()
