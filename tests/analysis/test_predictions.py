"""Tables and the contact sheet of predictions, and how well rejection works."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.rejection import UNKNOWN as ABSENT
from benchmarks.rejection import rates
from maml_lightning.analysis.prediction_sheet import (
    RIGHT,
    SIDE,
    UNKNOWN,
    WRONG,
    Pictures,
    color_of,
    legend,
    prediction_sheet,
    rows_of,
)
from maml_lightning.analysis.predictions import NONE, csv_table, json_table, queries_of, screen, summary

CLASSES = ["cross", "ring", "tee"]
PROBABILITIES = torch.tensor(
    [[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.4, 0.35, 0.25], [0.3, 0.2, 0.5], [torch.nan] * 3, [0.0, 0.8, 0.2]]
)
LABELS = [0, 0, 0, None, 2, None]
NAMES = [f"{number}.png" for number in range(6)]


def queries(reject=0.45):
    return queries_of(NAMES, LABELS, PROBABILITIES, reject)


def test_what_is_predicted():
    found = queries()
    assert [query.predicted for query in found] == [0, 1, None, 2, None, 1]
    assert [query.rejected for query in found] == [False, False, True, False, False, False]
    assert [query.text(CLASSES) for query in found] == ["cross", "ring", NONE, "tee", "", "ring"]
    assert [query.predicted for query in queries(None)] == [0, 1, 0, 2, None, 1]
    assert queries(0.9)[0].rejected == bool(PROBABILITIES[0, 0].item() < 0.9)


def test_the_summary_counts_known_queries():
    found = summary(queries(), CLASSES)
    assert found["confusion_matrix"] == [[1, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert found["accuracy"] == 0.25
    assert found["per_class"] == [
        {"class": "cross", "queries": 3, "right": 1, "wrong": 1, "none": 1, "accuracy": 1 / 3},
        {"class": "ring", "queries": 0, "right": 0, "wrong": 0, "none": 0, "accuracy": None},
        {"class": "tee", "queries": 1, "right": 0, "wrong": 0, "none": 1, "accuracy": 0.0},
    ]
    unknown = queries_of(NAMES, [None] * 6, PROBABILITIES)
    assert summary(unknown, CLASSES) == {"accuracy": None, "per_class": None, "confusion_matrix": None}


def test_json_and_csv_agree():
    told = json.loads(json_table(queries(), CLASSES, {"reject": 0.45, "query": "a\udcff"}))
    assert list(told) == ["reject", "query", "classes", "predictions", "accuracy", "per_class", "confusion_matrix"]
    header, *rows = csv.reader(io.StringIO(csv_table(queries(), CLASSES).decode()))
    assert header == ["file", "predicted", *CLASSES]
    for row, each in zip(rows, told["predictions"], strict=True):
        assert row[0] == each["file"]
        assert row[1] == (NONE if each["rejected"] else each["predicted"] or "")
        if each["nearest"] is None:
            assert (row[2:], each["probability"], each["probabilities"]) == (["nan"] * 3, None, None)
        else:
            assert [float(cell) for cell in row[2:]] == pytest.approx([*each["probabilities"].values()], abs=1e-6)
            assert each["probability"] == each["probabilities"][each["nearest"]]
    assert [each["label"] for each in told["predictions"]] == ["cross", "cross", "cross", None, "tee", None]


def test_tables_on_the_screen():
    titles = [table.title for table in screen(queries(), CLASSES, "utf-8")]
    assert titles == [None, "Per class", "Confusion matrix"]
    assert len(screen(queries_of(NAMES, [None] * 6, PROBABILITIES), CLASSES, "utf-8")) == 1
    many = [f"c{number}" for number in range(30)]
    wide = torch.zeros(2, 30).scatter(1, torch.tensor([[5], [7]]), 1.0)
    predictions, per_class, largest = screen(queries_of(["a", "b"], [5, 8], wide), many, "ascii")
    assert (largest.title, largest.row_count, per_class.row_count, predictions.row_count) == (
        "Largest confusions",
        1,
        2,
        2,
    )


def test_a_row_for_each_class_wrong_ones_first():
    support = torch.rand(3, 2, 1, 4, 4)
    rows = rows_of(queries(), CLASSES, list(support))
    assert [row.queries for row in rows] == [[2, 1, 0], [5], [4, 3]]
    assert [row.title for row in rows] == [
        "cross: 1 of 3 right",
        "ring: 1 predicted",
        "tee: 0 of 1 right, 1 more predicted",
    ]
    loose = rows_of(queries_of(NAMES, [None] * 6, PROBABILITIES, 0.45), CLASSES, list(support))
    assert [(row.title, row.queries) for row in loose[3:]] == [(f"{NONE}: 1", [2]), ("outputs not finite: 1", [4])]
    assert sorted(n for row in loose for n in row.queries) == [*range(6)]


def test_only_right_ones_are_green():
    assert [color_of(query) for query in queries()] == [RIGHT, WRONG, UNKNOWN, UNKNOWN, WRONG, UNKNOWN]
    assert {color_of(query) for query in queries_of(NAMES, [None] * 6, PROBABILITIES)} == {UNKNOWN}


def test_the_legend_names_the_colors_in_use():
    assert legend(queries_of(NAMES, [None] * 6, PROBABILITIES)) == [("class not known", UNKNOWN)]
    assert legend(queries()) == [("right", RIGHT), ("wrong", WRONG), ("class not known, or none of these", UNKNOWN)]


def colors(sheet):
    return {"#{:02x}{:02x}{:02x}".format(*pixel) for pixel in np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)}


def drawn(found, **pictures):
    rows = rows_of(found, CLASSES, list(torch.zeros(3, 2, 1, 4, 4)))
    given = pictures.get("given", [Pictures(Image.new("RGB", (30, 60), "blue"), torch.ones(1, 4, 4))] * len(found))
    return prediction_sheet(rows, found, CLASSES, given)


def test_the_sheet_shows_original_and_seen_in_the_colors_of_the_predictions():
    legend = colors(drawn(queries(), given=[None] * 6))
    assert "#0000ff" not in legend
    whole = drawn(queries())
    pixels = np.asarray(whole)
    assert "#0000ff" in colors(whole)
    assert (pixels == (0, 0, 255)).all(-1).sum() > 6 * (SIDE // 2 - 2) * (SIDE - 2)  # in its proportions
    right = drawn(queries_of(["a"], [0], PROBABILITIES[:1]))
    unknown = drawn(queries_of(["a"], [None], PROBABILITIES[:1]))

    def of(sheet, color):
        wanted = tuple(int(color[place : place + 2], 16) for place in (1, 3, 5))
        return (np.asarray(sheet) == wanted).all(-1).sum()

    assert of(right, RIGHT) > of(unknown, RIGHT) + 400  # but for the legend
    assert of(unknown, UNKNOWN) > of(right, UNKNOWN) + 400


def test_a_rejected_query_shows_its_confidence():
    def sheet(confidence):
        return np.asarray(drawn(queries_of(["a"], [0], PROBABILITIES[:1], 0.5, torch.tensor([confidence]))))

    assert (sheet(0.14) != sheet(0.43)).any()
    assert (sheet(0.14) == sheet(0.144)).all()  # two digits
    assert (sheet(0.61) == sheet(0.93)).all()  # not rejected


def test_names_are_whole_however_long():
    long = ["a" * 250, "b", "c"]
    rows = rows_of(queries()[:1], long, list(torch.zeros(3, 2, 1, 4, 4)))
    pictures = [Pictures(Image.new("L", (4, 4)), torch.ones(1, 4, 4))]
    short = prediction_sheet(rows, queries()[:1], CLASSES, pictures)
    tall = prediction_sheet(rows, queries()[:1], long, pictures)
    assert tall.width == short.width
    assert tall.height > short.height + 8 * 15  # 250 letters take more than 8 lines more


def test_rates_of_rejection():
    probabilities = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.55, 0.45], [0.8, 0.2], [0.5, 0.5]])
    targets = torch.tensor([0, 0, 0, ABSENT, ABSENT])
    assert rates(probabilities, targets, 0.6) == pytest.approx((1 / 3, 1 / 3, 1 / 3, 0.5))
    assert rates(probabilities, targets, 0.1) == pytest.approx((2 / 3, 1 / 3, 0, 0))
