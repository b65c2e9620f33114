"""Loss curves of several optimizers, as an image for ``add_image`` and ``write_png``."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_meta.drawing.canvas import to_tensor
from lightning_meta.errors import InputError

# Okabe and Ito (2008): colours that colour-blind people can distinguish, without yellow, which is hard to see on white.
# A pair of one of six colours and one of seven line styles repeats only after 42 rules.
_OURS = "#0072B2"
_COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9")
_STYLES = ((5, 2), (7, 2, 1.5, 2), (1.2, 1.5), (12, 3), (5, 1.5, 1.2, 1.5, 1.2, 1.5), (2.5, 1.5), (9, 2, 4, 2))
_DPI = 128  # a power of two, so that size / _DPI * _DPI is exactly the size


def loss_curves(
    curves: dict[str, Tensor],
    title: str = "",
    ylabel: str = "loss",
    size: tuple[int, int] = (900, 600),
    marks: Sequence[int] = (),
) -> Tensor:
    """Draw the losses of several rules against the step, on a logarithmic axis, with one line for each rule.

    This is the figure of Andrychowicz et al. 2016 (figures 4 and 5). A line is the mean over problems, and its band
    covers the 10 % to 90 % quantiles. The legend gives the mean at the last step.

    The y axis is cut at ten times the largest initial mean loss, so that a rule that diverges does not flatten the
    others, and at a tenth of the smallest mean. A line stops where its mean is not finite; its band continues, since
    a problem that diverged counts as one of the worst.

    Args:
        curves: Losses by the name of the rule, (problems, steps + 1). Numbers of problems and steps, devices and
            dtypes can differ. The first rule is ours: its line is the boldest and on top.
        title: Text above the axes, if any.
        ylabel: Name of the loss, with its unit.
        size: Width and height of the image in pixels.
        marks: Steps at which to draw a vertical dotted line, such as the last step of the training's horizon.

    Returns:
        Image (3, height, width), uint8.

    Raises:
        InputError: If there is no curve or one is not (problems, steps + 1).

    >>> import torch
    >>> loss_curves({"ours": torch.rand(8, 21), "Adam": torch.rand(8, 21)}, size=(300, 200)).shape
    torch.Size([3, 200, 300])
    """
    import numpy as np

    canvas = _loss_figure(curves, title, ylabel, size, marks).canvas
    canvas.draw()
    return to_tensor(np.asarray(canvas.buffer_rgba())[..., :3])


def _loss_figure(curves: dict[str, Tensor], title: str, ylabel: str, size: tuple[int, int], marks: Sequence[int]):
    # No pyplot: it would keep the figure in a global list and could choose a backend that needs a display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if not curves:
        raise InputError("no curves to draw: give at least one rule")
    lines = {name: _mean_and_band(name, losses) for name, losses in curves.items()}
    bottom, top = _limits(list(lines.values()))
    steps = max(line.shape[1] for line in lines.values()) - 1
    points = max(5.0, 10 * min(size[0] / 900, size[1] / 600))

    figure = Figure((size[0] / _DPI, size[1] / _DPI), dpi=_DPI, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=points / 100, h_pad=points / 100)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.set_xlim(0, max(1, steps))
    for i, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[(i - 1) % len(_COLOURS)] if i else _OURS
        final = f"{line[0, -1]:.3g}" if line[0, -1].isfinite() else "diverged"
        # Values far outside the axes only show a direction; 1e300 would overflow as a pixel
        mean, low, high = line.clamp(bottom * 1e-3, top * 1e3).numpy()
        if len(curves[name]) > 1:
            axes.fill_between(
                range(len(mean)), low, high, color=colour, alpha=0.12 if i else 0.25, linewidth=0, zorder=2 - i / 100
            )
        axes.plot(
            mean,
            color=colour,
            linewidth=points * (0.15 if i else 0.28),
            linestyle=(0, _STYLES[(i - 1) % len(_STYLES)]) if i else "-",
            zorder=3 - i / 100,  # ours on top, and every line above every band
            label=f"{name}: {final}",
        )
    for mark in marks:
        axes.axvline(mark, color="0.4", linewidth=points / 12, linestyle=":", zorder=1)

    # Up to three decades, there is room for more ticks than powers of ten
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top < 1000 * bottom else (1,)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=points)
    axes.grid(color="0.9", linewidth=points / 16)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("step", fontsize=points)
    axes.set_ylabel(ylabel, fontsize=points)
    axes.set_title(title, fontsize=1.1 * points)
    small = 0.9 * points
    axes.legend(title=f"mean final {ylabel}", fontsize=small, title_fontsize=small, handlelength=3.5, loc="upper right")
    ends = (torch.nn.functional.pad(line, (0, steps + 1 - line.shape[1]), value=torch.nan) for line in lines.values())
    _place_legend(axes, torch.cat(list(ends)))
    return figure


def _mean_and_band(name: str, losses: Tensor) -> Tensor:
    """Compute mean, 10 % and 90 % quantile over problems, (3, steps + 1), float64; a mean can be NaN."""
    import numpy as np

    if losses.ndim != 2 or not losses.numel():
        raise InputError(f"losses of {name!r} are {tuple(losses.shape)}: give (problems, steps + 1)")
    losses = losses.detach().cpu().double()
    mean = losses.mean(0)
    mean = torch.where(mean.isfinite(), mean, torch.nan)
    # NaN would make every quantile NaN, so a problem that diverged counts as a very large loss. NumPy, since
    # torch.quantile refuses large tensors
    band = np.quantile(losses.nan_to_num(1e300, 1e300, -1e300).numpy(), (0.1, 0.9), axis=0)
    return torch.cat([mean[None], torch.from_numpy(band)])


def _limits(lines: list[Tensor]) -> tuple[float, float]:
    """Compute the ends of the y axis, with a margin, for lines and bands of (3, steps + 1)."""
    values = torch.cat([line.flatten() for line in lines])
    values = values[(values > 0) & (values < 1e100)]  # neither NaN nor quantiles of problems that diverged
    first = torch.stack([line[0, 0] for line in lines])
    first = first[first.isfinite() & (first > 0)]
    if not len(values):
        return 0.1, 1.0
    highest = values.max()
    if len(first):
        highest = min(highest, 10 * first.max())
    # One loss of 1e-40 must not flatten the others
    lowest = values[values >= 1e-12 * highest].min()
    means = torch.cat([line[0] for line in lines])
    means = means[(means >= lowest) & (means < 1e100)]
    if len(means):  # the lines matter more: a band of many decades can leave the axes
        lowest = max(lowest, means.min() / 10)
    lowest = min(lowest, highest)  # all values left can lie above the axes
    margin = max(1.1, (highest / lowest) ** 0.04)
    return float(lowest / margin), float(highest * margin)


def _place_legend(axes, lines: Tensor) -> None:
    """Put the legend at the top, where lines and bands (N, steps + 1) are lowest, and raise the y limit above them."""
    axes.figure.draw_without_rendering()  # the legend has no size before the layout
    legend = axes.get_legend().get_window_extent().transformed(axes.transAxes.inverted())
    left, width = legend.x0, legend.width
    bottom, top = axes.get_ylim()
    heights = {}
    for place, start in {"upper right": left, "upper center": (1 - width) / 2, "upper left": 1 - left - width}.items():
        steps = lines.shape[1] - 1
        under = lines[:, int(start * steps) : math.ceil((start + width) * steps) + 1]
        seen = (under > bottom) & (under <= top)
        leaving = seen.any(1) & (under > top).any(1)  # a rule that diverges here would cross any legend
        highest = under[seen].max() if seen.any() else bottom
        heights[place] = math.inf if leaving.any() else math.log(highest / bottom) / math.log(top / bottom)
    place = min(heights, key=heights.get)
    axes.get_legend().set_loc(place)
    room = max(0.4, legend.y0 - 0.02)  # many rules on a small figure: hiding some is better than flattening all
    if room < heights[place] < math.inf:
        axes.set_ylim(bottom, bottom * (top / bottom) ** (heights[place] / room))
