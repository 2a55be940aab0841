"""Write the table of embeddings, resuming after a kill.

While it is written, ``.FILE.parts`` holds ``job.json``, facts about the table, and ``batches.bin``
with a record of each finished batch: batch number, number of images n, checksum, n indices (int64)
and n embeddings. The same job resumes after the last record in front of any damage. Records of
another job (other weights, images, layer, ...) are deleted with a notice: they are of no use, and
an error would only ask the user to delete them.
"""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoint import write_json
from ...errors import Interrupted, UserError
from ...io.console import notify
from ...io.crc32c import crc32c
from ...io.files import atomic_write, hidden_beside
from ...io.run_lock import lock_run
from ..table import table_schema
from .table_formats import TABLE_FORMATS, images_file, publish_images_file

NameColumns = Callable[[list[int]], dict[str, list[Any]]]
"""Returns the columns path, split, content and, with labels, label of indices."""
MergeRows = Callable[[Iterator[Any]], tuple[Any, int, Iterator[Any]]]
_HEAD_BYTES = 24  # batch number, number of images and checksum, as int64
GROUP_ROWS, GROUP_BYTES = 16_384, 64 * 2**20  # of a row group, which is held in memory at once


@contextlib.contextmanager
def open_writer(out: Path, facts: dict[str, Any]) -> Iterator["TableWriter"]:
    """Lock a table that is to be written, and resume if the same job was interrupted.

    Args:
        out: the file to write; it appears when complete.
        facts: JSON values about the table; see :func:`~localagg.embeddings.table.table_schema`.

    Raises:
        UserError: another process writes the same file.
        Interrupted: Ctrl-C; finished batches are kept.
    """
    folder = hidden_beside(out, ".parts")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        error.filename = str(out)
        raise
    with lock_run(folder):
        writer = TableWriter(out, folder, facts)
        try:
            yield writer
        except KeyboardInterrupt:
            done, total = writer.images_done, facts["images"]
            raise Interrupted(
                f"Stopped after {done:,} of {total:,} images; the same command resumes."
            ) from None
        finally:
            if not writer.batches_done:
                shutil.rmtree(folder, ignore_errors=True)


class TableWriter:
    """A table that is being written; made by :func:`open_writer`.

    ``batches_done`` and ``images_done`` count the finished batches and their images, unreadable
    ones included.
    """

    def __init__(self, out: Path, folder: Path, facts: dict[str, Any]) -> None:
        self.out, self.facts = out, json.loads(json.dumps(facts))  # as they are read back
        self.batches_done = self.rows = 0
        self._records, job, size = folder / "batches.bin", folder / "job.json", 0
        if not self._is_same_job(job):
            if self._records.exists():
                notify(f"The unfinished '{out}' has other weights, data or options; starting anew.")
            self._records.unlink(missing_ok=True)
            write_json(job, self.facts)
        self._records.touch()
        for batch, index, values in self._read():
            self.batches_done, self.rows = batch + 1, self.rows + len(index)
            size += _HEAD_BYTES + index.nbytes + values.nbytes
        os.truncate(self._records, size)
        if size:
            notify(f"Resuming '{out}' after {self.images_done:,} of {facts['images']:,} images.")

    @property
    def images_done(self) -> int:
        return min(self.batches_done * self.facts["batch"], self.facts["images"])

    def write(self, batch: int, index: np.ndarray, values: np.ndarray) -> None:
        """Write a batch. Batches come in order; those without a readable image are skipped.

        Args:
            batch: its number.
            index: int64 [n].
            values: [n, F] of the table's dtype.

        Raises:
            UserError: full disk or no permission.
        """
        numbers, data = np.array([batch, len(index)]), index.tobytes() + values.tobytes()
        head = np.append(numbers, crc32c(numbers.tobytes() + data))
        with self._convert_write_errors(), open(self._records, "ab") as file:
            file.write(head.tobytes() + data)
        self.batches_done, self.rows = batch + 1, self.rows + len(index)

    def finish(self, columns: NameColumns, merge: MergeRows | None = None) -> int:
        """Write the table; return its number of rows.

        Args:
            columns: returns further columns of indices, or other indices.
            merge: returns schema, number and groups of the rows of a table that grows by others.

        Raises:
            UserError: no rows, damaged records, full disk or no permission.
        """
        schema, rows, suffix = table_schema(self.facts), self.rows, self.out.suffix.lower()
        groups = self._groups(schema, columns)
        if merge is not None:
            schema, rows, groups = merge(groups)
        if not rows:
            raise UserError(
                "unreadable-images",
                f"None of the {self.facts['images']:,} images of '{self.facts['data']}' can be"
                " read; check them by localagg inspect.",
            )
        with (
            self._convert_write_errors(),
            publish_images_file(self.out),
            atomic_write(self.out) as temporary,
        ):
            TABLE_FORMATS[suffix](temporary, schema, rows, groups)
            if suffix == ".npy":
                images_file(self.out).unlink(missing_ok=True)  # or a kill could leave the old one
        shutil.rmtree(self._records.parent, ignore_errors=True)
        return rows

    def _groups(self, schema: Any, columns: NameColumns) -> Iterator[Any]:
        """Yield the rows as Arrow tables; raise UserError if some are damaged."""
        import pyarrow as pa

        records, written = self._read(), 0
        row_bytes = self.facts["dim"] * np.dtype(self.facts["dtype"]).itemsize
        batches = min(GROUP_ROWS, GROUP_BYTES // row_bytes) // self.facts["batch"]
        ends = np.cumsum([*self.facts["columns"].values()])[:-1]
        while group := list(itertools.islice(records, max(1, batches))):
            index = np.concatenate([index for _, index, _ in group])
            parts = np.split(np.concatenate([values for _, _, values in group]), ends, axis=1)
            vectors = {
                name: pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), dim)
                for (name, dim), values in zip(self.facts["columns"].items(), parts, strict=True)
            }
            yield pa.table({"index": index, **columns(index.tolist()), **vectors}, schema)
            written += len(index)
        if written != self.rows:
            raise UserError(
                "damaged",
                f"'{self._records}' was damaged on the disk; the same command computes the"
                " damaged batches again.",
            )

    def _is_same_job(self, job: Path) -> bool:
        try:
            before = json.loads(job.read_text())
            return {**before, "weights": None} == {**self.facts, "weights": None}  # they may move
        except (OSError, ValueError, TypeError):
            return False

    def _read(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (batch number, index [n], values [n, F]) of the records in front of any damage."""
        dim, dtype = self.facts["dim"], np.dtype(self.facts["dtype"])
        with open(self._records, "rb") as file:
            while len(head := file.read(_HEAD_BYTES)) == _HEAD_BYTES:
                batch, count, checksum = np.frombuffer(head, np.int64).tolist()
                if not 0 < count <= self.facts["batch"]:
                    return
                data = file.read(count * (8 + dim * dtype.itemsize))
                if crc32c(head[:16] + data) != checksum:
                    return
                index = np.frombuffer(data, np.int64, count)
                yield batch, index, np.frombuffer(data, dtype, offset=8 * count).reshape(count, dim)

    @contextlib.contextmanager
    def _convert_write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                "environment",
                f"'{self.out}' cannot be written ({error.strerror or error}); free disk space or"
                " fix its folder's permissions, then the same command resumes.",
            ) from None
