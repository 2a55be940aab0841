"""Read the Parquet table of embeddings that ``localagg embed`` writes.

Columns: ``path`` (string, the image's file relative to ``root``, or the name of its record),
``split`` (string), ``index`` (int64, increasing: the image's number in its split, or in train, val
and test one after another), ``label`` (string, the class name; only with labels, null if one is
missing), ``content`` (string, a hex digest of both ends of the file; null in earlier versions),
``embedding`` (fixed-size list of float32 or float16). The schema's metadata hold under
``localagg`` a JSON object: weights, views, data and options of the table; ``root``, the absolute
folder of the paths; and ``root_from_table``, the same folder as seen from the table's. Both are
null for images without files of their own.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ViewConfig, from_dict
from ..data.images.levels import STORED, Levels, levels_of
from ..errors import UserError
from ..io.console import show_progress
from ..io.read_errors import read_failure

if TYPE_CHECKING:
    import pyarrow as pa

UNREAD = (".csv", ".npy", ".arrow", ".feather", ".h5", ".hdf5", ".zarr")
"""Suffixes of tables that are written for other programs alone."""
DTYPES = ("float32", "float16")
_KEY = b"localagg"
_COLUMNS = {"path", "index", "embedding"}
_FACTS = {"weights", "weights_digest", "views", "precision", "layer"}  # needed to embed a query


def table_schema(facts: dict[str, Any]) -> "pa.Schema":
    """Return the columns, with ``facts`` as metadata.

    Args:
        facts: JSON values; "columns" {name: values a row} and "dtype" set the columns of vectors,
            "labels" the label column.
    """
    import pyarrow as pa

    value = {"float32": pa.float32(), "float16": pa.float16()}[facts["dtype"]]
    columns: dict[str, Any] = {"path": pa.string(), "split": pa.string(), "index": pa.int64()}
    if facts["labels"] is not None:
        columns["label"] = pa.string()
    if facts.get("contents"):
        columns["content"] = pa.string()
    columns |= {name: pa.list_(value, dim) for name, dim in facts["columns"].items()}
    return pa.schema(columns, metadata={_KEY: json.dumps(facts)})


def path_text(name: str) -> str:
    r"""Return an image's name for the column ``path``; :func:`path_name` inverts it.

    Bytes that are not UTF-8 become ``\xff``. The backslash of a name that holds such a text itself
    becomes ``\x5c``, so that different names have different texts; all others stay as they are.
    """
    encoded = re.sub(rb"\\(?=x(?:5c|[89a-f][0-9a-f]))", rb"\\x5c", os.fsencode(name))
    return encoded.decode("utf-8", "backslashreplace")


def path_name(text: str) -> str:
    """Return the name of the file that :func:`path_text` made a text of."""

    def byte(found: re.Match[bytes]) -> bytes:
        return bytes([int(found[1], 16)])

    return os.fsdecode(re.sub(rb"\\x(5c|[89a-f][0-9a-f])", byte, os.fsencode(text)))


def describe_root(root: Path | None, table: Path) -> dict[str, str | None]:
    """Return the facts ``root`` and ``root_from_table`` of a table."""
    if root is None:
        return {"root": None, "root_from_table": None}
    return {
        "root": os.fspath(root),
        "root_from_table": os.path.relpath(root, table.absolute().parent),
    }


class EmbeddingTable:
    """A finished table.

    Args:
        path: the file.
        columns: those that it must have.

    Raises:
        UserError: no such file, not Parquet, or without these columns.

    A table that pandas merged and wrote has no ``facts``.
    """

    def __init__(self, path: Path, columns: Set[str] = _COLUMNS) -> None:
        import pyarrow.parquet as pq

        if path.exists() and path.suffix.lower() in UNREAD:
            raise UserError(
                "unsupported",
                f"Commands read tables in Parquet, not '{path}'; embed the images again by localagg"
                " embed RUN --data URI --out FILE.parquet.",
            )
        if not path.is_file():
            raise UserError("not-found", f"There is no file '{path}'; write one by localagg embed.")
        self.path = path
        with self._convert_damage():
            self.file = pq.ParquetFile(path, page_checksum_verification=True)
            schema = self.file.schema_arrow
        try:
            self.facts: dict[str, Any] = json.loads((schema.metadata or {}).get(_KEY, b"{}"))
            complete = columns <= {*schema.names}
            complete &= not self.facts or _FACTS.issubset(self.facts)
            self.dim: int = self._find_dim() if "embedding" in columns else self.facts["dim"]
        except (KeyError, TypeError, ValueError, AttributeError, StopIteration):
            complete = False
        if not complete:
            raise UserError(
                "unsupported",
                f"'{path}' was not written by localagg embed, or was rewritten since; embed the"
                " images again.",
            )
        if not len(self):
            raise UserError("unsupported", f"'{path}' has no rows; embed images to a new file.")

    def __len__(self) -> int:
        return self.file.metadata.num_rows

    @property
    def levels(self) -> Levels:
        """How samples and bands of the images became pixels."""
        views = self.facts.get("views")
        return levels_of(from_dict(ViewConfig, views)) if views else STORED

    def _find_dim(self) -> int:
        """Return the values of a row; tables that pandas wrote hold lists of any length."""
        kind = self.file.schema_arrow.field("embedding").type
        if hasattr(kind, "list_size"):
            return kind.list_size
        with self._convert_damage():
            first = next(self.file.iter_batches(1, columns=["embedding"]))["embedding"]
        return len(first[0].as_py())

    @cached_property
    def images(self) -> "pa.Table":
        """The columns path, split, index and, with labels, label. In a table that another program
        merged, the index is the row."""
        import pyarrow as pa

        known = ("path", "split", "index", "label")
        names = [name for name in self.file.schema_arrow.names if name in known]
        with self._convert_damage():
            found = self.file.read(columns=names)
        if not self.facts:
            rows = pa.array(range(len(found)), pa.int64())
            found = found.set_column(found.schema.get_field_index("index"), "index", rows)
        return found

    def find(self, column: str, value: str | int) -> int | None:
        """Return the position of the first row with a value (path: see :func:`path_text`)."""
        import pyarrow as pa
        import pyarrow.compute as pc

        values = self.images[column]
        position = pc.index(values, pa.scalar(value, values.type)).as_py()
        return None if position < 0 else position

    def find_path(self, name: str) -> int | None:
        """Return the position of a row by its text in the table, or else by its image's name."""
        row = self.find("path", path_text(path_name(name)))
        return self.find("path", path_text(name)) if row is None else row

    def rows(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Return {"path", "split", "index", "label"} of rows, in the given order."""
        return self.images.take(np.array(positions, np.int64)).to_pylist()

    def image_file(self, position: int) -> Path | None:
        """Return the file of a row's image, or None if it has none, or none is there any more.

        Looks below the root, and then where the root lay as seen from the table; without a root,
        below the table's folder and the working directory.
        """
        near = self.facts.get("root_from_table")
        folder = self.path.absolute().parent
        roots = [self.facts.get("root"), near and folder / near]
        if not self.facts:
            roots = [folder, Path.cwd()]
        name = self.images["path"][position].as_py()
        # As is: of versions that did not escape backslashes, or of another program.
        files = [Path(root, text) for root in roots if root for text in (path_name(name), name)]
        return next((file for file in files if file.is_file()), None)

    def unit_embeddings(self) -> Tensor:
        """Read all embeddings, normalized to unit length: float32 [N, F].

        Raises:
            UserError: damaged, or values that are not finite.
        """
        start = 0
        try:
            found = torch.empty(len(self), self.dim)
        except RuntimeError as error:  # a damaged number of rows, or more than the memory
            raise read_failure(self.path, error, "embed the images again") from None
        with show_progress("reading embeddings") as show:
            for group in range(self.file.num_row_groups):
                with self._convert_damage():
                    chunks = self.file.read_row_group(group, ["embedding"])["embedding"].chunks
                parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]
                values = torch.from_numpy(np.concatenate(parts).astype(np.float32))
                stop = start + self.file.metadata.row_group(group).num_rows
                if len(values) != (stop - start) * self.dim:
                    raise UserError(
                        "damaged",
                        f"'{self.path}' has rows without an embedding; embed the images again.",
                    )
                values = values.view(-1, self.dim)
                finite = values.isfinite().all(dim=1)
                if not finite.all():
                    row = start + int(finite.logical_not().nonzero()[0])
                    raise UserError(
                        "not-finite",
                        f"Row {row:,} of '{self.path}' is not finite; embed the images again.",
                    )
                found[start:stop] = F.normalize(values, dim=1)
                start = stop
                show(start, len(self))
        return found

    @contextlib.contextmanager
    def _convert_damage(self) -> Iterator[None]:
        """Convert pyarrow's errors about a damaged file to UserError."""
        import pyarrow as pa

        try:
            yield
        except (OSError, ValueError, pa.ArrowException) as error:
            raise read_failure(self.path, error, "embed the images again") from None
