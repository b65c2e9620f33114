import colorsys
import math

import pytest
import torch
from PIL import Image

from lightning_meta.drawing.files import write_png
from lightning_meta.drawing.sheets import film_strip
from lightning_meta.dynamic_filters.figures import animation, colour_wheel, flow_figure, flow_picture
from lightning_meta.errors import InputError


def clip(T, value, H=16, W=24):
    return torch.full((T, H, W), value)


def rgb(picture, y, x):
    return tuple(picture[:, y, x].tolist())


def share(picture, colour):
    """How many pixels have just this colour."""
    return int((picture == torch.tensor(colour)[:, None, None]).all(0).sum())


@pytest.mark.parametrize(
    ("dx", "dy", "colour"),
    [(2, 0, (0, 255, 255)), (-2, 0, (255, 0, 0)), (0, 2, (128, 0, 255)), (0, -2, (128, 255, 0))],
)
def test_known_directions_have_known_hues(dx, dy, colour):
    flow = torch.tensor([dx, dy])[:, None, None].expand(2, 3, 4)
    picture = flow_picture(flow, max_flow=2)
    assert picture.shape == (3, 3, 4)
    assert picture.dtype == torch.uint8
    assert rgb(picture, 1, 2) == colour
    assert rgb(flow_picture(3 * flow, max_flow=2), 1, 2) == colour  # beyond max_flow: the full colour


def test_flow_picture_equals_colorsys():
    flow = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)) * 3
    picture = flow_picture(flow, max_flow=4)
    for y in range(5):
        for x in range(6):
            dx, dy = flow[:, y, x].tolist()
            hue = (math.atan2(dy, dx) + math.pi) / (2 * math.pi)
            expected = colorsys.hsv_to_rgb(hue, min(1, math.hypot(dx, dy) / 4), 1)
            assert rgb(picture, y, x) == pytest.approx([255 * c for c in expected], abs=0.6)


def test_no_motion_is_white_and_masked_is_grey():
    flow = torch.zeros(2, 2, 2)
    flow[0] = torch.tensor([[0.0, 4.0], [0.0, 4.0]])
    picture = flow_picture(flow, 4, mask=torch.tensor([[True, True], [False, False]]))
    assert rgb(picture, 0, 0) == (255, 255, 255)
    assert rgb(picture, 0, 1) == (0, 255, 255)
    assert rgb(picture, 1, 0) == rgb(picture, 1, 1) == (217, 217, 217)


@pytest.mark.parametrize("size", [40, 41])
def test_colour_wheel_is_the_legend_of_flow_picture(size):
    wheel = colour_wheel(size)
    assert wheel.shape == (3, size, size)
    middle = size // 2
    paleness = wheel.amin(0).int()
    assert (paleness - paleness.flip(0)).abs().max() <= 3
    assert (paleness - paleness.flip(1)).abs().max() <= 3
    assert rgb(wheel, 0, 0) == rgb(wheel, size - 1, size - 1) == (255, 255, 255)
    assert min(rgb(wheel, middle, middle)) > 235
    for dy, dx in ((0, 15), (0, -15), (15, 0), (-15, 0), (8, -9), (0, 19), (19, 0)):
        place = torch.tensor([dx, dy]) + (0.0 if size % 2 else 0.5)
        expected = flow_picture(place[:, None, None], size / 2)
        # a wheel pixel is the mean of 16 samples, hence the few levels of slack
        assert rgb(wheel, middle + dy, middle + dx) == pytest.approx(rgb(expected, 0, 0), abs=6)


def test_film_strip_holds_every_frame_once():
    values = torch.tensor([0.0, 0.5, 1.0])[:, None, None].expand(3, 16, 24)
    strip = film_strip({"a": values, "b": values[:2] * 0.2 + 0.3}, scale=3)
    assert strip.dtype == torch.uint8
    size = 48 * 72
    assert share(strip, (0, 0, 0)) == size
    assert size <= share(strip, (128, 128, 128)) < size + 40  # the text is made of greys too
    assert size <= share(strip, (76, 76, 76)) < size + 40
    assert size <= share(strip, (102, 102, 102)) < size + 40


def test_film_strip_writes_times_once_for_rows_that_share_them():
    rows = {"input": clip(4, 0.0), "prediction": clip(4, 0.0), "truth": clip(4, 0.0)}
    apart = {"input": range(1, 5), "prediction": range(5, 9), "truth": range(5, 9)}
    assert film_strip(rows, apart).shape[1] > film_strip(rows).shape[1]
    assert film_strip(rows, apart).shape[2] == film_strip(rows).shape[2]
    assert not torch.equal(film_strip(rows), film_strip(rows, dict.fromkeys(rows, range(2, 6))))


def test_film_strip_leaves_missing_frames_blank():
    both = film_strip({"a": clip(4, 0.0), "b": clip(4, 0.0)})
    late = film_strip({"a": clip(4, 0.0), "b": torch.cat([clip(2, torch.nan), clip(2, 0.0)])})
    short = film_strip({"a": clip(4, 0.0), "b": clip(2, 0.0)})
    assert both.shape == late.shape == short.shape
    assert share(both, (0, 0, 0)) - share(late, (0, 0, 0)) == 2 * 32 * 48
    assert share(both, (0, 0, 0)) - share(short, (0, 0, 0)) == 2 * 32 * 48
    assert torch.equal(torch.where(late == both, late, 255), late)  # only ever whiter


def test_flow_figure_shows_the_flow_where_something_is_seen():
    frame, prediction = torch.zeros(16, 24), torch.zeros(16, 24)
    frame[2:4, 2:4], prediction[10:12, 10:12] = 1, 1
    flow = torch.stack([torch.full((16, 24), -4.0), torch.zeros(16, 24)])
    with_truth = flow_figure(frame, flow, prediction, torch.full((16, 24), 0.2), max_flow=4, scale=3)
    without = flow_figure(frame, flow, prediction, None, max_flow=4, scale=3)
    red = share(flow_picture(flow[:, :8, :1], 4), (255, 0, 0))
    assert red == 8
    assert share(without, (255, 0, 0)) - share(colour_wheel(30), (255, 0, 0)) == red * 9
    assert share(without, (217, 217, 217)) >= (16 * 24 - 8) * 9
    assert share(with_truth, (51, 51, 51)) >= 16 * 24 * 9
    assert without.shape[1] == with_truth.shape[1]
    assert without.shape[2] < with_truth.shape[2]


def test_animation_marks_input_and_prediction():
    inputs, predictions, truth = clip(3, 0.0), clip(2, 1.0), clip(1, 0.2)
    film = animation(inputs, predictions, truth, scale=2)
    assert film.shape[:2] == (5, 3)
    assert film.dtype == torch.uint8
    border = 2 * 2 * (32 + 48 + 2 * 2)  # two pixels wide
    panel = 32 * 48
    for t in range(5):
        red, green = share(film[t], (220, 40, 40)), share(film[t], (40, 170, 70))
        assert (red >= border, green >= border) == (t < 3, t >= 3)
        assert share(film[t], (0, 0, 0)) == (2 * panel if t < 3 else 0)
    assert share(film[3], (51, 51, 51)) >= panel  # the truth came
    assert share(film[4], (51, 51, 51)) < panel  # and ended
    assert share(film[4], (120, 120, 120)) >= panel
    alone = animation(inputs, predictions, scale=2)
    assert alone.shape[0] == 5
    assert alone.shape[3] * 2 == film.shape[3]


def test_pictures_take_any_precision_and_a_diverged_model():
    x = clip(2, 0.5).bfloat16().requires_grad_()
    flow = torch.full((2, 16, 24), torch.nan)
    for picture in (
        film_strip({"a": x}),
        flow_figure(x[0], flow, clip(1, torch.inf)[0], None, 4),
        animation(x, clip(2, torch.nan)),
    ):
        assert picture.dtype == torch.uint8
    assert (flow_picture(flow, 4) == 255).all()


def test_write_png_keeps_every_pixel(tmp_path):
    picture = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    write_png(path, picture)
    with Image.open(path) as image:
        assert image.size == (7, 5)
        for y in range(5):
            for x in range(7):
                assert image.getpixel((x, y)) == rgb(picture, y, x)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*folder\.png"):
        write_png(tmp_path / "folder.png", picture)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "folder.png"]
