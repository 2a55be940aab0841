"""The nearest images of a table of embeddings, by a faiss index."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import load_encoder, weights_digest
from ..config import ViewConfig, from_dict
from ..data.images.decode import READ_ERRORS, decode
from ..data.loading.cropping import evaluation_batches
from ..data.sources.source import Sample
from ..engine.device import make_fabric
from ..errors import UserError, suggest
from ..io.console import show_progress
from .embed import encode
from .table import EmbeddingTable, text

EXACT_ROWS = 1_000_000  # from here on the index is approximate
# It has sqrt(rows) lists: more would make a query cheaper, but the index is built for one search.
_PROBED = 16  # a query looks into one list in so many,
_LEAST = 8  # ... and into so many at least
_TRAINED = 64  # rows that a list is trained on


class SearchQuery(NamedTuple):
    """An image that is asked about: in the table already, or a file."""

    name: str
    row: int | None
    """Its position in the table."""
    file: Path | None


def search(
    table: str | Path,
    images: Sequence[str | Path | int],
    weights: str | Path | None = None,
    k: int = 10,
) -> dict[str, Any]:
    """The images of a table that are most similar to others, by the cosine of their embeddings.

    Below a million rows every row is compared (IndexFlatIP). From a million on an inverted file
    (IndexIVFFlat) looks into a sixteenth of its lists: similarities are still exact, but a neighbor
    in another list is missed.

    Args:
        table: file written by ``localagg embed``.
        images: each an image file; or a path as in the table; or an index as in the table. A file
            that is there comes before a path in the table of the same name. What is in the table is
            answered by its row, without the weights, and does not find itself.
        weights: run folder or weights file that made the table. None: where they lay then.
        k: neighbors; at most as many as there are.

    Returns:
        {"table", "rows", "k", "engine": the index in words, "exact": bool, "seconds", "queries":
        [{"image", "index": in the table or None, "neighbors": [{"path", "index", "label" where
        there are labels, "similarity": -1 to 1}]}]}, the most similar first.

    Raises:
        UserError: not such a table, or a damaged one; no such image; a file that cannot be read;
            weights that are gone, or others than those that made the table.
    """
    start = time.perf_counter()
    if k < 1:
        raise UserError("TODO", f"--k is {k}; it must be at least 1.")
    if not images:
        raise UserError("TODO", "Name at least one image to search for.")
    opened = EmbeddingTable(Path(table))
    asked = [_resolve(opened, image) for image in images]
    queries_QF = _queries(opened, asked, weights)
    index, engine = _index(opened)
    found_sim, found_rows = index.search(queries_QF.numpy(), min(k + 1, len(opened)))
    queries = [
        _answer(opened, image, sim_k, rows_k, k)
        for image, sim_k, rows_k in zip(asked, found_sim, found_rows, strict=True)
    ]
    return {
        "table": str(table),
        "rows": len(opened),
        "k": k,
        "engine": engine,
        "exact": len(opened) < EXACT_ROWS,
        "queries": queries,
        "seconds": round(time.perf_counter() - start, 2),
    }


def _answer(
    table: EmbeddingTable, image: SearchQuery, sim_k: np.ndarray, rows_k: np.ndarray, k: int
) -> dict[str, Any]:
    """What is told of an image: the k best of what the index found, but itself; ties by row."""
    hits = [
        (float(sim), int(row))
        for sim, row in zip(sim_k.clip(-1, 1), rows_k, strict=True)
        if row not in (-1, image.row)
    ]
    hits = sorted(hits, key=lambda hit: (-hit[0], hit[1]))[:k]
    facts = table.facts_of([row for _, row in hits])
    neighbors = [{**fact, "similarity": sim} for fact, (sim, _) in zip(facts, hits, strict=True)]
    own = None if image.row is None else table.facts_of([image.row])[0]["index"]
    return {"image": image.name, "index": own, "neighbors": neighbors}


def _resolve(table: EmbeddingTable, image: str | Path | int) -> SearchQuery:
    """What an image that was asked for is.

    Raises:
        UserError: neither a file nor in the table.
    """
    name = str(image)
    if not isinstance(image, int):
        if Path(image).is_file():
            return SearchQuery(name, None, Path(image))
        if (row := table.find("path", text(name))) is not None:
            return SearchQuery(name, row, None)
        if Path(image).is_dir():
            raise UserError("TODO", f"'{name}' is a folder; name image files in it.")
    if name.isdecimal() and int(name) < 2**63:
        if (row := table.find("index", int(name))) is not None:
            return SearchQuery(name, row, None)
        raise UserError(
            "TODO",
            f"'{table.path}' has no image {name}: it holds {len(table):,} of the images 0 to"
            f" {table.facts_of([len(table) - 1])[0]['index']:,}.",
        )
    some = [fact["path"] for fact in table.facts_of(range(min(len(table), 1000)))]
    raise UserError(
        "TODO",
        f"There is no image '{name}': neither a file, nor a path or an index of '{table.path}'"
        f" (which has '{some[0]}', for example).{suggest(name, some)}",
    )


def _queries(
    table: EmbeddingTable, asked: Sequence[SearchQuery], weights: str | Path | None
) -> Tensor:
    """Unit rows [Q, F] of the images that are asked about."""
    files = [image.file for image in asked if image.file is not None]
    embedded = iter(_embed_files(table, files, weights) if files else ())
    found = [next(embedded) if image.row is None else table.embedding(image.row) for image in asked]
    return F.normalize(torch.stack(found), dim=1)


class _ImageFiles:
    """Image files, as ``evaluation_batches`` reads a source."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        return Sample(index, self.paths[index].read_bytes(), None)


def _embed_files(
    table: EmbeddingTable, files: Sequence[Path], weights: str | Path | None
) -> Tensor:
    """Embeddings [files, F] by the encoder, layer, view and precision that made the table."""
    for path in files:
        try:
            decode(path.read_bytes())
        except READ_ERRORS as error:
            reason = (isinstance(error, OSError) and error.strerror) or error
            raise UserError(
                "TODO", f"'{path}' cannot be read: {reason}; name another image."
            ) from None
    facts = table.facts
    place = Path(facts["weights"] if weights is None else weights)
    if weights is None and not place.exists():
        raise UserError(
            "TODO",
            f"The weights that made '{table.path}' are no longer at '{place}'; name them with"
            " --run, or ask for images that are in the table.",
        )
    fabric = make_fabric(precision=facts["precision"])
    encoder = load_encoder(place).to(fabric.device).eval()
    if weights_digest(encoder) != facts["weights_digest"]:
        raise UserError(
            "TODO",
            f"'{place}' are not the weights that made '{table.path}' (did the run go on?); name"
            " those with --run, or embed the images again.",
        )
    views = from_dict(ViewConfig, facts["views"])
    source: Any = _ImageFiles(files)
    batches = evaluation_batches(source, views, batch=64)
    found = [encode(encoder, views_BCHW, facts["layer"], fabric) for _, views_BCHW in batches]
    return torch.cat(found)


def _index(table: EmbeddingTable) -> tuple[Any, str]:
    """A faiss index over the unit rows of a table, and what it is in words."""
    import faiss

    size, dim = len(table), table.dim
    index: Any = faiss.IndexFlatIP(dim)
    engine = "every row compared (IndexFlatIP)"
    if size >= EXACT_ROWS:
        lists = math.isqrt(size)
        probed = min(lists, max(_LEAST, lists // _PROBED))
        quantizer = faiss.IndexFlatIP(dim)
        index = faiss.IndexIVFFlat(quantizer, dim, lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = probed
        index.train(_sample(table, _TRAINED * lists))
        engine = f"approximate: {probed:,} of {lists:,} lists looked into (IndexIVFFlat)"
    with show_progress("indexing") as show:
        for rows in table.embeddings():
            index.add(F.normalize(rows, dim=1).numpy())
            show(index.ntotal, size)
    return index, engine


def _sample(table: EmbeddingTable, most: int) -> np.ndarray:
    """Unit rows spread evenly over a table, about ``most`` of them: float32 [n, F]."""
    step = max(1, len(table) // most)
    found, start = [], 0
    with show_progress("reading rows to train the index") as show:
        for rows in table.embeddings():
            found.append(rows[-start % step :: step])
            start += len(rows)
            show(start, len(table))
    return F.normalize(torch.cat(found), dim=1).numpy()
