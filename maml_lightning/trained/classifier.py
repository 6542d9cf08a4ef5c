"""A network that is adapted once and then classifies pictures, one at a time or many."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, overload

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from maml_lightning.analysis.calibration import UNCALIBRATED, check_threshold
from maml_lightning.analysis.export import Probabilities
from maml_lightning.data.support_sets import NO_SPEC, Picture, Support, check_ways, read_images, support_set
from maml_lightning.errors import SettingError
from maml_lightning.files import shown
from maml_lightning.trained.networks import load
from maml_lightning.training.confidence import Outputs, TaskNetwork, calibration_of
from maml_lightning.training.module import MAML


class Prediction(NamedTuple):
    """What a picture is classified as.

    Args:
        name: of the class; None of a picture that is rejected.
        probability: the highest.
        probabilities: of each class, by name.
        confidence: how likely it is that the picture is of one of the classes and this one; what reject compares.
            Without a calibration in the checkpoint, the highest probability.
    """

    name: str | None
    probability: float
    probabilities: dict[str, float]
    confidence: float


class Classifier:
    """A network adapted to a support set, which stays in memory: pictures in, names and probabilities out.

    A network that normalizes with the statistics of its batch (model.query_statistics batch) gets one picture at a
    time, together with the support images. So predictions never depend on the other pictures.

    Args:
        checkpoint: a module, the path of a checkpoint, or the name of one in the package.
        support: a folder of labeled images, ``SUPPORT/CLASS/*.png``; or the pictures of each class by its name.
        reject: a picture whose confidence is below this has no name; None rejects none.
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
        check_threshold("reject", reject)
        maml = checkpoint if isinstance(checkpoint, MAML) else load(checkpoint, trust)
        if maml.inputs is None:
            raise SettingError(f"The checkpoint {NO_SPEC}; train it on such with this version.")
        self.inputs, self.reject = maml.inputs, reject
        images, targets, self.names = support_set(support, maml.inputs)
        where = f"The support set {shown(support)}" if isinstance(support, str | Path) else "The support set"
        check_ways(where, len(self.names), maml.inputs, maml.head)
        images = images.to(maml.device, next((value.dtype for value in maml.net.parameters()), None))
        if reject is not None and calibration_of(maml) is None:
            rank_zero_info(f"reject {reject} {UNCALIBRATED}")
        self._task = TaskNetwork(maml, images, targets.to(maml.device))

    @property
    def network(self) -> Probabilities:
        """The adapted network, which gives the probabilities of a batch ``[n, C, H, W]``."""
        return Probabilities(self._task.network, len(self.names)).eval()

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
        found = self._outputs(images)
        return [self._prediction(*each) for each in zip(*(part.tolist() for part in found), strict=True)]

    def probabilities(self, inputs: Tensor) -> Tensor:
        """Probabilities ``[n, N]`` of inputs ``[n, C, H, W]``, as the network takes them."""
        return self._outputs(inputs).probabilities

    def _outputs(self, inputs: Tensor) -> Outputs:
        value = next(self._task.network.parameters())
        return Outputs(*(part.float().cpu() for part in self._task.alone(inputs.to(value.device, value.dtype))))

    def _prediction(self, row: list[float], confidence: float) -> Prediction:
        best = max(range(len(row)), key=row.__getitem__)
        accepted = confidence >= (self.reject or 0)  # which NaN is not
        probabilities = dict(zip(self.names, row, strict=True))
        return Prediction(self.names[best] if accepted else None, row[best], probabilities, confidence)
