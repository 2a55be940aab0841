"""The health of a run by epoch, with the bounds at which it warned."""

import html
from collections.abc import Mapping
from typing import Any

from ..training import diagnostics as health
from .page import _COLORS, _figure

# name: (title, bound)
_SHOWN = {
    "spread": ("spread", health.LEAST_SPREAD),
    "effective_rank": ("effective rank", None),
    "staleness": ("staleness of the bank", health.MOST_STALE),
    "without_close": ("without a close neighbor", health.MOST_WITHOUT),
    "largest_cluster": ("largest cluster / mean", health.LARGEST_CLUSTER),
    "churn": ("churn of clusters", health.MOST_CHURN),
}


def health_curves(metrics: Mapping[str, list[dict[str, Any]]]) -> str:
    """One small curve a sign, bounds dotted where they are in sight, and what was warned of.

    Args:
        metrics: lines of metrics.jsonl by the name of the run.
    """
    from plotly.subplots import make_subplots

    epochs = {run: [line for line in found if "spread" in line] for run, found in metrics.items()}
    titles = [title for title, _ in _SHOWN.values()]
    figure = make_subplots(rows=2, cols=3, subplot_titles=titles)
    for number, (name, (_, bound)) in enumerate(_SHOWN.items()):
        row, column = number // 3 + 1, number % 3 + 1
        values = []
        for color, (run, lines) in enumerate(epochs.items()):
            points = [line for line in lines if name in line]
            values += [line[name] for line in points]
            figure.add_scatter(
                x=[line["epoch"] for line in points],
                y=[line[name] for line in points],
                name=html.escape(run),
                mode="lines",
                line_color=_COLORS[color % len(_COLORS)],
                showlegend=number == 0,
                row=row,
                col=column,
            )
        if bound is not None and values and min(values) / 2 <= bound <= max(values) * 2:
            figure.add_hline(bound, line_dash="dot", line_color="#888", row=row, col=column)  # type: ignore[arg-type]
    figure.update_layout(height=480)
    warned = "".join(
        f"<li>{html.escape(run)}, epoch {line['epoch']}: {html.escape(', '.join(line['warnings']))}"
        for run, lines in epochs.items()
        for line in lines
        if "warnings" in line
    )
    told = f"<ul>{warned}</ul>" if warned else "<p>Nothing was warned of.</p>"
    return _figure(figure) + told
