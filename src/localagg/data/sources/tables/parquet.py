"""Parquet files of images, read through the cache of ``datasets``."""

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from ....errors import UserError
from ..file_kinds import HEAD, describe, kind_of
from ..image_files import files_with_suffix, open_file
from ..splits import Splits, files_by_split, split_folders
from .arrow_tables import TableImages, first_bytes, from_datasets, reason_of
from .table_columns import NoImageColumn, choose_image_column


def find_parquet(uri: str, root: Path, column: str | None = None) -> Splits | None:
    """Return the splits of a Parquet file, or of those in a folder or its split folders.

    Tables without images do not count: embeddings, statistics or captions.

    Raises:
        UserError: no file is a table of images, but one was named, is damaged, or lacks ``column``.
    """
    if root.is_file():
        if root.suffix.lower() != ".parquet":
            return None
        _check_parquet(uri, root, column)
        return Splits(["train"], lambda _: _open_parquet(uri, [root], column))
    tables = files_by_split(files_with_suffix(root, ".parquet"))
    for name, folder in split_folders(root).items():
        if files := files_with_suffix(folder, ".parquet"):
            tables.setdefault(name, []).extend(files)
    held = {name: _holding_images(files, column) for name, files in tables.items()}
    held = {name: files for name, files in held.items() if files}
    if not held:
        for paths in tables.values():
            _check_parquet(str(paths[0]), paths[0], column)  # says why
        return None
    used = {path.relative_to(root).as_posix() for files in held.values() for path in files}
    return Splits(
        [*held], lambda split: _open_parquet(uri, held[split], column), root, used.__contains__
    )


def _holding_images(paths: list[Path], column: str | None) -> list[Path]:
    """Return the files with a column of images, and damaged files beside them, in order."""
    held, damaged, known = [], [], {}
    for path in paths:
        try:
            schema = str(_read_schema(path))
            if schema not in known:
                known[schema] = _has_images(path, column)
            held += [path] if known[schema] else []
        except UserError:
            damaged.append(path)
    return sorted(held + damaged) if held else []


def _has_images(path: Path, column: str | None) -> bool:
    try:
        _check_parquet(str(path), path, column)
    except NoImageColumn:
        return False
    return True


def _read_schema(path: Path) -> pa.Schema:
    try:
        return parquet.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from None


def _damaged(name: str | Path, error: Exception) -> UserError:
    reason = reason_of(error)
    with contextlib.suppress(OSError), open_file(name) as file:
        if kind_of(head := file.read(HEAD)) not in ("", "a Parquet file"):
            reason = describe(head)
    return UserError("damaged", f"'{name}' cannot be read as Parquet: {reason}.")


def _check_parquet(uri: str, path: Path, column: str | None) -> None:
    """Check by the schema and the first record that a file has a column of images.

    Raises:
        UserError: it has none, or cannot be read.
    """
    try:
        file = parquet.ParquetFile(path)
        metadata = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
        features = json.loads(metadata).get("info", {}).get("features", {})

        def first(name: str) -> bytes:
            batch = next(file.iter_batches(batch_size=1, columns=[name]), None)
            return b"" if batch is None else first_bytes(pa.Table.from_batches([batch]), name)

        choose_image_column(uri, file.schema_arrow, features, first, column)
    except (OSError, ValueError, AttributeError, pa.ArrowException) as error:
        raise _damaged(path, error) from None


def _open_parquet(uri: str, paths: list[Path], column: str | None) -> TableImages:
    """Open the files of one split through the cache of ``datasets``; verify page checksums."""
    import datasets
    from pyarrow import dataset

    files: Any = []
    for path in paths:  # reading each file's metadata first names the file that is damaged
        try:
            if parquet.read_metadata(path).num_rows:
                files.append(str(path))
        except (OSError, pa.ArrowException) as error:
            raise _damaged(path, error) from None
    if not files:
        raise UserError("no-images", f"'{uri}' has no records ({paths[0].name} is empty).")
    datasets.disable_progress_bars()
    # datasets logs each error that it raises.
    logging.getLogger("datasets.packaged_modules.parquet").setLevel(logging.CRITICAL)
    verified = dataset.ParquetFragmentScanOptions(page_checksum_verification=True)
    try:
        table = datasets.Dataset.from_parquet(files, fragment_scan_options=verified)
        return from_datasets(uri, table, column)
    except UserError:
        raise
    except Exception as error:  # the readers raise many types for damaged types or features
        raise _damaged(uri, error) from None
