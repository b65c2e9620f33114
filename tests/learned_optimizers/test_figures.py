import math

import pytest
import torch

from lightning_meta.drawing.sheets import image_sheet
from lightning_meta.errors import InputError
from lightning_meta.learned_optimizers.figures import _loss_figure, loss_curves


def rule(end, problems=5, steps=20):
    """Losses that fall from 2 to ``end``; problem 0 is the best, the last one the worst."""
    fall = torch.logspace(math.log10(2), math.log10(end), steps + 1)
    return fall * torch.linspace(0.8, 1.2, problems)[:, None] if problems > 1 else fall[None]


def axes_of(curves, size=(300, 200), marks=()):
    return _loss_figure(curves, "", "loss", size, marks).axes[0]


def legend_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def share(picture, colour):
    """How many pixels have just this colour."""
    return int((picture == torch.tensor(colour)[:, None, None]).all(0).sum())


@pytest.mark.parametrize("size", [(300, 200), (457, 311)])
def test_loss_curves_have_just_the_asked_size(size):
    curves = {"ours": rule(0.2), "Adam": rule(0.4)}
    picture = loss_curves(curves, "a title", size=size, marks=[10])
    assert picture.shape == (3, size[1], size[0])
    assert picture.dtype == torch.uint8
    assert share(picture, (0, 0x72, 0xB2)) > 100
    assert torch.equal(picture, loss_curves(curves, "a title", size=size, marks=[10]))


def test_a_line_is_the_mean_and_a_band_the_middle_of_the_problems():
    losses = torch.arange(1.0, 12.0)[:, None] * torch.tensor([1.0, 0.5])
    axes = axes_of({"ours": losses})
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([6, 3])
    band = axes.collections[0].get_paths()[0].vertices
    for step, low, high in ((0, 2, 10), (1, 1, 5)):  # of 1 to 11 the 10 % quantile is 2
        heights = band[band[:, 0] == step, 1]
        assert (heights.min(), heights.max()) == pytest.approx((low, high))
    assert legend_of(axes) == ["ours: 3"]


def test_ours_is_first_boldest_and_on_top():
    curves = {name: rule(0.2 + i / 10) for i, name in enumerate(["ours", *"abcdefgh"])}
    axes = axes_of(curves, marks=[5, 10])
    ours, *others = axes.lines[: len(curves)]
    bands = axes.collections
    assert [text.split(":")[0] for text in legend_of(axes)] == list(curves)
    assert ours.get_linestyle() == "-"
    for other in others:
        assert other.get_linewidth() < ours.get_linewidth()
        assert other.get_zorder() < ours.get_zorder()
        assert other.get_linestyle() != "-"
        assert other.get_zorder() > max(band.get_zorder() for band in bands)
    looks = {(line.get_color(), str(line._dash_pattern)) for line in [ours, *others]}
    assert len(looks) == len(curves)
    assert [line.get_xdata()[0] for line in axes.lines[len(curves) :]] == [5, 10]


def test_a_rule_that_diverges_does_not_flatten_the_others():
    curves = {"ours": rule(0.2), "Adam": rule(0.4)}
    usual = axes_of(curves).get_ylim()
    wild = rule(0.3)
    wild[:, 5:] = 1e30
    bottom, top = axes_of({**curves, "wild": wild}).get_ylim()
    assert bottom == pytest.approx(usual[0], rel=0.2)
    assert 20 < top < 40
    assert legend_of(axes_of({**curves, "wild": wild}))[2] == "wild: 1e+30"
    picture = loss_curves({**curves, "wild": wild}, size=(300, 200))
    blue = (picture == torch.tensor([0, 0x72, 0xB2])[:, None, None]).all(0).nonzero()[:, 0]
    assert blue.max() - blue.min() > 80  # of 200 pixels


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_line_stops_where_its_mean_does(value):
    bad = rule(0.3)
    bad[3, 7:] = value
    axes = axes_of({"ours": rule(0.2), "bad": bad})
    line = torch.from_numpy(axes.lines[1].get_ydata())
    assert line[:7].isfinite().all()
    assert line[7:].isnan().all()
    assert legend_of(axes)[1] == "bad: diverged"
    assert 2 < axes.get_ylim()[1] < 10
    loss_curves({"ours": bad, "lost": torch.full((3, 9), value)}, size=(300, 200))
    loss_curves({"lost": torch.full((3, 9), value)}, size=(300, 200))


def test_losses_of_zero_and_less_lie_below_the_page():
    solved = rule(0.2)
    solved[:, 10:] = 0
    solved[:, 15:] = -1
    axes = axes_of({"ours": solved, "Adam": rule(0.2), "tiny": torch.full((2, 3), 1e-40)})
    assert 0.05 < axes.get_ylim()[0] < 0.2
    assert 0 < axes.lines[0].get_ydata()[-1] < axes.get_ylim()[0]
    loss_curves({"ours": torch.zeros(2, 5)}, size=(300, 200))


@pytest.mark.parametrize("diverges_at", [None, 2, 16])
def test_the_legend_hides_nothing(diverges_at):
    curves = {"ours": rule(0.2), **{name: rule(1.9) for name in ("Adam", "SGD", "NAG")}}
    if diverges_at:
        curves["NAG"] = curves["NAG"] * 10 ** (torch.arange(21) - diverges_at).clamp(0)
    axes = axes_of({**curves, "short": rule(1.0, steps=7)}, (450, 300))
    axes.figure.canvas.draw()
    legend = axes.get_legend().get_window_extent()
    lines = [line.get_xydata() for line in axes.lines] + [band.get_paths()[0].vertices for band in axes.collections]
    for points in map(axes.transData.transform, lines):
        middles = (points[1:] + points[:-1]) / 2
        assert not any(legend.contains(x, y) for x, y in [*points, *middles])


def test_curves_differ_in_problems_steps_and_precision():
    half = rule(0.3, steps=10).bfloat16().requires_grad_()
    axes = axes_of({"ours": rule(0.2), "half": half, "one": rule(0.4, problems=1)})
    assert axes.get_xlim() == (0, 20)
    assert [len(line.get_ydata()) for line in axes.lines] == [21, 11, 21]
    assert len(axes.collections) == 2  # no band of one problem
    assert legend_of(axes) == ["ours: 0.2", "half: 0.3", "one: 0.4"]
    loss_curves({"only the start": torch.ones(1, 1)}, size=(300, 200))


@pytest.mark.parametrize("shape", [(5,), (0, 5), (5, 0), (2, 3, 4)])
def test_what_is_no_curve_is_named(shape):
    with pytest.raises(InputError, match=r"losses of 'Adam' are .*problems"):
        loss_curves({"ours": rule(0.2), "Adam": torch.ones(shape)})
    with pytest.raises(InputError, match="at least one rule"):
        loss_curves({})


def test_picture_sheet_enlarges_all_to_the_largest():
    red, green = (255, 0, 0), (0, 255, 0)
    content = torch.tensor(red)[:, None, None].expand(3, 30, 40).byte()
    style = torch.tensor([0.0, 1.0, 0.0])[:, None, None].expand(3, 20, 10)
    sheet = image_sheet([{"content": content, "style": style}], scale=3)
    assert sheet.dtype == torch.uint8
    assert share(sheet, red) == 90 * 120
    assert share(sheet, green) == 90 * 45  # as high as the cell, its shape kept
    columns = [(sheet == torch.tensor(colour)[:, None, None]).all(0).nonzero()[:, 1] for colour in (red, green)]
    assert columns[0].max() < columns[1].min()  # in the order of the names
    two = image_sheet([{"content": content, "style": style}, {"style": style}], scale=3)
    assert two.shape[2] == sheet.shape[2]
    assert two.shape[1] > sheet.shape[1] + 90
    assert share(two, red) == 90 * 120  # what a row does not have is blank
    assert share(two, green) == 2 * 90 * 45
    assert torch.equal(two[:, : sheet.shape[1]], sheet)


def test_picture_sheet_clips_and_takes_any_precision():
    def sheet(value, dtype=torch.float32):
        return image_sheet([{"result": torch.full((3, 40, 40), value, dtype=dtype)}], scale=1)

    assert torch.equal(sheet(torch.nan), sheet(0.0))
    assert torch.equal(sheet(-1.0), sheet(0, torch.uint8))
    assert torch.equal(sheet(7.0), sheet(255, torch.uint8))
    assert torch.equal(sheet(torch.inf, torch.bfloat16), sheet(1.0))
    assert share(sheet(0.2), (51, 51, 51)) >= 40 * 40


def test_a_band_of_many_decades_does_not_flatten_the_lines():
    spread = rule(0.2, problems=8)
    spread[:4] *= 1e-8
    bottom, _ = axes_of({"ours": spread, "Adam": rule(0.3)}).get_ylim()
    assert 0.001 < bottom < 0.02
