"""An adapted network as a file that runs without this package: ``torch.export`` or ONNX, with a JSON beside it."""

import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maml_lightning.analysis.tables import write_file
from maml_lightning.episodes import InputSpec
from maml_lightning.errors import SettingError
from maml_lightning.files import shown

FORMATS = (".pt2", ".onnx")
_OF_ONNX = ("onnx", "onnxscript")


class Probabilities(nn.Module):
    """Class probabilities of a network's logits.

    Args:
        net: gives logits ``[B, classes or more]``.
        classes: how many count.

    Example:
        >>> Probabilities(nn.Linear(4, 5), 3)(torch.rand(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, net: nn.Module, classes: int) -> None:
        super().__init__()
        self.net, self.classes = net, classes

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities ``[B, classes]`` of images ``[B, C, H, W]``."""
        return self.net(images)[:, : self.classes].softmax(-1)


def check_output(output: Path) -> Path:
    """The name of the JSON beside an exported network, after what can be checked before the work.

    Raises:
        SettingError: the name has another suffix, or exists, or what writes its format is not installed.
    """
    if output.suffix not in FORMATS:
        raise SettingError(
            f"output {shown(output)} must end in {' or '.join(FORMATS)} (got {output.suffix or 'none'})."
        )
    if output.suffix == ".onnx" and (missing := [name for name in _OF_ONNX if find_spec(name) is None]):
        raise SettingError(
            f"output {shown(output)}: ONNX needs {' and '.join(missing)}; pip install 'maml_lightning[export]', or "
            "export to .pt2, which needs nothing more."
        )
    sidecar = output.with_suffix(".json")
    for file in (output, sidecar):
        if file.exists() or file.is_symlink():
            raise SettingError(f"output: {shown(file)} exists already; remove it or give another name.")
    return sidecar


def export(
    network: nn.Module, output: Path, classes: Sequence[str], spec: InputSpec, source: Mapping[str, Any]
) -> list[Path]:
    """Write an adapted network, and a JSON of what its users must know.

    The network takes float32 ``inputs`` ``[batch, C, H, W]`` of any batch and gives ``probabilities`` ``[batch, N]``.
    The JSON has ``format``, ``classes``, ``input``, ``output``, the ``source`` and torch's version.

    Args:
        network: gives probabilities, each image's by itself; see `Probabilities`.
        output: ends in .pt2 or .onnx.
        classes: their names.
        spec: what the network was trained on.
        source: what else the JSON says, such as the checkpoint and how pictures are prepared.

    Returns:
        the files that were written.

    Raises:
        SettingError: see `check_output`; or the network cannot be exported.
    """
    sidecar = check_output(output)
    example = torch.rand(2, spec.channels, spec.side, spec.side)
    network = network.eval()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"network{output.suffix}"
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # of the exporters about themselves
                (_write_onnx if output.suffix == ".onnx" else _write_pt2)(network, example, file)
        except Exception as error:  # whatever an exporter raises
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise SettingError(
                f"output {shown(output)}: the network cannot be exported to {output.suffix} ({reason}); export to the "
                "other format, or use maml_lightning.Classifier."
            ) from error
        content = file.read_bytes()
    described = {
        "format": output.suffix.removeprefix("."),
        "classes": list(classes),
        "input": {"name": "inputs", "shape": ["batch", *example.shape[1:]], "dtype": "float32"},
        "output": {"name": "probabilities", "shape": ["batch", len(classes)], "dtype": "float32"},
        **source,
        "torch": torch.__version__,
    }
    return [write_file(output, content), write_file(sidecar, json.dumps(described, indent=1).encode() + b"\n")]


def _write_pt2(network: nn.Module, example: Tensor, file: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=({0: batch},)), file)


def _write_onnx(network: nn.Module, example: Tensor, file: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    torch.onnx.export(
        network,
        (example,),
        file,
        input_names=["inputs"],
        output_names=["probabilities"],
        dynamic_shapes=({0: batch},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
