"""Draw curves as SVG: loss and accuracies by epoch, and a run's health."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..training import diagnostics
from .page import escape

_WIDTH, _HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 24
_COLORS = 6  # of the stylesheet
_MOST = 400  # points of a curve
_HEALTH = {  # name: (title, bound)
    "spread": ("spread", diagnostics.LEAST_SPREAD),
    "effective_rank": ("effective rank", None),
    "staleness": ("staleness of the bank", diagnostics.MOST_STALE),
    "without_close": ("without a close neighbor", diagnostics.MOST_WITHOUT),
    "largest_cluster": ("largest cluster / mean", diagnostics.LARGEST_CLUSTER),
    "churn": ("churn of clusters", diagnostics.MOST_CHURN),
}
Points = list[tuple[float, float]]


def learning_curves(
    runs: Mapping[str, list[dict[str, Any]]], switches: Mapping[str, int] | None = None
) -> str:
    """Return one figure a measure, one color a run, and the warnings of all runs.

    Args:
        runs: lines of metrics.jsonl by the name of the run.
        switches: the epoch in which LA begins, by the name of the run; a dotted line marks it.
    """
    measured = sorted({key for lines in runs.values() for line in lines for key in line})
    titles = {"loss": ("loss", None)}
    titles |= {key: (key, None) for key in measured if "knn" in key}
    titles |= _HEALTH
    marks = sorted({epoch for epoch in (switches or {}).values() if epoch})
    figures = ""
    for name, (title, bound) in titles.items():
        curves = {run: _points(lines, name) for run, lines in runs.items()}
        if any(curves.values()):
            figures += f"<figure><figcaption>{escape(title)}</figcaption>"
            figures += f"{draw_curves(curves, bound=bound, marks=marks)}</figure>"
    keys = "".join(
        f"<li><svg viewBox='0 0 22 8'><path class=s{n % _COLORS} d='M0 4H22'/></svg> "
        f"<bdi>{escape(run)}</bdi></li>"
        for n, run in enumerate(runs)
    )
    legend = f"<ul class=keys>{keys}</ul>" if len(runs) > 1 else ""
    dotted = "<p class=note>The dotted line marks the start of LA.</p>" if marks else ""
    return f"{legend}{dotted}<div class=curves>{figures}</div>{_warnings(runs)}"


def _points(lines: list[dict[str, Any]], name: str) -> Points:
    """Return (epoch, value), thinned evenly; losses are logged several times an epoch."""
    if not lines:
        return []
    last, epochs = (max(line.get(key, 0) for line in lines) for key in ("step", "epoch"))
    scale = epochs / max(1, last)
    points = [(line["step"] * scale, float(line[name])) for line in lines if name in line]
    points = [point for point in points if math.isfinite(point[1])]
    step = -(-len(points) // _MOST) or 1
    return points[::step] + (points[-1:] if (len(points) - 1) % step else [])


def _warnings(runs: Mapping[str, list[dict[str, Any]]]) -> str:
    found = "".join(
        f"<li><bdi>{escape(run)}</bdi>, epoch {line['epoch']}: {escape(warning)}</li>"
        for run, lines in runs.items()
        for line in lines
        for warning in line.get("warnings", ())
    )
    return f"<ul class=warnings>{found}</ul>" if found else "<p class=note>No warnings.</p>"


def draw_curves(
    curves: Mapping[str, Points], *, bound: float | None = None, marks: Sequence[float] = ()
) -> str:
    """Return curves [(x, y), ...] as one SVG image, x from 0.

    Args:
        curves: points by the name of the curve; its place decides its color.
        bound: a dotted level, drawn where it lies within a factor of 2 of the values.
        marks: x of dotted vertical lines.
    """
    points = list(itertools.chain(*curves.values()))
    ys = [y for _, y in points]
    if bound is not None and min(ys) / 2 <= bound <= max(ys) * 2:
        ys.append(bound)
    else:
        bound = None
    ticks = _ticks(min(ys), max(ys))
    low, high = min(*ys, ticks[0]), max(*ys, ticks[-1])
    right = max((x for x, _ in points), default=1) or 1

    def x_of(x: float) -> float:
        return _LEFT + x / right * (_WIDTH - _LEFT - _RIGHT)

    def y_of(y: float) -> float:
        share = (y - low) / (high - low) if high > low else 0.5
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img>"]
    for tick in ticks:
        y = y_of(tick)
        parts.append(f"<path class=grid d='M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}'/>")
        parts.append(f"<text x={_LEFT - 6} y={y + 4:.1f} text-anchor=end>{tick:g}</text>")
    for tick in _ticks(0, right):
        if tick <= right:
            x, y = x_of(tick), _HEIGHT - 6
            parts.append(f"<text x={x:.1f} y={y} text-anchor=middle>{tick:g}</text>")
    inside = [x_of(mark) for mark in marks if 0 < mark < right]
    parts += [f"<path class=mark d='M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}'/>" for x in inside]
    if bound is not None:
        parts.append(f"<path class=mark d='M{_LEFT} {y_of(bound):.1f}H{_WIDTH - _RIGHT}'/>")
    for number, (name, found) in enumerate(curves.items()):
        if found:
            line = "L".join(f"{x_of(x):.1f} {y_of(y):.1f}" for x, y in found)
            title = f"<title>{escape(name)}, at the end {found[-1][1]:.4g}</title>"
            dot = " dot" * (len(found) == 1)
            style = f"'s{number % _COLORS}{dot}'"
            parts.append(f"<path class={style} d='M{line}h.1'>{title}</path>")
    return "".join(parts) + "</svg>"


def _ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers that span the values."""
    span = (high - low) or abs(high) or 1.0
    size = 10 ** math.floor(math.log10(span / 3))
    step = next(size * factor for factor in (1, 2, 5, 10) if span / (size * factor) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 12) for number in range(first, last + 1)]
