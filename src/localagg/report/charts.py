"""Interactive charts as HTML: curves by epoch, health by epoch, and a map of the embedding."""

import html
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.sources.open import Source
from ..training import diagnostics

# Okabe & Ito's colors, which color-blind readers can tell apart, and three of Tol's.
_COLORS = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#B8A900"),
    *("#882255", "#44AA99", "#6B6B6B"),
)
_MAP_POINTS = 5000  # at most: t-SNE takes seconds for these
_HEALTH_CURVES = {  # name: (title, bound)
    "spread": ("spread", diagnostics.LEAST_SPREAD),
    "effective_rank": ("effective rank", None),
    "staleness": ("staleness of the bank", diagnostics.MOST_STALE),
    "without_close": ("without a close neighbor", diagnostics.MOST_WITHOUT),
    "largest_cluster": ("largest cluster / mean", diagnostics.LARGEST_CLUSTER),
    "churn": ("churn of clusters", diagnostics.MOST_CHURN),
}

MetricLines = list[dict[str, Any]]


def curves(metrics: Mapping[str, MetricLines], *, switch: int | None = None) -> str:
    """Draw loss and accuracies by epoch, one color a run.

    Args:
        metrics: lines of metrics.jsonl by the name of the run.
        switch: the epoch in which LA begins; a dotted line marks it.
    """
    from plotly.subplots import make_subplots

    measured = sorted({key for run in metrics.values() for line in run for key in line})
    names = ["loss", *(key for key in measured if "knn" in key)]
    figure = make_subplots(rows=1, cols=len(names), subplot_titles=names)
    for color, (run, lines) in enumerate(metrics.items()):
        last, epochs = (max(line[key] for line in lines) for key in ("step", "epoch"))
        for column, name in enumerate(names, start=1):
            points = {line["step"] * epochs / last: line[name] for line in lines if name in line}
            _add_curve(figure, run, points, color, 1, column)
    if switch:
        figure.add_vline(switch, line_dash="dot", line_color="#888")
    figure.update_xaxes(title="epoch")
    return _to_html(figure, height=340)


def health_curves(metrics: Mapping[str, MetricLines]) -> str:
    """Draw one small curve for each measure of health, and list the warnings.

    A bound is dotted where it lies within a factor of 2 of the values.

    Args:
        metrics: lines of metrics.jsonl by the name of the run.
    """
    from plotly.subplots import make_subplots

    epochs = {run: [line for line in lines if "spread" in line] for run, lines in metrics.items()}
    titles = [title for title, _ in _HEALTH_CURVES.values()]
    figure = make_subplots(rows=2, cols=3, subplot_titles=titles)
    for number, (name, (_, bound)) in enumerate(_HEALTH_CURVES.items()):
        row, column = number // 3 + 1, number % 3 + 1
        values: list[float] = []
        for color, (run, lines) in enumerate(epochs.items()):
            points = {line["epoch"]: line[name] for line in lines if name in line}
            values += points.values()
            _add_curve(figure, run, points, color, row, column)
        if bound is not None and values and min(values) / 2 <= bound <= max(values) * 2:
            figure.add_hline(bound, line_dash="dot", line_color="#888", row=row, col=column)  # type: ignore[arg-type]
    warnings = "".join(
        f"<li>{html.escape(run)}, epoch {line['epoch']}: {html.escape(', '.join(line['warnings']))}"
        for run, lines in epochs.items()
        for line in lines
        if "warnings" in line
    )
    listed = f"<ul>{warnings}</ul>" if warnings else "<p>No warnings.</p>"
    return _to_html(figure, height=480) + listed


def _add_curve(
    figure: Any, run: str, points: dict[float, float], color: int, row: int, column: int
) -> None:
    """Add a run's curve {x: y}; the legend names each run once, at the first chart."""
    figure.add_scatter(
        x=list(points),
        y=list(points.values()),
        name=html.escape(run),
        mode="lines",
        line_color=_COLORS[color % len(_COLORS)],
        showlegend=(row, column) == (1, 1),
        row=row,
        col=column,
    )


def embedding_map(rows: Tensor, source: Source) -> str:
    """Draw unit rows [N, D] of all images of a source on a plane by t-SNE (cosine distance),
    colored by class if there are classes."""
    import plotly.graph_objects as go
    from sklearn.manifold import TSNE

    index = torch.arange(0, len(rows), -(-len(rows) // _MAP_POINTS))
    tsne = TSNE(metric="cosine", init="pca", random_state=0, perplexity=min(30, len(index) / 4))
    x, y = tsne.fit_transform(rows[index].cpu().numpy()).T
    figure = go.Figure()
    classes = source.classes or ["images"]
    labels = source.labels[index].numpy() if source.labels is not None else np.zeros(len(index))
    names = np.array([html.escape(source.name(i)) for i in index.tolist()])
    for number, name in enumerate(classes):
        members = labels == number
        figure.add_scattergl(
            x=x[members],
            y=y[members],
            text=names[members],
            name=html.escape(name),
            mode="markers",
            marker={"size": 5, "color": _COLORS[number % len(_COLORS)]},
            hovertemplate="%{text}",
        )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, scaleanchor="x")
    return _to_html(figure, height=620, legend={"itemsizing": "constant"})


def _to_html(figure: Any, **layout: Any) -> str:
    margin = {"l": 50, "r": 10, "t": 40, "b": 40}
    figure.update_layout(template="plotly_white", margin=margin, **layout)
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False})
