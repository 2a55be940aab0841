"""Write the page of an embedding: map, clusters, near-duplicates and odd images with pictures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.images.levels import STORED, Levels
from ..embeddings.cluster_count import choose_clusters
from ..embeddings.clusters import Fit, cluster_rows
from ..embeddings.map import kept_map, map_rows
from ..embeddings.neighbors import nearest_others
from ..embeddings.outliers import outlier_scores
from .gallery import sprite_budget
from .page import write_page
from .thumbnails import Images, draw_thumbnails

NEIGHBORS = 12
_EXEMPLARS = 12
_PAIRS, _ODDEST = 60, 48
_MOST_GROUPS = 1000  # values of a column that are still a category
_ODD_NEIGHBORS = 20  # that tell how odd an image is, as for localagg outliers


@dataclass
class Pictured:
    """N images with their embedding, at most 50,000."""

    rows: Tensor
    """float32 unit rows [N, D]."""
    paths: list[str]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """Further values of each image, such as "label": strings, numbers or None."""
    images: Images | None = None
    """Without them the page has no pictures."""
    levels: Levels = STORED
    """How samples of further images become pixels, as of these."""
    notes: list[str] = field(default_factory=list)
    """Sentences below the map's heading."""


def write_embedding_page(
    path: Path,
    shown: Pictured,
    *,
    title: str,
    head: str = "",
    foot: str = "",
    kept: Path | None = None,
    clusters: int | None = None,
) -> dict[str, Any]:
    """Write the page atomically.

    Args:
        path: the HTML file.
        shown: images and their embedding.
        title: heading.
        head, foot: HTML above the map and below the last pictures.
        kept: file that keeps the map for the next call.
        clusters: number of clusters. Default: as :func:`choose_clusters` finds.

    Returns:
        {"images": N, "clusters": k, "bytes": size of the page, "pictures": readable ones}.
    """
    count = len(shown.rows)
    k = clusters or (choose_clusters(shown.rows).k if count else 0)
    labels, fit = cluster_rows(shown.rows, k) if count else (torch.empty(0).long(), None)
    xy = map_rows(shown.rows) if kept is None else kept_map(kept, shown.rows)
    near, similarity, oddness = _neighbors(shown.rows)
    # Pictures of one cluster share a sheet: a row of pictures then needs one or two of them.
    order = labels.argsort(stable=True)
    place = order.argsort()
    paths = [shown.paths[i] for i in order.tolist()]
    arrays = {
        "xy": quantize(xy[order]),
        "neighbors": place[near[order]].numpy().astype("<u2"),
        "similarity": (similarity[order] * 32767).round().numpy().astype("<i2"),
    }
    columns = {"cluster": [str(each) for each in labels.tolist()], **shown.columns}
    if near.shape[1]:
        columns["oddness"] = oddness.tolist()
    described, values = _describe_columns(columns, order.tolist())
    arrays |= values
    sections = [] if fit is None else [_cluster_section(shown, labels, fit, place)]
    sections += _neighbor_sections(near, similarity, oddness, place)
    data = {"paths": paths, "map": {"note": " ".join(shown.notes)}, "columns": described}
    data |= {"neighbors": {"width": near.shape[1]}, "sections": sections}
    other = sum(map(len, paths)) + sum(array.nbytes for array in arrays.values()) * 4 // 3
    thumbnails = None
    if shown.images is not None:
        images = _Ordered(shown.images, order.tolist())
        thumbnails = draw_thumbnails(images, sprite_budget(count, other))
    page = {"title": title, "head": head, "foot": foot}
    write_page(path, data=data, arrays=arrays, thumbnails=thumbnails, **page)
    return {
        "images": count,
        "clusters": 0 if fit is None else len(fit.tightness),
        "pictures": 0 if thumbnails is None else int((thumbnails.sizes[:, 0] > 0).sum()),
        "bytes": path.stat().st_size,
    }


def _neighbors(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the shown neighbors of each image, their similarities, and how odd it is."""
    near, similarity = nearest_others(rows, _ODD_NEIGHBORS)
    oddness = outlier_scores(near, similarity)[0]
    return near[:, :NEIGHBORS], similarity[:, :NEIGHBORS], oddness


def _describe_columns(
    columns: dict[str, list[Any]], order: list[int]
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Return the columns that can color the map, and their values by name of array."""
    described, arrays = [], {}
    for number, (name, values) in enumerate(columns.items()):
        found = color_column(name, [values[i] for i in order])
        if found is not None:
            arrays[f"column-{number}"] = found.pop("values")
            described.append({**found, "array": f"column-{number}"})
    return described, arrays


class _Ordered:
    """Images in another order."""

    def __init__(self, images: Images, order: list[int]) -> None:
        self.images, self.order = images, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: int) -> bytes | Tensor:
        return self.images[self.order[number]]


def quantize(xy: Tensor) -> np.ndarray:
    """Return places as uint16 [N, 2]; the longer side spans all values."""
    if not len(xy):
        return np.zeros((0, 2), "<u2")
    low = xy.min(dim=0).values
    span = (xy - low).max().clamp(min=1e-12)
    return ((xy - low) / span * 65535).round().numpy().astype("<u2")


def color_column(name: str, values: Sequence[Any]) -> dict[str, Any] | None:
    """Return a column to color by; None if it has one value, or one for nearly each image."""
    distinct = set(values)
    numbers = all(
        isinstance(v, (int, float)) and not isinstance(v, bool) for v in distinct - {None}
    )
    if len(distinct) < 2 and name != "cluster":
        return None
    if numbers and (len(distinct) > 20 or any(isinstance(v, float) for v in distinct)):
        array = np.array([math.nan if v is None else v for v in values], "<f4")
        finite = array[np.isfinite(array)]
        if not len(finite):
            return None
        low, high = np.quantile(finite, (0.01, 0.99)).tolist()
        return {"name": name, "low": low, "high": high, "values": np.nan_to_num(array, nan=low)}
    if len(distinct) > _MOST_GROUPS or (len(distinct) > 40 and len(distinct) * 2 > len(values)):
        return None
    groups = sorted(distinct - {None}, key=lambda v: (not numbers, _natural(str(v))))
    groups += [None] if None in distinct else []
    code = {value: number for number, value in enumerate(groups)}
    names = [f"no {name}" if v is None else str(v) for v in groups]
    return {"name": name, "names": names, "values": np.array([code[v] for v in values], "<u2")}


def _natural(text: str) -> tuple[int, str]:
    """Sort numbers by size."""
    return (int(text), "") if text.isdecimal() else (1 << 62, text)


def _cluster_section(shown: Pictured, labels: Tensor, fit: Fit, place: Tensor) -> dict[str, Any]:
    """Return a row of pictures for each cluster, the images nearest to its center."""
    classes, rows = shown.columns.get("label"), []
    for cluster, tightness in enumerate(fit.tightness.tolist()):
        members = (labels == cluster).nonzero().flatten()
        best = members[fit.distance[members].argsort(stable=True)[:_EXEMPLARS]]
        facts = [f"{len(members):,} image{'s' * (len(members) != 1)}"]
        if not math.isnan(tightness):
            facts.append(f"tightness {tightness:.2f}")
        known = [classes[i] for i in members.tolist() if classes[i] is not None] if classes else []
        if known:
            most = max(sorted(set(known)), key=known.count)
            facts.append(f"{known.count(most) / len(known):.0%} {most}")
        title = f"Cluster {cluster}: {', '.join(facts)}"
        rows.append({"title": title, "items": place[best].tolist(), "select": ["cluster", cluster]})
    note = "Tightest first; each row begins with the images nearest to the center."
    return {"title": "Clusters", "note": note, "rows": rows}


def _neighbor_sections(
    near: Tensor, similarity: Tensor, oddness: Tensor, place: Tensor
) -> list[dict[str, Any]]:
    """Return the most similar pairs, and the images far from their neighbors."""
    if not near.shape[1]:
        return []
    own = torch.arange(len(near))
    first = near[:, 0]
    kept = ((near[first, 0] != own) | (own < first)).nonzero().flatten()  # a mutual pair once
    pairs = kept[similarity[kept, 0].argsort(descending=True, stable=True)[:_PAIRS]]
    rows = [
        {
            "title": "",
            "items": place[torch.stack([i, first[i]])].tolist(),
            "lines": [[], [f"{similarity[i, 0]:.3f}"]],
        }
        for i in pairs
    ]
    note = (
        f"The {len(rows)} most similar pairs, by cosine; localagg duplicates compares pixels too."
    )
    duplicates = {"title": "Near-duplicates", "note": note, "rows": rows, "pairs": True}
    odd = oddness.argsort(descending=True, stable=True)[:_ODDEST]
    lines = [[f"{oddness[i]:.2f}"] for i in odd]
    note = "Images far from their neighbors, and farther than these are from theirs."
    row = {"title": "", "items": place[odd].tolist(), "lines": lines}
    return [duplicates, {"title": "Oddest", "note": note, "rows": [row]}]
