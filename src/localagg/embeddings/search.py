"""Find the most similar images in a table of embeddings."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import load_encoder, weights_digest
from ..config import ViewConfig, from_dict
from ..data.images.decode import READ_ERRORS, decode, read_error_reason
from ..data.loading.cropping import evaluation_batches
from ..data.sources.source import Sample
from ..engine.device import make_fabric
from ..engine.search import sort_by_similarity
from ..errors import UserError, suggest
from .embed import encode
from .table import EmbeddingTable, path_text


def search(
    table: str | Path,
    images: Sequence[str | Path | int],
    weights: str | Path | None = None,
    k: int = 10,
) -> dict[str, Any]:
    """Find the images of a table that are most similar to others, by cosine of their embeddings.

    The search is exact: every row is compared. Equal similarities are sorted by row.

    Args:
        table: file written by ``localagg embed``.
        images: each an image file, or a path or an index in the table. A file takes precedence
            over a path in the table. An image in the table is found by its row, without the
            weights, and is excluded from its own neighbors.
        weights: run folder or weights file of the table. Default: the place recorded in the table.
        k: number of neighbors, capped at the available ones.

    Returns:
        {"table", "rows", "k", "exact": True, "seconds", "queries": [{"image", "index": in the table
        or None, "neighbors": [{"path", "index", "label" if the table has labels, "similarity": -1
        to 1}]}]}, the most similar first.

    Raises:
        UserError: no such table or image, a damaged one, or weights that are missing or not the
            table's.
    """
    start = time.perf_counter()
    if k < 1:
        raise UserError("option-invalid", f"--k is {k}; it must be at least 1.")
    if not images:
        raise UserError("option-missing", "Name at least one image to search for.")
    opened = EmbeddingTable(Path(table))
    positions = [_find_position(opened, image) for image in images]
    files = [Path(str(image)) for image, row in zip(images, positions, strict=True) if row is None]
    embedded = iter(_embed_files(opened, files, weights) if files else ())
    bank_NF = opened.unit_embeddings()
    queries_QF = torch.stack(
        [F.normalize(next(embedded), dim=0) if row is None else bank_NF[row] for row in positions]
    )
    # One more, as an image finds itself.
    found = _nearest(queries_QF, bank_NF, min(k + 1, len(bank_NF)))
    queries = [
        _describe_neighbors(opened, str(image), own, rows, cosines, k)
        for image, own, rows, cosines in zip(images, positions, *found, strict=True)
    ]
    return {
        "table": str(table),
        "rows": len(opened),
        "k": k,
        "exact": True,
        "queries": queries,
        "seconds": round(time.perf_counter() - start, 2),
    }


def _describe_neighbors(
    table: EmbeddingTable, image: str, own: int | None, rows: Tensor, cosines: Tensor, k: int
) -> dict[str, Any]:
    others = rows != (-1 if own is None else own)
    neighbors = table.rows(rows[others][:k].tolist())
    for neighbor, cosine in zip(neighbors, cosines[others][:k].tolist(), strict=True):
        neighbor["similarity"] = cosine
    index = None if own is None else table.rows([own])[0]["index"]
    return {"image": image, "index": index, "neighbors": neighbors}


def _nearest(queries_QF: Tensor, bank_NF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (rows, cosines) [Q, k] of the nearest rows, sorted by cosine, then row."""
    import faiss

    similarity, rows = faiss.knn(
        queries_QF.numpy(), bank_NF.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT
    )
    return sort_by_similarity(torch.from_numpy(rows), torch.from_numpy(similarity).clamp(-1, 1))


def _find_position(table: EmbeddingTable, image: str | Path | int) -> int | None:
    """Return an image's position in the table, or None for a file.

    Raises:
        UserError: neither a file nor in the table.
    """
    name = str(image)
    if not isinstance(image, int):
        if Path(image).is_file():
            return None
        if (row := table.find("path", path_text(name))) is not None:
            return row
        if Path(image).is_dir():
            raise UserError("not-found", f"'{name}' is a folder; name image files in it.")
    index = int(name) if name.isdecimal() else -1
    if 0 <= index < 2**63 and (row := table.find("index", index)) is not None:
        return row
    some = [row["path"] for row in table.rows(range(min(len(table), 1000)))]
    raise UserError(
        "not-found",
        f"There is no image '{name}': neither a file, nor a path or an index in '{table.path}'"
        f" (for example '{some[0]}').{suggest(name, some)}",
    )


class _ImageFiles:
    """Files in the form of a source."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        return Sample(index, self.paths[index].read_bytes(), None)


def _embed_files(
    table: EmbeddingTable, files: Sequence[Path], weights: str | Path | None
) -> Tensor:
    """Return embeddings [files, F] by the table's encoder, layer, view and precision."""
    for path in files:
        try:
            decode(path.read_bytes())
        except READ_ERRORS as error:
            raise UserError(
                "unreadable-images",
                f"'{path}' cannot be read: {read_error_reason(error)}; name another image.",
            ) from None
    facts = table.facts
    place = Path(facts["weights"] if weights is None else weights)
    if weights is None and not place.exists():
        raise UserError(
            "not-found",
            f"The weights of '{table.path}' are no longer at '{place}'; name them by --run, or"
            " search for images in the table.",
        )
    fabric = make_fabric(precision=facts["precision"])
    encoder = load_encoder(place).to(fabric.device).eval()
    if weights_digest(encoder) != facts["weights_digest"]:
        raise UserError(
            "mismatch",
            f"'{place}' are not the weights of '{table.path}', or were trained further; name the"
            " right ones by --run, or embed the images again.",
        )
    source: Any = _ImageFiles(files)
    batches = evaluation_batches(source, from_dict(ViewConfig, facts["views"]), batch=64)
    return torch.cat([encode(encoder, batch.images, facts["layer"], fabric) for batch in batches])
