"""Find the most similar images in a table of embeddings."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import load_encoder, load_views, weights_digest
from ..config import ViewConfig, check_argument_types, from_dict, to_dict
from ..data.images.decode import READ_ERRORS, decode, read_error_reason
from ..data.images.levels import Levels, levels_of
from ..data.loading.cropping import evaluation_batches
from ..data.sources.image_files import walk_images
from ..data.sources.source import Sample
from ..engine.device import make_fabric
from ..engine.search import sort_by_similarity
from ..errors import UserError, counted, suggest
from ..io.console import notify
from .embed import encode
from .open_table import open_table
from .table import EmbeddingTable, path_text


@check_argument_types
def search(
    table: str | Path | EmbeddingTable,
    images: Sequence[str | Path | int],
    weights: str | Path | None = None,
    k: int = 10,
) -> dict[str, Any]:
    """Find the images of a table that are most similar to others, by cosine of their embeddings.

    The search is exact: every row is compared. Equal similarities are sorted by row.

    Args:
        table: run folder, or file written by ``localagg embed``.
        images: each an image file, a path or an index in the table, or a folder of image files. A
            file takes precedence over a path in the table, and that over a folder. An image in the
            table, named either way, is found by its row, without the weights, and is excluded from
            its own neighbors.
        weights: run folder or weights file of the table. Default: the place recorded in the table.
        k: number of neighbors, capped at the available ones.

    Returns:
        {"table", "rows", "k", "exact": True, "seconds", "unreadable": files in folders that cannot
        be read, "queries": [{"image", "index": in the table or None, "neighbors": [{"path",
        "index", "label" if the table has labels, "similarity": -1 to 1}]}]}, the most similar
        first.

    Raises:
        UserError: no such table or image, a damaged one, or weights that are missing or not the
            table's.
    """
    start = time.perf_counter()
    _check_request(images, k)
    opened = open_table(table)
    images, unreadable = _expand_folders(opened, images, weights)
    positions = [_find_position(opened, image) for image in images]
    files = [Path(str(image)) for image, row in zip(images, positions, strict=True) if row is None]
    if weights is not None and not files:
        raise UserError(
            "option-conflict", f"All of these images are in '{opened.path}'; omit --run."
        )
    embedded = iter(embed_files(opened, files, weights) if files else ())
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
        "table": str(opened.path),
        "rows": len(opened),
        "k": k,
        "exact": True,
        "unreadable": unreadable,
        "queries": queries,
        "seconds": round(time.perf_counter() - start, 2),
    }


def _check_request(images: Sequence[str | Path | int], k: int) -> None:
    if k < 1:
        raise UserError("option-invalid", f"--k is {k}; it must be at least 1.")
    if not images:
        raise UserError("option-missing", "Name at least one image to search for.")


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


def _expand_folders(
    table: EmbeddingTable, images: Sequence[str | Path | int], weights: str | Path | None
) -> tuple[list[str | Path | int], int]:
    """Replace folders by the readable image files in them; return how many are not readable.

    Raises:
        UserError: a folder without a readable image.
    """
    found: list[str | Path | int] = []
    unreadable = 0
    for image in images:
        folder = Path(str(image))
        if isinstance(image, int) or not folder.is_dir() or table.find_path(str(image)) is not None:
            found.append(image)
            continue
        files = [folder / name for name, _ in sorted(walk_images(folder))]
        levels = _levels(table, weights)
        readable = [file for file in files if _read_error(file, levels) is None]
        unreadable += len(files) - len(readable)
        if not readable:
            raise UserError("no-images", f"'{folder}' has no readable image; name another folder.")
        found += readable
    if unreadable:
        notify(f"Skipped {counted(unreadable, 'file')} that cannot be read.")
    return found, unreadable


def _levels(table: EmbeddingTable, weights: str | Path | None) -> Levels:
    """Return how samples of new files become pixels: as the table's, or else as the weights'."""
    if table.facts or weights is None:
        return table.levels
    return levels_of(load_views(Path(weights)) or ViewConfig())


def _read_error(file: Path, levels: Levels) -> str | None:
    try:
        decode(file.read_bytes(), levels=levels)
    except READ_ERRORS as error:
        return read_error_reason(error)
    return None


def _find_file(table: EmbeddingTable, file: Path) -> int | None:
    """Return the row of an image file, or None if the table has none of it."""
    roots = [table.facts.get("root")]
    if "root" not in table.facts and (data := table.facts.get("data")):  # an earlier version's
        roots += [data, os.path.join(data, table.facts.get("split", "train"))]
    if (nearby := table.facts.get("root_from_table")) is not None:
        roots.append(table.path.absolute().parent / nearby)
    for root in filter(None, roots):
        for name in (os.path.abspath(file), os.path.realpath(file)):
            for base in (os.path.abspath(root), os.path.realpath(root)):
                path = os.path.relpath(name, base).replace(os.sep, "/")
                if (row := table.find("path", path_text(path))) is not None:
                    return row
    return None


def _find_position(table: EmbeddingTable, image: str | Path | int) -> int | None:
    """Return an image's position in the table, or None for a file that is not in it.

    Raises:
        UserError: neither a file nor in the table.
    """
    name = str(image)
    if not isinstance(image, int):
        if Path(image).is_file():
            return _find_file(table, Path(image))
        if (row := table.find_path(name)) is not None:
            return row
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


def embed_files(table: EmbeddingTable, files: Sequence[Path], weights: str | Path | None) -> Tensor:
    """Return embeddings [files, F] by the table's encoder, layer, view and precision."""
    levels = _levels(table, weights)
    for path in files:
        if (reason := _read_error(path, levels)) is not None:
            raise UserError(
                "unreadable-images", f"'{path}' cannot be read: {reason}; name another image."
            )
    facts = table.facts
    if not facts and weights is None:
        raise UserError(
            "option-missing",
            f"'{table.path}' was rewritten by another program and no longer names its weights; name"
            " them by --run, or search for images in the table.",
        )
    place = Path(facts["weights"] if weights is None else weights)
    if not facts:  # as localagg embed writes by default
        views = to_dict(load_views(place) or ViewConfig())
        facts = {"precision": "32-true", "layer": None, "views": views}
    if weights is None and not place.exists():
        raise UserError(
            "not-found",
            f"The weights of '{table.path}' are no longer at '{place}'; name them by --run, or"
            " search for images in the table.",
        )
    fabric = make_fabric(precision=facts["precision"])
    encoder = load_encoder(place).to(fabric.device).eval()
    if facts.get("weights_digest", digest := weights_digest(encoder)) != digest or (
        facts["layer"] is None and encoder.spec["dim"] != table.dim
    ):
        raise UserError(
            "mismatch",
            f"'{place}' are not the weights of '{table.path}', or were trained further; name the"
            " right ones by --run, or embed the images again.",
        )
    source: Any = _ImageFiles(files)
    batches = evaluation_batches(source, from_dict(ViewConfig, facts["views"]), batch=64)
    layer, raw = facts["layer"], "shapes" in facts
    found = [encode(encoder, batch.images, layer, fabric, raw_maps=raw) for batch in batches]
    return torch.cat(found)
