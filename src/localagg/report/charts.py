"""Interactive charts as HTML: curves by epoch, health by epoch, and a map of the embedding."""

import html
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.sources.open import Source
from ..training import diagnostics as health

_COLORS = (  # Okabe & Ito's, which color-blind readers can tell apart, and three of Tol's
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#D55E00",
    "#56B4E9",
    "#B8A900",
    "#882255",
    "#44AA99",
    "#6B6B6B",
)
_MAPPED = 5000  # points on the map, at most: t-SNE takes seconds for these
# name: (title, bound)
_SHOWN = {
    "spread": ("spread", health.LEAST_SPREAD),
    "effective_rank": ("effective rank", None),
    "staleness": ("staleness of the bank", health.MOST_STALE),
    "without_close": ("without a close neighbor", health.MOST_WITHOUT),
    "largest_cluster": ("largest cluster / mean", health.LARGEST_CLUSTER),
    "churn": ("churn of clusters", health.MOST_CHURN),
}


def curves(metrics: Mapping[str, list[dict[str, Any]]], *, switch: int | None = None) -> str:
    """Loss and accuracies by epoch, one color a run.

    Args:
        metrics: lines of metrics.jsonl by the name of the run.
        switch: the epoch where LA takes over, marked.
    """
    from plotly.subplots import make_subplots

    lines = [line for run in metrics.values() for line in run]
    measured = sorted({key for line in lines for key in line if "knn" in key})
    names = ["loss", *measured]
    figure = make_subplots(rows=1, cols=len(names), subplot_titles=names)
    for number, (run, found) in enumerate(metrics.items()):
        last = max(line["step"] for line in found)
        epochs = max(line["epoch"] for line in found)
        for column, name in enumerate(names, start=1):
            points = [line for line in found if name in line]
            figure.add_scatter(
                x=[line["step"] * epochs / last for line in points],
                y=[line[name] for line in points],
                name=html.escape(run),
                mode="lines",
                line_color=_COLORS[number],
                showlegend=column == 1,
                row=1,
                col=column,
            )
    if switch:
        figure.add_vline(switch, line_dash="dot", line_color="#888")
    figure.update_xaxes(title="epoch")
    figure.update_layout(height=340)
    return _figure(figure)


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


def space_map(rows: Tensor, source: Source) -> str:
    """The embedding on a plane by t-SNE (cosine distance), colored by class where there is one.

    Args:
        rows: unit rows [N, D], of all images of ``source``.
        source: gives classes and names.
    """
    import plotly.graph_objects as go
    from sklearn.manifold import TSNE

    shown = torch.arange(0, len(rows), -(-len(rows) // _MAPPED))
    flow = TSNE(metric="cosine", init="pca", random_state=0, perplexity=min(30, len(shown) / 4))
    x, y = flow.fit_transform(rows[shown].cpu().numpy()).T
    figure = go.Figure()
    classes = source.classes or ["images"]
    labels = source.labels[shown].numpy() if source.labels is not None else np.zeros(len(shown))
    names = np.array([html.escape(source.name(i)) for i in shown.tolist()])
    for number, name in enumerate(classes):
        chosen = labels == number
        figure.add_scattergl(
            x=x[chosen],
            y=y[chosen],
            text=names[chosen],
            name=html.escape(name),
            mode="markers",
            marker={"size": 5, "color": _COLORS[number % len(_COLORS)]},
            hovertemplate="%{text}",
        )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, scaleanchor="x")
    figure.update_layout(height=620, legend={"itemsizing": "constant"})
    return _figure(figure)


def _figure(figure: Any) -> str:
    figure.update_layout(template="plotly_white", margin={"l": 50, "r": 10, "t": 40, "b": 40})
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False})
