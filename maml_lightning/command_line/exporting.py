"""``maml-lightning export``: a network adapted to a support set, as a file that runs without this package."""

from functools import partial
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from maml_lightning.analysis.export import check_output, export
from maml_lightning.command_line.functions import run
from maml_lightning.data.support_sets import preprocessing
from maml_lightning.errors import SettingError
from maml_lightning.files import shown
from maml_lightning.trained import Classifier, load


def export_network(
    ckpt_path: str, support: str, output: str = "classifier.pt2", trust_checkpoint: bool = False
) -> None:
    """Adapt a network to a support set, and export it for single pictures and batches of any size.

    The exported network takes images in [0, 1] and gives class probabilities. A JSON with the same name tells the
    classes and how pictures are prepared.

    Args:
        ckpt_path: A checkpoint, or the name of a network of the package. It must have been trained with
            model.query_statistics support or running, so that each picture is classified by itself.
        support: Folder of the labeled images, SUPPORT/CLASS/*.png.
        output: NAME.pt2 (torch.export) or NAME.onnx; neither it nor NAME.json may exist.
        trust_checkpoint: Import and call whatever network or loss the checkpoint names, such as your own.
    """
    file = Path(output)
    check_output(file)
    maml = load(ckpt_path, trust_checkpoint)
    if maml.query_statistics == "batch":
        raise SettingError(
            f"ckpt_path {shown(ckpt_path)} has model.query_statistics batch: its predictions depend on the other "
            "pictures of a batch, so that no exported network gives them; take one trained with support or running."
        )
    classifier = Classifier(maml, support)
    settings = {"query_statistics": maml.query_statistics, "head": maml.head}
    prepared = {"preprocessing": preprocessing(classifier.inputs)}
    source = {**prepared, "checkpoint": ckpt_path, "support": support, **settings}
    written = export(classifier.network.cpu(), file, classifier.names, classifier.inputs, source)
    rank_zero_info(f"{len(classifier.names)} classes. Written: {', '.join(map(shown, written))}")


main = partial(run, export_network, "export")  # takes the words after ``maml-lightning export``
