"""Compare two embeddings of the same images by their neighborhoods."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import check_argument_types, check_options
from ..errors import UserError
from ..io.console import notify
from ..io.result_file import check_result_file, write_result
from .neighbors import nearest_others
from .open_table import open_table
from .table import EmbeddingTable

_SHOWN = 5  # neighbors of a changed image


@check_argument_types
def compare_tables(
    first: str | Path | EmbeddingTable,
    second: str | Path | EmbeddingTable,
    *,
    k: int = 10,
    top: int = 20,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Compare the neighborhoods of the images that two tables share, matched by split and path.

    Args:
        first: run folder, or table written by ``localagg embed``.
        second: another.
        k: number of neighbors among the shared images, capped at the available ones.
        top: number of most changed images to return.
        out: file to write: path, index (in the first table), label, overlap, change of each image,
            the most changed first.

    Returns:
        {"tables", "images": shared, "only": [images of one table only], "k", "overlap": mean share
        of common neighbors, 0-1, "chance": that of random neighbors, "changed": [{"path", "index",
        "label", "overlap", "change", "before", "after": 5 nearest in either table}]}. The change is
        the mean drop of similarity from the neighbors in a table to those of the other table, in
        both tables; it orders images of equal overlap.

    Raises:
        UserError: an invalid option, tables that cannot be read or share fewer than two images.
    """
    check_result_file(out)
    check_options(k=(k, 1), top=(top, 1))
    tables = (open_table(first), open_table(second))
    places = _match(*tables)
    rows = [table.unit_embeddings()[place] for table, place in zip(tables, places, strict=True)]
    near = [nearest_others(each, k)[0] for each in rows]
    size, k = near[0].shape
    overlap = shared_neighbors(*near) / k
    change = (_drop(rows[0], *near) + _drop(rows[1], *near[::-1])) / 2
    order = (overlap.double() - change.double() / 10 / k).argsort(stable=True)

    def describe(row: int) -> dict[str, Any]:
        before, after = (tables[0].rows(places[0][each[row, :_SHOWN]].tolist()) for each in near)
        measured = {"overlap": overlap[row].item(), "change": change[row].item()}
        image = tables[0].rows([int(places[0][row])])[0]
        return {**image, **measured, "before": before, "after": after}

    if out is not None:
        images = tables[0].images.take(places[0][order].numpy())
        columns = {name: images[name] for name in images.column_names}
        values = {"overlap": overlap[order].numpy(), "change": change[order].numpy()}
        write_result(out, columns | values)
    return {
        "tables": [str(table.path) for table in tables],
        "images": size,
        "only": [len(table) - size for table in tables],
        "k": k,
        "overlap": overlap.mean().item(),
        "chance": k / (size - 1),
        "changed": [describe(row) for row in order[:top].tolist()],
    }


def shared_neighbors(first: Tensor, second: Tensor) -> Tensor:
    """Return how many numbers two lists of each row share, float32 [N].

    Args:
        first: int64 [N, k], distinct in a row.
        second: int64 [N, k].
    """
    both = torch.cat([first, second], dim=1).sort(dim=1).values
    return (both[:, 1:] == both[:, :-1]).sum(dim=1).float()


def _drop(rows: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """The mean similarity to own neighbors minus that to other rows, float32 [N]."""
    parts = [
        torch.einsum("nd,nkd->n", part, rows[mine] - rows[theirs]) / own.shape[1]
        for part, mine, theirs in zip(
            rows.split(1024), own.split(1024), other.split(1024), strict=True
        )
    ]
    return torch.cat(parts)


def _match(first: EmbeddingTable, second: EmbeddingTable) -> tuple[Tensor, Tensor]:
    """Return the positions of shared images in either table, in the order of the first."""
    keys = [_keys(table) for table in (first, second)]
    place = {key: position for position, key in enumerate(keys[1])}
    shared = [(position, place[key]) for position, key in enumerate(keys[0]) if key in place]
    if len(shared) < 2:
        raise UserError(
            "mismatch",
            f"'{first.path}' and '{second.path}' share {len(shared)} images by split and path, for"
            f" example '{keys[0][0][1]}' and '{keys[1][0][1]}'; embed the same by both.",
        )
    left = [len(each) - len(shared) for each in keys]
    if any(left):
        notify(f"Excluded {left[0]:,} and {left[1]:,} images that the other table has not.")
    one, other = torch.tensor(shared).unbind(dim=1)
    return one, other


def _keys(table: EmbeddingTable) -> list[tuple[str, str]]:
    images = table.images
    paths = images["path"].to_pylist()
    splits = images["split"].to_pylist() if "split" in images.column_names else [""] * len(paths)
    return list(zip(splits, paths, strict=True))
