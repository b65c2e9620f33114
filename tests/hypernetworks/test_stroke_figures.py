from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from lightning_meta.hypernetworks.stroke_figures import draw, svg
from lightning_meta.sources.strokes import from_lines

SQUARE = from_lines([np.array([[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]])])
CROSS = from_lines([np.array([[0, 0], [10, 10]]), np.array([[10, 0], [0, 10]])])
WHITE = torch.full((3,), 255, dtype=torch.uint8)


def test_draws_what_the_pen_did():
    picture = draw([SQUARE], cell=(52, 52))
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, 52, 52)
    assert torch.equal(picture[:, 26, 26], WHITE)  # the middle of a square
    for y, x in ((6, 26), (46, 26), (26, 6), (26, 46)):
        assert (picture[:, y, x] < 100).all()
    assert (picture[:, :3] == 255).all()
    assert len(picture.unique()) > 5  # smooth edges
    crossed = draw([CROSS], cell=(52, 52))
    assert (crossed[:, 26, 26] < 100).all()
    assert torch.equal(crossed[:, 26, 44], WHITE)  # the pen was up from one stroke to the other


def test_pages_are_grids_in_one_size():
    small = SQUARE * [0.5, 0.5, 1]
    page = draw([SQUARE, SQUARE, small, SQUARE, SQUARE], columns=3, cell=(60, 52))
    assert page.shape == (3, 104, 180)
    ink = (page < 128).any(0)
    assert torch.equal(ink[:52, :60], ink[:52, 60:120])
    assert not ink[52:, 120:].any()  # a free cell
    rows, columns = torch.where(ink[:52, 120:])
    assert 20 <= rows.max() - rows.min() <= 23
    assert abs(columns.float().mean() - 30) < 1


def test_one_wild_sequence_neither_overflows_its_cell_nor_shrinks_the_others():
    page = draw([SQUARE, SQUARE, SQUARE * [1e6, 1e6, 1]], cell=(52, 52))
    assert torch.equal(page[:, :52], draw([SQUARE], cell=(52, 52)))
    assert torch.equal(page[:, 104:], page[:, :52])


def test_points_that_are_not_finite_end_a_drawing():
    broken = np.concatenate([SQUARE, [[np.nan, 0, 0], [5, 5, 1]]])
    assert torch.equal(draw([broken], cell=(52, 52)), draw([SQUARE], cell=(52, 52)))
    assert (draw([broken[5:]]) == 255).all()
    assert (draw([SQUARE[:1]]) < 128).any()  # one point is a dot


def test_the_scale_is_undone():
    flat = SQUARE / np.array([1, 5, 1])
    assert torch.equal(draw([flat], cell=(52, 52), scale=(1, 5)), draw([SQUARE], cell=(52, 52)))


@pytest.mark.parametrize("sequence", [SQUARE, CROSS, SQUARE[:1]])
def test_svg_has_a_path_a_stroke(sequence):
    text = svg([sequence, sequence], cell=(52, 52), title="<ink> & paper")
    tree = ElementTree.fromstring(text)
    name = "{http://www.w3.org/2000/svg}"
    assert tree.attrib["viewBox"] == "0 0 52 104"
    assert tree.findtext(f"{name}title") == "<ink> & paper"
    paths = [path.attrib["d"] for path in tree.iter(f"{name}path")]
    assert len(paths) == 2 * int(sequence[:, 2].sum() or 1)
    for path in paths:
        points = np.array([point.split(",") for point in path[1:].split(" L")], float)
        assert len(points) >= 2
        assert (points >= 0).all()
        assert (points[:, 0] <= 52).all()
