"""Find the images that a table already holds, by place and content."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...data.inspect.image_contents import match_contents
from ...errors import UserError
from ...io.console import notify
from ..all_splits import JoinedSplits
from ..table import EmbeddingTable, path_text

if TYPE_CHECKING:
    pass

_SAME = ("weights_digest", "views", "layer", "columns", "dtype", "precision")


class Matches(NamedTuple):
    """Images of a source that a table holds, and rows of the table that the source lacks."""

    table: EmbeddingTable
    found: np.ndarray
    """int64 [N]: the row with the content of each image, -1 without one."""
    elsewhere: np.ndarray
    """int64 [M]: rows of other images, whose files are in place."""
    gone: int
    """Number of rows whose images are gone or have changed."""

    @property
    def missing(self) -> Tensor:
        """Images to embed, int64 [n]."""
        return torch.from_numpy(np.flatnonzero(self.found < 0))

    def report(self) -> None:
        """Print how many images are embedded, kept and dropped."""
        known = int((self.found >= 0).sum()) + len(self.elsewhere)
        new = int((self.found < 0).sum())
        notify(
            f"'{self.table.path}': {known:,} rows are kept, {self.gone:,} of images that are gone"
            f" or changed are dropped, {new:,} images are embedded."
        )
        if "x" in (names := self.table.file.schema_arrow.names) or "image" in names:
            notify("The columns for viewers are dropped; --map and --images write them anew.")


def match_table(
    out: Path, source: JoinedSplits, digests: np.ndarray, facts: dict[str, Any]
) -> Matches:
    """Find the images of a source that a table already holds.

    Args:
        out: the table, in Parquet.
        source: the images.
        digests: their contents, S16 [N]; see :func:`.content_digests`.
        facts: those of the table to write, which the values depend on.

    Raises:
        UserError: not such a table, or one of other weights, layers, views or number format.
    """
    table = EmbeddingTable(out, columns={"path", "index"})
    given = json.loads(json.dumps(facts))  # as the table's were read back
    if other := [name for name in _SAME if table.facts.get(name) != given[name]]:
        word = other[0].removesuffix("_digest")
        raise UserError(
            "mismatch",
            f"--append: '{out}' was written with other {word} than those given; embed with the"
            " table's, or name a new file by --out.",
        )
    again = (table.facts.get("data_absolute"), table.facts.get("split")) == (
        facts["data_absolute"],
        facts["split"],
    ) and facts["data_absolute"] is not None
    places, ours = _places(table), [_place(source, i) for i in range(len(source))]
    found = _find_rows(table, places, ours, digests)
    known = {*ours}
    elsewhere = [
        row
        for row, place in enumerate(places)
        if place is not None and place not in known and not (again and source.root is None)
    ]
    if elsewhere and (table.facts.get("root") is None) != (source.root is None):
        raise UserError(
            "unsupported",
            f"--append: '{out}' and '{facts['data']}' are images with and without files of their"
            " own; name a new file by --out.",
        )
    gone = len(table) - len({*found[found >= 0].tolist(), *elsewhere})
    return Matches(table, found, np.array(elsewhere, np.int64), gone)


def _places(table: EmbeddingTable) -> list[str | None]:
    """Return each row's absolute file (None if it is gone), or the name of its record."""
    if table.facts.get("root") is None:
        return table.images["path"].to_pylist()
    files = [table.image_file(row) for row in range(len(table))]
    return [file and os.path.abspath(file) for file in files]


def _place(source: JoinedSplits, index: int) -> str:
    file = source.file(index)
    return path_text(source.name(index)) if file is None else os.path.abspath(file)


def _find_rows(
    table: EmbeddingTable, places: list[str | None], ours: list[str], digests: np.ndarray
) -> np.ndarray:
    """Return the row of each image, int64 [N], -1 without one: by place and content, then by
    content among the other rows, then among all."""
    rows = {place: row for row, place in enumerate(places) if place is not None}
    found = np.array([rows.get(place, -1) for place in ours], np.int64)
    if "content" not in table.file.schema_arrow.names:
        notify(f"'{table.path}' is of an earlier version; its images are matched by path alone.")
        return found
    contents = table.file.read(["content"])["content"].to_pylist()
    known = np.array([bytes.fromhex(text or "") for text in contents], "S16")
    found[(known[found] != digests) | (digests == b"")] = -1
    free = known.copy()
    free[found[found >= 0]] = b""
    for candidates in (free, known):
        left = np.flatnonzero(found < 0)
        found[left] = match_contents(digests[left], candidates)
    return found
