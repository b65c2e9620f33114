"""Pictures of results: learning curves of several rules, and sheets of RGB pictures.

Pictures are uint8 (3, H', W'), as ``add_image`` and ``write_png`` take them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_meta.drawing.canvas import to_tensor
from lightning_meta.errors import InputError

# Okabe and Ito (2008): colours that colour-blind people tell apart; yellow is left out, it is lost on white. Six
# colours and seven line styles repeat together only after 42 rules.
_OURS = "#0072B2"
_COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9")
_STYLES = ((5, 2), (7, 2, 1.5, 2), (1.2, 1.5), (12, 3), (5, 1.5, 1.2, 1.5, 1.2, 1.5), (2.5, 1.5), (9, 2, 4, 2))
_DPI = 128  # a power of two: size / _DPI * _DPI is then just the size, to the pixel


def loss_curves(
    curves: dict[str, Tensor],
    title: str = "",
    ylabel: str = "loss",
    size: tuple[int, int] = (900, 600),
    marks: Sequence[int] = (),
) -> Tensor:
    """Draw the loss of several rules against the step, on a logarithmic axis, one line a rule.

    The figure of "Learning to learn by gradient descent by gradient descent" (Andrychowicz et al. 2016, figures 4 and
    5). A line is the mean over problems, its band holds 80 % of them (the 10 % to the 90 % quantile). The legend gives
    the mean at the last step.

    What climbs above ten times the highest mean loss at step 0 leaves the page, so that a rule that diverges does not
    flatten the others. Where the mean is not finite the line stops; the band goes on, for it counts a problem that
    diverged as one of the worst. What is below a tenth of the lowest mean lies below the page, losses of zero too.

    Args:
        curves: The losses by name, each (problems, steps + 1), with problems and steps of its own, on any device and in
            any precision. The first is ours: drawn boldest and on top.
        title: Text above the axes; none: no such line.
        ylabel: Name of the loss, with its unit.
        size: Width and height of the picture in pixels.
        marks: Steps with a vertical dotted line, such as the end of the horizon that the rule was trained on.

    Returns:
        Picture (3, H', W'), uint8, of just this size.

    Raises:
        InputError: If there is no curve or one is not (problems, steps + 1).
    """
    import numpy as np

    canvas = _loss_figure(curves, title, ylabel, size, marks).canvas
    canvas.draw()
    return to_tensor(np.asarray(canvas.buffer_rgba())[..., :3])


def _loss_figure(curves: dict[str, Tensor], title: str, ylabel: str, size: tuple[int, int], marks: Sequence[int]):
    # The object API: pyplot would keep the figure in a global list and could choose a backend with windows
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
        # Outside the page only the direction matters; numbers like 1e300 would overflow as pixels
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

    # Up to three decades have room for more than powers of ten
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
    """Mean, 10 % and 90 % quantile over problems: (3, steps + 1), float64; NaN where a mean is not finite."""
    import numpy as np

    if losses.ndim != 2 or not losses.numel():
        raise InputError(f"losses of {name!r} are {tuple(losses.shape)}: give (problems, steps + 1)")
    losses = losses.detach().cpu().double()
    mean = losses.mean(0)
    mean = torch.where(mean.isfinite(), mean, torch.nan)
    # A problem that diverged counts as a very bad one; NaN itself would void the quantiles of the others. NumPy, since
    # torch.quantile refuses large tensors
    band = np.quantile(losses.nan_to_num(1e300, 1e300, -1e300).numpy(), (0.1, 0.9), axis=0)
    return torch.cat([mean[None], torch.from_numpy(band)])


def _limits(lines: list[Tensor]) -> tuple[float, float]:
    """Ends of the axis for lines and bands of (3, steps + 1), with some air around them."""
    values = torch.cat([line.flatten() for line in lines])
    values = values[(values > 0) & (values < 1e100)]  # no NaN, and no quantile of problems that diverged
    first = torch.stack([line[0, 0] for line in lines])
    first = first[first.isfinite() & (first > 0)]
    if not len(values):
        return 0.1, 1.0
    highest = values.max()
    if len(first):
        highest = min(highest, 10 * first.max())
    # One loss of 1e-40 must not flatten the others either
    lowest = values[values >= 1e-12 * highest].min()
    means = torch.cat([line[0] for line in lines])
    means = means[(means >= lowest) & (means < 1e100)]
    if len(means):  # the lines are what is compared: a band of many decades may leave the page
        lowest = max(lowest, means.min() / 10)
    lowest = min(lowest, highest)  # all that is left may lie above the page
    air = max(1.1, (highest / lowest) ** 0.04)
    return float(lowest / air), float(highest * air)


def _place_legend(axes, lines: Tensor) -> None:
    """Put the legend at the top where the lines and bands (N, steps + 1) are lowest, and raise the top above them."""
    axes.figure.draw_without_rendering()  # the legend has no size before the layout
    legend = axes.get_legend().get_window_extent().transformed(axes.transAxes.inverted())
    left, width = legend.x0, legend.width
    bottom, top = axes.get_ylim()
    heights = {}
    for place, start in {"upper right": left, "upper center": (1 - width) / 2, "upper left": 1 - left - width}.items():
        steps = lines.shape[1] - 1
        under = lines[:, int(start * steps) : math.ceil((start + width) * steps) + 1]
        seen = (under > bottom) & (under <= top)
        leaving = seen.any(1) & (under > top).any(1)  # no room is enough for a rule that diverges just here
        highest = under[seen].max() if seen.any() else bottom
        heights[place] = math.inf if leaving.any() else math.log(highest / bottom) / math.log(top / bottom)
    place = min(heights, key=heights.get)
    axes.get_legend().set_loc(place)
    room = max(0.4, legend.y0 - 0.02)  # many rules on a small page: rather some hidden than all flat
    if room < heights[place] < math.inf:
        axes.set_ylim(bottom, bottom * (top / bottom) ** (heights[place] / room))
