"""Predictions of queries as tables: CSV, JSON, per class and as a confusion matrix."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from maml_lightning.analysis.tables import csv_bytes, text_cell
from maml_lightning.files import shown

NONE = "none of these"
ROWS = 40  # of a printed table; the files have all
COLUMNS = 12  # classes of a printed confusion matrix; of more, the largest confusions are printed


class Query(NamedTuple):
    """What was predicted of a query.

    Args:
        name: of its file.
        label: its class; None where it is not known.
        nearest: the class with the highest probability; None where the network's outputs are not finite.
        probabilities: of each class.
        rejected: whether the confidence is below the threshold.
        confidence: how likely it is that the query is of one of the classes and predicted right, the highest
            probability without a calibration; None where the outputs are not finite.
    """

    name: str
    label: int | None
    nearest: int | None
    probabilities: list[float]
    rejected: bool = False
    confidence: float | None = None

    @property
    def predicted(self) -> int | None:
        """The predicted class; None of a rejected query."""
        return None if self.rejected else self.nearest

    @property
    def probability(self) -> float:
        """The highest probability, NaN where the outputs are not finite."""
        return float("nan") if self.nearest is None else self.probabilities[self.nearest]

    def text(self, classes: Sequence[str]) -> str:
        """The predicted class's name, `NONE` of a rejected query, nothing where the outputs are not finite."""
        return NONE if self.rejected else "" if self.nearest is None else classes[self.nearest]


def queries_of(
    names: Sequence[str],
    labels: Sequence[int | None],
    probabilities: Tensor,
    reject: float | None = None,
    confidences: Tensor | None = None,
) -> list[Query]:
    """What is predicted of each query; those whose confidence is below ``reject`` are of no class.

    Args:
        names: of the files, ``n``.
        labels: the classes, where they are known.
        probabilities: ``[n, N]``.
        reject: the threshold; None rejects none.
        confidences: ``[n]``; None takes the highest probabilities.
    """
    finite, highest = probabilities.isfinite().all(1).tolist(), probabilities.argmax(-1).tolist()
    sure = probabilities.amax(-1) if confidences is None else confidences
    found = zip(names, labels, finite, highest, probabilities.tolist(), sure.tolist(), strict=True)
    return [
        Query(name, label, best, row, reject is not None and confidence < reject, confidence)
        if usable
        else Query(name, label, None, row)
        for name, label, usable, best, row, confidence in found
    ]


def csv_table(queries: Sequence[Query], classes: Sequence[str]) -> bytes:
    """``file, predicted``, then the probability of each class; see `text_cell` about names."""
    rows = [["file", "predicted", *map(text_cell, classes)]]
    for query in queries:
        numbers = [f"{value:.6f}" for value in query.probabilities]
        rows.append([text_cell(query.name), text_cell(query.text(classes)), *numbers])
    return csv_bytes(rows)


def summary(queries: Sequence[Query], classes: Sequence[str]) -> dict[str, Any]:
    """What JSON says of queries whose class is known: ``accuracy``, ``per_class`` and ``confusion_matrix``.

    Rows of the matrix are true classes; the last column counts queries of no class, rejected or not finite.
    """
    known = [query for query in queries if query.label is not None]
    if not known:
        return {"accuracy": None, "per_class": None, "confusion_matrix": None}
    true = torch.tensor([query.label for query in known])
    predicted = torch.tensor([len(classes) if query.predicted is None else query.predicted for query in known])
    matrix = multiclass_confusion_matrix(predicted, true, len(classes) + 1)[: len(classes)]
    per_class = [
        {
            "class": name,
            "queries": int(row.sum()),
            "right": int(row[index]),
            "wrong": int(row[: len(classes)].sum() - row[index]),
            "none": int(row[-1]),
            "accuracy": int(row[index]) / int(row.sum()) if row.sum() else None,
        }
        for index, (name, row) in enumerate(zip(classes, matrix, strict=True))
    ]
    accuracy = sum(query.predicted == query.label for query in known) / len(known)
    return {"accuracy": accuracy, "per_class": per_class, "confusion_matrix": matrix.tolist()}


def json_table(queries: Sequence[Query], classes: Sequence[str], settings: Mapping[str, Any]) -> bytes:
    """The settings, then ``classes``, ``predictions`` and the `summary`.

    Each prediction has ``file``, ``label``, ``predicted`` (null if rejected or not finite), ``nearest``,
    ``probability`` of the nearest, ``rejected``, ``probabilities`` by class and ``confidence``; numbers that are not
    finite are null.
    """
    predictions = [
        {
            "file": query.name,
            "label": None if query.label is None else classes[query.label],
            "predicted": None if query.predicted is None else classes[query.predicted],
            "nearest": None if query.nearest is None else classes[query.nearest],
            "probability": None if query.nearest is None else query.probability,
            "rejected": query.rejected,
            "probabilities": None if query.nearest is None else dict(zip(classes, query.probabilities, strict=True)),
            "confidence": query.confidence,
        }
        for query in queries
    ]
    content = {**settings, "classes": list(classes), "predictions": predictions, **summary(queries, classes)}
    return json.dumps(content, indent=1, allow_nan=False).encode() + b"\n"  # in ASCII: names may hold any bytes


def screen(queries: Sequence[Query], classes: Sequence[str], encoding: str) -> list[Table]:
    """The tables to print: predictions and, where classes of queries are known, each class and its confusions.

    Args:
        queries: of any number; the first `ROWS` are printed.
        classes: their names.
        encoding: of the terminal.
    """

    def cell(name: str) -> Text:
        return Text(shown(name).encode(encoding, "backslashreplace").decode(encoding))

    usable = [query for query in queries if query.nearest is not None]
    numbers = (
        ["probability", "confidence"]
        if any(each.confidence != each.probability for each in usable)
        else ["probability"]
    )
    predictions = Table("file", "predicted", *numbers)
    for query in queries[:ROWS]:
        texts = ["" if query.nearest is None else f"{getattr(query, number):.2f}" for number in numbers]
        predictions.add_row(cell(query.name), cell(query.text(classes)), *texts)
    found = summary(queries, classes)
    if found["per_class"] is None:
        return [predictions]
    none = any(each["none"] for each in found["per_class"])
    of_classes = Table("class", "queries", "right", "wrong", *([NONE] if none else []), "accuracy", title="Per class")
    for each in [each for each in found["per_class"] if each["queries"]][:ROWS]:
        numbers = [each[key] for key in ("queries", "right", "wrong", *(["none"] if none else []))]
        of_classes.add_row(cell(each["class"]), *map(str, numbers), f"{each['accuracy']:.2f}")
    names = [*classes, NONE]
    if len(classes) <= COLUMNS:
        matrix = Table("true \\ predicted", title="Confusion matrix")
        for name in names if none else classes:
            matrix.add_column(cell(name))
        for name, row in zip(classes, found["confusion_matrix"], strict=True):
            if any(row):
                matrix.add_row(cell(name), *(str(count or "·") for count in (row if none else row[:-1])))
        return [predictions, of_classes, matrix]
    confusions = [
        (count, true, predicted)
        for true, row in enumerate(found["confusion_matrix"])
        for predicted, count in enumerate(row)
        if count and predicted != true
    ]
    largest = Table("true", "predicted", "queries", title="Largest confusions")
    for count, true, predicted in sorted(confusions, key=lambda each: -each[0])[:COLUMNS]:
        largest.add_row(cell(names[true]), cell(names[predicted]), str(count))
    return [predictions, of_classes, largest] if confusions else [predictions, of_classes]
