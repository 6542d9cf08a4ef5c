import numpy as np
import torch

from maml_lightning.analysis.drawing import CAPTION, EDGE, GAP, TITLE, Tile, contact_sheet


def test_tiles_lie_in_rows_under_their_titles():
    white, dark = torch.ones(1, 4, 4), torch.full((3, 4, 4), 0.2)
    sheet = np.asarray(contact_sheet([("one", [Tile(dark, "a")] * 3), ("two", [Tile(white, "b", "red")])], columns=2))
    step = EDGE + CAPTION
    assert sheet.shape == (2 * TITLE + 3 * step, 2 * (EDGE + GAP) + GAP, 3)
    for row, column in ((0, 0), (0, 1), (1, 0)):
        top, left = TITLE + row * step, GAP + column * (EDGE + GAP)
        assert (sheet[top : top + EDGE, left : left + EDGE] == 51).all()
    assert (sheet[TITLE + step : TITLE + step + EDGE, GAP + EDGE + GAP :] == 255).all()  # no fourth
    red = sheet[2 * TITLE + 2 * step + EDGE :].astype(int)
    assert ((red[..., 0] - red[..., 1]) > 100).any()  # the last caption


def test_values_beyond_the_range_are_clipped():
    sheet = np.asarray(contact_sheet([("", [Tile(torch.tensor([[[-1.0, 2.0]] * 2]), "")])]))
    assert set(sheet[TITLE + 5, GAP : GAP + EDGE].flatten().tolist()) == {0, 255}


def test_captions_stay_in_their_line_whatever_they_say():
    plain, odd = (
        np.asarray(contact_sheet([("", [Tile(torch.zeros(1, 2, 2), caption)])])) for caption in ("a?b?", "a\nb\udcff")
    )
    assert np.array_equal(plain, odd)
