"""Triton's kernels against torch's own operators in float64, and where they run.

Where there is no GPU, Triton's interpreter runs them (``conftest.py``).
"""

import importlib

import pytest
import torch

from maml_lightning import MAML, ConvNet, Episode
from maml_lightning.engine.kernels import fused, normalization, patches

# Triton's interpreter up to 3.2 (torch 2.6).
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
SHAPES = [(2, 5, 7, 7, 64), (3, 3, 4, 4, 5), (1, 2, 40, 40, 70), (300, 4, 3)]
WINDOWS = [
    ((7, 6), [3, 3], [2, 2], [1, 1]),
    ((5, 5), [3, 2], [1, 2], [0, 1]),
    ((4, 4), [1, 1], [1, 1], [0, 0]),
    ((8, 8), [2, 2], [2, 3], [0, 0]),
]


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def anywhere(monkeypatch):
    """Kernels run without a GPU, too."""
    pytest.importorskip("triton")
    monkeypatch.setattr(fused, "FUSED", {DEVICE.type})
    monkeypatch.setattr(fused, "_failed", set())


def kernel(module, name):
    return getattr(importlib.import_module(f"maml_lightning.engine.kernels.triton_{module}"), name)


def close(results, expected, tolerance=2e-6):
    for result, value in zip(results, expected, strict=True):
        assert result.shape == value.shape
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), value, rtol=tolerance, atol=tolerance * value.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("anywhere")
def test_normalization_and_its_derivatives_are_torchs(shape):
    x, g, u = (torch.randn(shape, device=DEVICE) * 3 + 10 for _ in range(3))
    exact = normalization.standardize(x.double(), 1e-5)
    close(kernel("normalization", "standardize")(x, 1e-5), exact)
    n, r = (tensor.float() for tensor in exact)
    v, w, weight, sum_gn, sum_g = torch.randn(5, *r.shape, device=DEVICE)
    for name, args in (
        ("project", (g, n, weight)),
        ("second_derivative", (u, v, w, g, weight, n, r, sum_gn, sum_g)),
    ):
        own = getattr(normalization, name)(*(tensor.double() for tensor in args))
        close(kernel("normalization", name)(*args), own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "window", "stride", "padding"), WINDOWS)
@pytest.mark.usefixtures("anywhere")
def test_patches_are_gathered_and_added_up_as_by_torch(size, window, stride, padding, dtype):
    x = torch.randint(0, 9, (3, *size, 5), device=DEVICE).to(dtype)
    columns = patches._gathered(x, window, stride, padding)
    assert torch.equal(kernel("patches", "im2col")(x, window, stride, padding), columns)
    columns = torch.randint_like(columns, 9)  # whose sums have no rounding
    images = patches._scattered(columns, list(size), window, stride, padding)
    assert torch.equal(kernel("patches", "col2im")(columns, list(size), window, stride, padding), images)


def gradients(dtype=torch.float32):
    torch.manual_seed(0)
    net = ConvNet(out_features=3, hidden_channels=4, blocks=2)
    x, y = torch.rand(2, 6, 1, 8, 8, device=DEVICE).to(dtype), torch.arange(3, device=DEVICE).repeat(2, 2)
    maml = MAML(net, inner_lr=0.1, inner_steps=2).to(DEVICE, dtype)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        maml.training_step(Episode(x, y, x.flip(1), y.flip(1)), 0).backward()
    return [value.grad for value in net.parameters()]


@pytest.mark.usefixtures("anywhere")
def test_a_meta_gradient_of_fused_kernels_is_that_of_torchs(monkeypatch):
    calls, own = [], fused.importlib.import_module
    monkeypatch.setattr(fused.importlib, "import_module", lambda name: calls.append(name) or own(name))
    results = gradients()
    assert {name.rpartition("_")[2] for name in calls} == {"normalization", "patches"}
    assert fused._failed == set()
    monkeypatch.setattr(fused, "FUSED", set())
    close(results, gradients(torch.float64), 2e-5)


def test_what_cannot_be_compiled_runs_by_torch(monkeypatch, caplog):
    expected = gradients()

    def failing(name):
        raise ImportError(f"No module named {name}")

    monkeypatch.setattr(fused, "FUSED", {DEVICE.type})
    monkeypatch.setattr(fused, "_failed", set())
    monkeypatch.setattr(fused.importlib, "import_module", failing)
    with caplog.at_level("DEBUG", "maml_lightning"):
        results = gradients()
    assert fused._failed == {"standardize", "project", "second_derivative", "im2col", "col2im"}
    assert len([record for record in caplog.records if "cannot be compiled" in record.message]) == 5
    close(results, [value.double() for value in expected])


def test_memory_that_runs_out_is_said(monkeypatch):
    def full(name):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fused.importlib, "import_module", full)
    with pytest.raises(torch.OutOfMemoryError):
        fused.fused("triton_patches", "im2col", torch.add, torch.ones(1), torch.ones(1))


@pytest.mark.parametrize(
    ("x", "elements"),
    [
        (torch.empty(2, device="meta"), 0),
        (torch.empty(2, dtype=torch.float64), 0),
        (torch.empty(0), 0),
        (torch.empty(2), 2**31),
    ],
    ids=["another device", "float64", "nothing", "too many to count in 32 bits"],
)
def test_what_has_no_kernel(x, elements, monkeypatch):
    monkeypatch.setattr(fused, "FUSED", {"cpu"})
    assert fused.is_fused(torch.empty(2))
    assert not fused.is_fused(x, elements)
