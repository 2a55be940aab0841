"""A self-contained HTML page: sections of text, tables, charts and images."""

import base64
import html
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.images.decode import UnreadableImage, decode
from ..data.sources.open import Source
from ..evaluation.knn import nearest_rows
from ..io.files import atomic_write

_THUMBNAIL = 48  # pixels
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1c1c1c;max-width:1060px;
margin:2.5em auto;padding:0 1.2em}
h1{font-size:1.9em;line-height:1.2}h2{margin-top:2.2em;font-size:1.2em}
.lead{font-size:1.1em;color:#444;max-width:46em}
table{border-collapse:collapse}
td,th{padding:.35em 1.1em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left;padding-left:0}tr:last-child td{font-weight:600}
.grid{display:grid;grid-template-columns:repeat(2,max-content);gap:.55em 3em}
.row{display:flex;gap:4px;align-items:center}.row b{width:1.2em;text-align:center;color:#888}
img{width:48px;height:48px;image-rendering:pixelated;border-bottom:4px solid transparent}
img.right{border-color:#009E73}img.wrong{border-color:#D55E00}
@media(max-width:900px){.grid{grid-template-columns:max-content}}
"""


@dataclass
class Page:
    """A title, a sentence or two, and sections of (heading, HTML)."""

    title: str
    lead: str
    sections: list[tuple[str, str]] = field(default_factory=list)

    def add(self, heading: str, body: str) -> None:
        """Append a section; ``body`` is HTML."""
        self.sections.append((heading, body))


def write_page(path: Path, page: Page) -> None:
    """Write the page atomically as one file that needs nothing else."""
    from plotly.offline import get_plotlyjs

    body = "".join(f"<h2>{html.escape(h)}</h2>{content}" for h, content in page.sections)
    text = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(page.title)}</title>"
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>"
        f"<script>{get_plotlyjs()}</script><body><h1>{html.escape(page.title)}</h1>"
        f"<p class=lead>{html.escape(page.lead)}</p>{body}</body></html>"
    )
    with atomic_write(path) as beside:
        beside.write_text(text, encoding="utf-8")


_HEADINGS = {"name": "", "knn1": "1-NN", "nmi": "NMI", "cluster_accuracy": "cluster accuracy"}


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows of equal keys as an HTML table; the last row is bold."""
    rows = list(rows)
    head = "".join(f"<th>{html.escape(_HEADINGS.get(key, key))}</th>" for key in rows[0])
    lines = ""
    for row in rows:
        cells = (f"{v:.3f}" if isinstance(v, float) else html.escape(str(v)) for v in row.values())
        lines += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    return f"<table><tr>{head}</tr>{lines}</table>"


def neighbor_grid(
    query_rows: Tensor,
    queries: Source,
    reference_rows: Tensor,
    references: Source,
    *,
    count: int = 20,
    k: int = 8,
) -> str:
    """Return queries with their nearest neighbors as HTML; lines mark right and wrong classes.

    Args:
        query_rows: unit rows [Q, D] of ``queries``.
        queries: images, of which ``count`` are chosen evenly over the classes where there are any.
        reference_rows: unit rows [N, D] of ``references``.
        references: images among which the ``k`` neighbors are searched.
    """
    chosen = _spread_over_classes(queries, count)
    found, _ = nearest_rows(query_rows[chosen], reference_rows, min(k, len(reference_rows)))
    lines = ""
    for query, neighbors in zip(chosen.tolist(), found.tolist(), strict=True):
        wanted = _class_name(queries, query)
        images = "".join(_image_tag(references, i, wanted) for i in neighbors)
        lines += f"<div class=row>{_image_tag(queries, query)}<b>&rarr;</b>{images}</div>"
    return f"<div class=grid>{lines}</div>"


def _spread_over_classes(source: Source, count: int) -> Tensor:
    if source.labels is None or source.classes is None or (source.labels < 0).any():
        return torch.linspace(0, len(source) - 1, min(count, len(source))).long()
    order = source.labels.argsort(stable=True)
    counts = source.labels.bincount(minlength=len(source.classes))
    position = torch.cat([torch.arange(n) for n in counts.tolist()])
    # The first of each class, then the second of each, until there are enough.
    by_turn = order[position.argsort(stable=True)][:count]
    return by_turn[source.labels[by_turn].argsort(stable=True)]


def _class_name(source: Source, index: int) -> str | None:
    if source.labels is None or source.classes is None or source.labels[index] < 0:
        return None
    return source.classes[int(source.labels[index])]


def _image_tag(source: Source, index: int, wanted: str | None = None) -> str:
    from PIL import Image

    try:
        pixels = source[index].image
        pixels = decode(pixels) if isinstance(pixels, bytes) else pixels
    except UnreadableImage:
        pixels = torch.zeros(3, 1, 1, dtype=torch.uint8)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    label = _class_name(source, index)
    verdict = "" if wanted is None else " class=right" if label == wanted else " class=wrong"
    title = html.escape(source.name(index) + (f": {label}" if label else ""), quote=True)
    return f"<img{verdict} title=\"{title}\" src='data:image/png;base64,{data}'>"
