"""The latency-against-accuracy plot of one target, as SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmedge.report.model import Report
from mmedge.report.values import Scale

# Stand-ins in matplotlib's output for the page's own colours, which change with light and dark.
_INK, _FAINT, _LINE = "#010101", "#020202", "#030303"
_ON_PAGE = {_INK: "var(--ink)", _FAINT: "var(--faint)", _LINE: "var(--line)"}
# Okabe and Ito's palette without yellow, told apart by most colour-blind readers; the markers help the others.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_MARKERS = "osD^vPX"
_PLACES = [(9, 7), (9, -14), (-9, 7), (-9, -14)]  # of a label, in points from its marker
_WIDE = 4.0  # where the slowest is so many times slower than the fastest, the others would lie on top of each other
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _FAINT,
    "text.color": _INK,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _FAINT,
    "ytick.labelcolor": _FAINT,
}


@dataclass(frozen=True)
class _Point:
    label: str
    x: float
    y: float
    x_ci: tuple[float, float] | None
    y_ci: tuple[float, float] | None


def latency_accuracy(report: Report, target: str) -> str:
    """An ``<svg>`` element with every stage that has both figures on ``target``; empty where none has.

    The same report gives the same text.
    """
    points = _points(report, target)
    if not points:
        return ""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    scale = Scale.of(report)
    with rc_context({**_STYLE, "svg.hashsalt": target}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser's fonts draw the text
        figure = Figure(figsize=(5.2, 3.5), layout="constrained")
        figure.patch.set_visible(False)
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        _draw(axes, points)
        unit = f", {scale.unit}" if scale.unit else ""
        axes.set_ylabel(f"{scale.name}{unit}", parse_math=False)
        axes.set_xlabel("p50 latency, ms" + (", logarithmic" if axes.get_xscale() == "log" else ""))
        _label(figure, axes, points)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(text.getvalue(), f"{scale.name} against p50 latency on {target}")


def _points(report: Report, target: str) -> list[_Point]:
    factor = 100.0 if Scale.of(report).fraction else 1.0
    found: list[_Point] = []
    rows = report.rows(target)
    stages = [stage.name for stage, _ in rows]
    for stage, result in rows:
        accuracy, latency = result.accuracy, result.latency_ms
        if accuracy is None or latency is None or latency.p50 is None:
            continue
        label = stage.name if stages.count(stage.name) == 1 else f"{stage.name} {result.precision}"
        y_ci = (factor * accuracy.ci95[0], factor * accuracy.ci95[1]) if accuracy.ci95 else None
        found.append(_Point(label, latency.p50, factor * accuracy.value, latency.ci95, y_ci))
    return found


def _draw(axes: Any, points: Sequence[_Point]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.plot([p.x for p in points], [p.y for p in points], color=_LINE, linewidth=1.2, zorder=1)
    for index, point in enumerate(points):
        colour = _COLOURS[index % len(_COLOURS)]
        axes.errorbar(
            point.x,
            point.y,
            xerr=_arms(point.x, point.x_ci),
            yerr=_arms(point.y, point.y_ci),
            fmt=_MARKERS[index % len(_MARKERS)],
            color=colour,
            markersize=8,
            capsize=3,
            linewidth=1.2,
            zorder=3,
        )
    axes.margins(x=0.16, y=0.22)
    axes.ticklabel_format(useOffset=False)
    axes.locator_params(axis="x", nbins=5)  # more labels like 0.0615 run into each other
    latencies = [point.x for point in points]
    if 0 < _WIDE * min(latencies) <= max(latencies):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
    axes.grid(color=_LINE, linewidth=0.5, alpha=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _arms(value: float, interval: tuple[float, float] | None) -> list[list[float]] | None:
    if interval is None:
        return None
    return [[max(0.0, value - interval[0])], [max(0.0, interval[1] - value)]]


def _label(figure: Any, axes: Any, points: Sequence[_Point]) -> None:
    """Write the names where they touch neither each other nor a marker, nor leave the axes, as far as possible."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    reach = 7 * renderer.dpi / 72
    spots = [axes.transData.transform((p.x, p.y)) for p in points]
    taken = [Bbox([spot - reach, spot + reach]) for spot in spots]
    for point in points:  # the confidence bars, thin boxes
        (left, right), (low, high) = point.x_ci or (point.x, point.x), point.y_ci or (point.y, point.y)
        taken.append(Bbox(axes.transData.transform([(left, point.y), (right, point.y)])).padded(1))
        taken.append(Bbox(axes.transData.transform([(point.x, low), (point.x, high)])).padded(1))
    frame = axes.get_window_extent(renderer)
    for point in points:
        tries = []
        for rank, (y, place) in enumerate(_places(point)):
            text = _write(axes, point, y, place)
            box = text.get_window_extent(renderer)
            inside = Bbox.intersection(box, frame)
            outside = 1 - (inside.width * inside.height / (box.width * box.height) if inside else 0)
            tries.append((sum(box.overlaps(other) for other in taken) + 20 * outside, rank, text, box))
        *_, best, box = min(tries, key=lambda item: item[:2])
        for _, _, text, _ in tries:
            if text is not best:
                text.remove()
        taken.append(box)


def _places(point: _Point) -> list[tuple[float, tuple[int, int]]]:
    """Where a label may stand: beside the marker, or above or below the confidence bar."""
    low, high = point.y_ci or (point.y, point.y)
    return [*((point.y, place) for place in _PLACES), (high, (0, 5)), (low, (0, -14))]


def _write(axes: Any, point: _Point, y: float, place: tuple[int, int]) -> Any:
    side = "left" if place[0] > 0 else "right" if place[0] < 0 else "center"
    return axes.annotate(
        point.label,
        (point.x, y),
        xytext=place,
        textcoords="offset points",
        ha=side,
        parse_math=False,
        annotation_clip=False,
        zorder=4,
    )


def _inline(svg: str, title: str) -> str:
    """The bare element: no prologue, no URL, no ids that another plot on the page has too, the page's colours."""
    from markupsafe import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<g) id="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 role="img" aria-label="{escape(title)}"', svg, count=1)
    for stand_in, colour in _ON_PAGE.items():
        svg = svg.replace(stand_in, colour)
    return svg
