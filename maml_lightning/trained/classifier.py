"""A network that is adapted once and then classifies pictures, one at a time or many."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn

from maml_lightning.analysis.export import Probabilities
from maml_lightning.data.support_sets import NO_SPEC, Picture, Support, check_ways, read_images, support_set
from maml_lightning.errors import SettingError
from maml_lightning.files import shown
from maml_lightning.trained.networks import load
from maml_lightning.training.module import MAML

BATCH = 100  # pictures that run together


class Prediction(NamedTuple):
    """What a picture is classified as.

    Args:
        name: of the class; None of a picture that is rejected.
        probability: the highest.
        probabilities: of each class, by name.
    """

    name: str | None
    probability: float
    probabilities: dict[str, float]


class Classifier:
    """A network adapted to a support set, which stays in memory: pictures in, names and probabilities out.

    A network that normalizes with the statistics of its batch (model.query_statistics batch) gets each picture by
    itself, beside the support set. So predictions never depend on the other pictures.

    Args:
        checkpoint: a module, the path of a checkpoint, or the name of one in the package.
        support: a folder of labeled images, ``SUPPORT/CLASS/*.png``; or the pictures of each class by its name.
        reject: a picture whose highest probability is below this has no name; None rejects none.
        trust: see `load`.

    Raises:
        SettingError: the checkpoint or an image cannot be used, or there are too few or too many classes.

    Example:
        >>> drawings = {"a": [torch.rand(28, 28)], "b": [torch.rand(28, 28)]}
        >>> classifier = Classifier("omniglot_5way_1shot", drawings)
        >>> classifier(torch.rand(28, 28)).name in ("a", "b")
        True
        >>> len(classifier([torch.rand(28, 28), torch.rand(90, 60)]))
        2
    """

    def __init__(
        self, checkpoint: str | Path | MAML, support: Support, reject: float | None = None, trust: bool = False
    ) -> None:
        if reject is not None and not 0 < reject <= 1:
            raise SettingError(f"reject must be above 0, at most 1 (got {reject}); None rejects none.")
        maml = checkpoint if isinstance(checkpoint, MAML) else load(checkpoint, trust)
        if maml.inputs is None:
            raise SettingError(f"The checkpoint {NO_SPEC}; train it on such with this version.")
        self.inputs, self.reject = maml.inputs, reject
        images, targets, self.names = support_set(support, maml.inputs)
        where = f"The support set {shown(support)}" if isinstance(support, str | Path) else "The support set"
        check_ways(where, len(self.names), maml.inputs, maml.head)
        images = images.to(maml.device, next((value.dtype for value in maml.net.parameters()), None))
        self.network = adapted_to(maml, images, targets.to(maml.device))

    @overload
    def __call__(self, pictures: Picture) -> Prediction: ...

    @overload
    def __call__(self, pictures: list[Picture] | tuple[Picture, ...]) -> list[Prediction]: ...

    def __call__(self, pictures: Picture | Sequence[Picture]) -> Prediction | list[Prediction]:
        """Classify a picture, or a list of them.

        Args:
            pictures: a file, a PIL image, an array ``[H, W]`` or ``[H, W, 1 | 3 | 4]`` or a tensor ``[(C,) H, W]``,
                uint8 or floats in [0, 1]; or a list of such.

        Raises:
            SettingError: a picture cannot be read.
        """
        if not isinstance(pictures, list | tuple):
            return self.__call__([pictures])[0]  # type: ignore[list-item]
        if not pictures:
            return []
        images = self.inputs.normalized(read_images(pictures, self.inputs).inputs)
        return [self._prediction(row) for row in self.probabilities(images).tolist()]

    def probabilities(self, inputs: Tensor) -> Tensor:
        """Probabilities ``[n, N]`` of inputs ``[n, C, H, W]``, as the network takes them."""
        value = next(self.network.parameters())
        inputs = inputs.to(value.device, value.dtype)
        with torch.inference_mode():
            return torch.cat([self.network(part) for part in inputs.split(BATCH)]).float().cpu()

    def _prediction(self, row: list[float]) -> Prediction:
        best = max(range(len(row)), key=row.__getitem__)
        accepted = row[best] >= (self.reject or 0)  # which NaN is not
        return Prediction(self.names[best] if accepted else None, row[best], dict(zip(self.names, row, strict=True)))


def adapted_to(maml: MAML, support: Tensor, targets: Tensor) -> nn.Module:
    """A network of probabilities ``[n, N]``, adapted to a support set ``[N*K, C, H, W]`` with targets ``[N*K]``.

    Those of an input do not depend on the other inputs.
    """
    adapted = Probabilities(maml.adapt(support, targets), int(targets.max()) + 1).eval()
    return adapted if maml.query_statistics != "batch" else _BesideSupport(adapted, support)


class _BesideSupport(nn.Module):
    """Each input by itself, in one batch with the support set ``[N*K, C, H, W]``."""

    def __init__(self, net: nn.Module, support: Tensor) -> None:
        super().__init__()
        self.net, self.support = net, support

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.net(torch.cat([self.support, image[None]]))[-1:] for image in images])
