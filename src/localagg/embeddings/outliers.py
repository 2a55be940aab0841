"""Find odd images: single ones, and small groups of them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import check_argument_types
from ..errors import UserError
from ..io.result_file import check_result_file, write_result
from .neighbors import nearest_others
from .open_table import open_table
from .table import EmbeddingTable

_NEIGHBORS = 20
_COMPANIONS = 5  # nearest images that are named with an odd one


@check_argument_types
def find_outliers(
    table: str | Path | EmbeddingTable,
    *,
    top: int = 20,
    neighbors: int = _NEIGHBORS,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Rank the images of a table by how odd they are; see :func:`outlier_scores`.

    Args:
        table: run folder, or table written by ``localagg embed``.
        top: number of images to return.
        neighbors: k. Groups of up to k odd images are found.
        out: file to write: path, index, label, rank, score, density, isolation of each image, the
            oddest first.

    Returns:
        {"table", "images": N, "neighbors": k, "outliers": [{"path", "index", "label", "score",
        "density", "isolation", "group": paths of other odd images among its 5 nearest}]}.

    Raises:
        UserError: an invalid option, or a table that cannot be read.
    """
    check_result_file(out)
    for name, value in (("--top", top), ("--neighbors", neighbors)):
        if value < 1:
            raise UserError("option-invalid", f"{name} is {value}; it must be at least 1.")
    opened = open_table(table)
    found, cosine = nearest_others(opened.unit_embeddings(), neighbors)
    score, density, isolation = outlier_scores(found, cosine)
    order = score.argsort(descending=True, stable=True)
    values = {"score": score, "density": density, "isolation": isolation}
    if out is not None:
        images = opened.images.take(order.numpy())
        columns = {name: images[name] for name in images.column_names}
        columns["rank"] = list(range(1, len(order) + 1))
        write_result(out, columns | {name: each[order].numpy() for name, each in values.items()})
    best = order[:top].tolist()
    odd = set(best)
    listed = opened.rows(best)
    for row, position in zip(listed, best, strict=True):
        row |= {name: value[position].item() for name, value in values.items()}
        companions = [each for each in found[position, :_COMPANIONS].tolist() if each in odd]
        row["group"] = [each["path"] for each in opened.rows(companions)]
    return {
        "table": str(opened.path),
        "images": len(opened),
        "neighbors": found.shape[1],
        "outliers": listed,
    }


def outlier_scores(neighbors: Tensor, similarity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (score, density, isolation), each float32 [N].

    The density is the cosine similarity to the k-th neighbor, so that fewer than k odd images
    do not make each other look usual. The isolation compares it with the neighborhood: the distance
    to the k-th neighbor, over the median of this distance among the k neighbors. The score is
    (1 - density) * isolation^(1/4); the oddest image has the largest.

    Args:
        neighbors: int64 [N, k] of :func:`.nearest_others`.
        similarity: float32 [N, k].
    """
    if not similarity.shape[1]:  # a single image
        nothing = torch.zeros(len(similarity))
        return nothing, nothing, nothing
    density = similarity[:, -1]
    distance = (1 - density).clamp(min=0)
    around = distance[neighbors].median(dim=1).values
    isolation = distance / around.clamp(min=1e-6)
    return distance * isolation**0.25, density, isolation
