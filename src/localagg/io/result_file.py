"""Write a result with one row an image as CSV, Parquet or JSON."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from .files import atomic_write, check_writable

SUFFIXES = (".csv", ".parquet", ".json")


def check_result_file(out: str | Path | None, option: str = "--out") -> None:
    """Check before the work that a result can be written.

    Raises:
        UserError: a suffix other than .csv, .parquet and .json, a folder, or a place in a folder
            that is missing or not writable.
    """
    if out is None:
        return
    path = Path(out)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError("option-invalid", f"{option} {out} must end in {', '.join(SUFFIXES)}.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError("not-found", f"{option} {out} is not a file in an existing folder.")
    check_writable(path)


def write_result(out: str | Path, columns: Mapping[str, Any]) -> None:
    """Write columns of equal length atomically, in the format of the suffix.

    Args:
        out: file that ends in .csv, .parquet or .json (a list of objects).
        columns: {name: list, numpy array or Arrow array}.

    Raises:
        UserError: as :func:`check_result_file`.
        OSError: disk full or no permission.
    """
    import json

    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    check_result_file(out)
    path, table = Path(out), pa.table(dict(columns))
    with atomic_write(path) as temporary:
        if path.suffix.lower() == ".parquet":
            pyarrow.parquet.write_table(table, temporary)
        elif path.suffix.lower() == ".csv":
            pyarrow.csv.write_csv(table, str(temporary))
        else:
            temporary.write_text(json.dumps(table.to_pylist(), indent=1) + "\n")
