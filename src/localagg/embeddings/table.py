"""The Parquet file of embeddings: how it is written through kills, and how it is read.

Columns: ``path`` (string, the image's name in its source), ``index`` (int64, increasing), ``label``
(string, the class name; only where there are labels, null where one is missing), ``embedding``
(fixed-size list of float32 or float16). The schema's metadata hold, under ``localagg``, the JSON of
what made the table. While it is written::

    .FILE.parts/job.json            what is being written
    .FILE.parts/000000000.parquet   the rows of a batch; renamed to this name when whole
    .FILE.parts/whole.parquet       all of them, renamed to FILE at the end

Where the same job finds its parts, it goes on after the last of them. Parts of another job (other
weights, images, layer, ...) are thrown away with a word about it: they are no result that somebody
could want, and a refusal would only ask the user to remove them by hand.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ..checkpoint import write_json
from ..errors import Interrupted, UserError
from ..io.console import notify
from ..io.files import sync_to_disk

if TYPE_CHECKING:
    import pyarrow as pa

DTYPES = ("float32", "float16")
_KEY = "localagg"
_COLUMNS = ("path", "index", "embedding")
_NEEDED = {"weights", "weights_digest", "views", "precision", "layer"}  # to embed a query
_GROUP_ROWS, _GROUP_BYTES = 16_384, 64 * 2**20  # of a row group: what is read or held at once
_PLACES = ("weights",)  # facts that say where something lay, not what it was


def table_schema(facts: dict[str, Any], *, labels: bool) -> "pa.Schema":
    """The columns, with ``facts`` as metadata; its "dim" and "dtype" give the embedding's type."""
    import pyarrow as pa

    value = {"float32": pa.float32(), "float16": pa.float16()}[facts["dtype"]]
    columns: dict[str, Any] = {"path": pa.string(), "index": pa.int64()}
    if labels:
        columns["label"] = pa.string()
    columns["embedding"] = pa.list_(value, facts["dim"])
    return pa.schema(columns, metadata={_KEY: json.dumps(facts)})


class TableWriter:
    """A table while it is written, batch by batch. Used as a context, which locks it.

    Args:
        out: the file to write; it appears when it is whole.
        facts: JSON values of what is being written.
        labels: whether it has that column.
        batches: how many there will be.

    ``done`` says how many batches are there already, from the first on.
    """

    def __init__(self, out: Path, facts: dict[str, Any], *, labels: bool, batches: int) -> None:
        self.out, self.batches = out, batches
        self.facts = json.loads(json.dumps(facts))  # as they will be read back
        self.schema = table_schema(facts, labels=labels)
        self.folder = out.with_name(f".{out.name}.parts")
        self.done = 0
        self._lock = FileLock(self.folder / "lock")

    def __enter__(self) -> "TableWriter":
        """Take the folder and see what is there.

        Raises:
            UserError: another process is writing the same file.
        """
        self.folder.mkdir(exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                "TODO",
                f"Another process is writing '{self.out}'; wait for it, or name another --out.",
            ) from None
        if changed := self._changed():
            if any(self.folder.glob("*.parquet")):
                notify(f"What was begun of '{self.out}' had another {changed}; starting anew.")
            for path in self.folder.iterdir():
                if path.name != "lock":
                    path.unlink()
            write_json(self.folder / "job.json", self.facts)
        while self.done < self.batches and _is_whole(self._part(self.done)):
            self.done += 1
        if self.done:
            notify(f"Going on with '{self.out}' after {self.done:,} of {self.batches:,} batches.")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._lock.release()
        if not self.done:  # nothing to go on with
            shutil.rmtree(self.folder, ignore_errors=True)
        if kind is KeyboardInterrupt:
            raise Interrupted(
                f"Stopped after {self.done:,} of {self.batches:,} batches; the same command goes"
                " on."
            ) from None

    def write(self, number: int, rows: "pa.Table") -> None:
        """The rows of a batch. Batches come in order; those between had no readable image.

        Raises:
            UserError: the disk is full, or otherwise refuses.
        """
        while self.done < number:
            self._put(self.schema.empty_table())
        self._put(rows)

    def finish(self) -> int:
        """Bring the batches together, and the table to its name; the parts are removed.

        Returns:
            The number of rows.

        Raises:
            UserError: there is no row; a part was damaged since; the disk refuses.
        """
        import pyarrow.parquet as pq

        while self.done < self.batches:
            self._put(self.schema.empty_table())
        whole = self.folder / "whole.parquet"
        rows = 0
        with _written(self.folder), pq.ParquetWriter(whole, self.schema, **_OPTIONS) as writer:
            for group in self._groups():
                writer.write_table(group)
                rows += len(group)
        if not rows:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise UserError(
                "TODO",
                f"None of the {self.facts['images']:,} images of '{self.facts['data']}' can be"
                " read; none is left to embed.",
            )
        sync_to_disk(whole)
        os.replace(whole, self.out)
        sync_to_disk(self.out.absolute().parent)
        shutil.rmtree(self.folder, ignore_errors=True)
        return rows

    def _changed(self) -> str | None:
        """The first fact that the job on disk has otherwise, or None where it is the same job."""
        try:
            before = json.loads((self.folder / "job.json").read_text())
        except _faults():
            return "job"
        names = [name for name in {**self.facts, **before} if name not in _PLACES]
        return next((n for n in names if before.get(n) != self.facts.get(n)), None)

    def _part(self, number: int) -> Path:
        return self.folder / f"{number:09d}.parquet"

    def _put(self, rows: "pa.Table") -> None:
        import pyarrow.parquet as pq

        beside = self.folder / "part.tmp"
        with _written(self.folder):
            pq.write_table(rows, beside, **_OPTIONS)
        os.replace(beside, self._part(self.done))
        self.done += 1

    def _groups(self) -> Iterator["pa.Table"]:
        """Row groups of the table: as many batches as stay within the limits, at least one."""
        import pyarrow as pa

        held: list[Any] = []
        rows = size = 0
        for number in range(self.batches):
            held.append(self._read(self._part(number)))
            rows, size = rows + len(held[-1]), size + held[-1].nbytes
            full = rows >= _GROUP_ROWS or size >= _GROUP_BYTES or number == self.batches - 1
            if rows and full:
                yield pa.concat_tables(held).replace_schema_metadata(self.schema.metadata)
                held, rows, size = [], 0, 0

    def _read(self, part: Path) -> "pa.Table":
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(part, page_checksum_verification=True) as file:
                return file.read()
        except _faults() as error:
            part.unlink(missing_ok=True)  # so that it is computed again
            raise UserError(
                "TODO",
                f"A part of '{self.out}' was damaged on the disk ({_first_line(error)}); the same"
                " command computes it again.",
            ) from None


# Plain pages that every reader knows (a dictionary of floats is not worth trying), with checksums.
_OPTIONS: dict[str, Any] = {
    "compression": "snappy",
    "use_dictionary": ["label"],
    "write_page_checksum": True,
}


def _faults() -> tuple[type[Exception], ...]:
    """What pyarrow raises about a damaged file."""
    import pyarrow as pa

    return (OSError, ValueError, pa.ArrowException)


def text(name: str) -> str:
    """An image's name as the column ``path`` has it: bytes that are no UTF-8 show as ``\\xff``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Turns a disk that refuses into a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            "TODO",
            f"'{folder}' cannot be written ({_first_line(error)}); make room, and the same command"
            " goes on.",
        ) from None


def _is_whole(part: Path) -> bool:
    """Whether a part is there with its end; its pages are verified when it is read."""
    import pyarrow.parquet as pq

    try:
        pq.read_metadata(part)
    except _faults():
        return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# --- Reading --------------------------------------------------------------------------------------


class EmbeddingTable:
    """A finished table, read by row groups.

    Args:
        path: the file.

    Raises:
        UserError: no such file, not Parquet, or not written by ``localagg embed``.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        if not path.is_file():
            raise UserError("TODO", f"There is no file '{path}'; write one with localagg embed.")
        self.path = path
        try:
            self.file = pq.ParquetFile(path, page_checksum_verification=True)
            schema = self.file.schema_arrow
            self.facts: dict[str, Any] = json.loads((schema.metadata or {})[_KEY.encode()])
            self.dim = int(self.facts["dim"])
            if missing := ({*_COLUMNS} - {*schema.names}) | (_NEEDED - {*self.facts}):
                raise KeyError(missing)
        except (KeyError, TypeError):
            raise UserError(
                "TODO",
                f"'{path}' was not written by localagg embed (or was rewritten since): it does not"
                " say which weights made it; embed the images again.",
            ) from None
        except _faults() as error:
            raise UserError(
                "TODO",
                f"'{path}' cannot be read as a table: {_first_line(error)}; embed the images again.",
            ) from None
        self.columns = [name for name in ("path", "index", "label") if name in schema.names]
        sizes = [self.file.metadata.row_group(g).num_rows for g in range(self.file.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def embeddings(self) -> Iterator[Tensor]:
        """float32 [n, F] of one row group after the other.

        Raises:
            UserError: damaged, or values that are not finite.
        """
        for group in range(self.file.num_row_groups):
            yield self._embeddings(group)

    def embedding(self, row: int) -> Tensor:
        """float32 [F] of a row."""
        group = self._group(row)
        return self._embeddings(group)[row - int(self._starts[group])]

    def facts_of(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """{"path", "index", "label"} of rows by their positions, in the order asked for."""
        held: dict[int, Any] = {}
        found = []
        for row in rows:
            group = self._group(row)
            if group not in held:
                held[group] = self._read(group, self.columns)
            found.append(held[group].slice(row - int(self._starts[group]), 1).to_pylist()[0])
        return found

    def find(self, column: str, value: str | int) -> int | None:
        """The position of the first row with a value, or None. Paths are as :func:`text` gives."""
        import pyarrow as pa
        import pyarrow.compute as pc

        kind = self.file.schema_arrow.field(column).type
        for group in range(self.file.num_row_groups):
            values = self._read(group, [column])[column]
            at = pc.index(values, pa.scalar(value, kind)).as_py()
            if at >= 0:
                return int(self._starts[group]) + at
        return None

    def _group(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _read(self, group: int, columns: list[str]) -> Any:
        try:
            return self.file.read_row_group(group, columns=columns)
        except _faults() as error:
            raise UserError(
                "TODO", f"'{self.path}' is damaged: {_first_line(error)}; embed the images again."
            ) from None

    def _embeddings(self, group: int) -> Tensor:
        chunks = self._read(group, ["embedding"])["embedding"].chunks
        values = np.concatenate(
            [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]
        )
        size = int(self._starts[group + 1] - self._starts[group])
        if values.size != size * self.dim:
            raise UserError(
                "TODO", f"'{self.path}' has rows without an embedding; embed the images again."
            )
        found = torch.from_numpy(values.astype(np.float32).reshape(size, self.dim))
        if not (finite := found.isfinite().all(dim=1)).all():
            row = int(self._starts[group]) + int(finite.logical_not().nonzero()[0])
            raise UserError(
                "TODO", f"Row {row:,} of '{self.path}' is not finite; embed the images again."
            )
        return found
