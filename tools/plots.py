"""Bars of what was published beside what was measured, one panel an experiment, as SVG: the same wherever it is made.

What is drawn is written into the file's description too, so that a test can tell whether it is what the records say.
"""

import io
import json
import re
import textwrap
from typing import Any, NamedTuple
from xml.etree import ElementTree

# Okabe and Ito's colours, which most colour-blind people tell apart; what was published is hollow
_FILLS = {"published": "white", "measured": "#0072B2", "variant": "#8CC9EC", "baseline": "#C4C4C4"}
_EDGES = {"published": "#D55E00", "measured": "#0072B2", "variant": "#0072B2", "baseline": "#8A8A8A"}
_LEGEND = {
    "published": "published, on the paper's data",
    "measured": "measured here",
    "variant": "variant, measured here",
    "baseline": "baseline, measured here",
}
_INK, _PALE = "#222222", "#666666"
_LABEL, _NOTE = 34, 92  # characters
_WIDTH, _LEFT, _RIGHT, _PITCH, _HEAD, _FOOT, _LINE = 5.0, 1.95, 0.15, 0.23, 0.52, 0.3, 0.14  # inches of a panel
_TOP = 0.65
_SHORTER = {
    r"\n +": "\n",
    r"\bDejaVuSans": "f",
    r"(\d\d\.\d\d)\d+": r"\1",
    r'transform="translate\(([\d.]+) 0\)"': r'x="\1"',
}


class Bar(NamedTuple):
    """One number."""

    label: str
    kind: str  # of _FILLS
    value: float | None  # None: no bar, the text alone
    half: float | None  # half the width of the 95 % interval
    text: str


class Panel(NamedTuple):
    """One experiment."""

    title: str
    measure: str
    bars: list[Bar]
    note: str  # where the data are from


def bars(title: str, panels: list[Panel]) -> str:
    """Draws panels in two columns, row by row; gives the text of an SVG file."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [panels[i : i + 2] for i in range(0, len(panels), 2)]
    heights = [max(map(_height, row)) for row in rows]
    size = 2 * _WIDTH, _TOP + sum(heights)
    with rc_context({"svg.hashsalt": title, "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 8}):
        figure = Figure(figsize=size, facecolor="white")
        patches = [Patch(facecolor=_FILLS[k], edgecolor=_EDGES[k], linewidth=1.2, label=v) for k, v in _LEGEND.items()]
        above = {"loc": "upper left", "frameon": False, "borderaxespad": 0, "handlelength": 1.4, "columnspacing": 2}
        figure.legend(
            handles=patches, ncols=4, bbox_to_anchor=(0.1 / size[0], 1 - 0.1 / size[1]), fontsize=8.5, **above
        )
        hint = "Lower is better in every panel; whiskers are 95 % intervals."
        figure.text(0.15 / size[0], 1 - 0.5 / size[1], hint, color=_PALE)
        top = _TOP
        for row, height in zip(rows, heights, strict=True):
            for column, panel in enumerate(row):
                _draw(figure, panel, column * _WIDTH, top)
            top += height
        file = io.StringIO()
        described = {"Title": title, "Description": json.dumps(panels), "Date": None, "Creator": None}
        figure.savefig(file, format="svg", metadata=described)
    head, body = file.getvalue().split("</metadata>")
    for long, short in _SHORTER.items():
        body = re.sub(long, short, body)
    return f"{head}</metadata>{body}"


def drawn(svg: str) -> list[Any]:
    """The panels that ``bars`` drew, as JSON has them."""
    return json.loads(ElementTree.fromstring(svg).findtext(".//{http://purl.org/dc/elements/1.1/}description"))


def _height(panel: Panel) -> float:
    return _HEAD + len(panel.bars) * _PITCH + _FOOT + len(textwrap.wrap(panel.note, _NOTE)) * _LINE + 0.2


def _draw(figure: Any, panel: Panel, left: float, top: float) -> None:
    width, height = figure.get_size_inches()
    count, depth = len(panel.bars), len(panel.bars) * _PITCH

    def place(x: float, y: float) -> tuple[float, float]:
        return (left + x) / width, 1 - (top + y) / height

    figure.text(*place(0.15, 0.1), panel.title, color=_INK, fontsize=10, fontweight="bold", va="top")
    figure.text(*place(0.15, 0.29), panel.measure, color=_PALE, va="top")
    for i, line in enumerate(textwrap.wrap(panel.note, _NOTE)):
        figure.text(*place(0.15, _HEAD + depth + _FOOT + i * _LINE), line, color=_PALE, fontsize=6.5, va="top")
    x, y = place(_LEFT, _HEAD + depth)
    axes = figure.add_axes((x, y, (_WIDTH - _LEFT - _RIGHT) / width, depth / height))
    start = _scale(axes, panel)
    for i, bar in enumerate(panel.bars):
        if bar.value is None:
            axes.text(0.01, i, bar.text, transform=axes.get_yaxis_transform(), va="center", color=_PALE, style="italic")
            continue
        colours = {"facecolor": _FILLS[bar.kind], "edgecolor": _EDGES[bar.kind]}
        axes.barh(i, bar.value - start, left=start, height=0.66, linewidth=1.2, zorder=2, **colours)
        if bar.half:
            lower = bar.half if axes.get_xscale() == "linear" else min(bar.half, bar.value - start)
            axes.errorbar(bar.value, i, xerr=[[lower], [bar.half]], color=_INK, linewidth=1, capsize=2, zorder=3)
        end, away = (bar.value - (bar.half or 0), -1) if bar.value < 0 else (bar.value + (bar.half or 0), 1)
        weight = {"fontweight": "bold"} if bar.kind == "measured" else {}
        side = {"xytext": (4 * away, 0), "textcoords": "offset points", "ha": "left" if away > 0 else "right"}
        axes.annotate(bar.text, (end, i), va="center_baseline", color=_INK, fontsize=7.5, **side, **weight)
    axes.set_ylim(count - 0.4, -0.6)
    axes.set_yticks(range(count), [textwrap.shorten(bar.label, _LABEL, placeholder=" ...") for bar in panel.bars])
    axes.tick_params("y", length=0, pad=4, labelcolor=_INK)
    axes.tick_params("x", labelsize=6.5, length=2, color=_PALE, labelcolor=_PALE)
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.6, zorder=0)
    axes.axvline(start, color=_PALE, linewidth=0.8, zorder=4)
    axes.spines[:].set_visible(False)


def _scale(axes: Any, panel: Panel) -> float:
    """Sets the x axis, with room for the texts at the bars' ends; gives where the bars begin."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    known = [bar for bar in panel.bars if bar.value is not None]
    if not known:
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_locator(NullLocator())
        return 0
    ends = [bar.value + sign * (bar.half or 0) for bar in known for sign in (-1, 1)]
    low, high = min(bar.value for bar in known), max(ends)
    if low > 0 and high > 30 * low:
        start = 10.0 ** _digits(low)
        axes.set_xscale("log")
        axes.set_xlim(start, start * (high / start) ** 1.5)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title("log scale", loc="right", fontsize=6.5, color=_PALE, pad=2)
        return start
    span = max(high, 0) - min(min(ends), 0)
    axes.set_xlim(min(ends) - 0.45 * span if low < 0 else 0, high + 0.45 * span if high > 0 else 0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    return 0


def _digits(value: float) -> int:
    """The exponent of the largest power of ten below ``value``, three tenths of a decade below at least."""
    exponent = 0
    while 10.0**exponent > value / 2:
        exponent -= 1
    while 10.0 ** (exponent + 1) <= value / 2:
        exponent += 1
    return exponent
