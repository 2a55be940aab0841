"""Compare the results of several runs with each other and with published numbers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import UserError
from .protocols import describe_protocol
from .published import PUBLISHED, PublishedNumber
from .results_file import read_results

_MAX_COLUMNS = 6  # a wider table is transposed
# Fields that two numbers must share, beside their images, to stand in one column.
_COUNTS = ("images", "asked", "training_images", "known")
_SHARED = ("measure", "protocol", "dataset", "training_fingerprint", *_COUNTS)
_COLUMN_FIELDS = (*_SHARED, "data", "fingerprint")


class _RowKey(NamedTuple):
    """A run, one of its weights, or a published number."""

    run: str
    weights: str | None
    source: str | None


def compare(runs: Sequence[Path]) -> dict[str, Any]:
    """Compare runs, and published numbers of the same protocols and data.

    A column is one number under one protocol on the same images (by fingerprint and count). A row
    is a run, or one of several weights of a run. The last of repeated measurements counts.

    Returns:
        {"columns": [{"name", and fields of an entry}], "rows": [{"run", "weights": or None,
        "published": bool, "source": or None, "values": [number or None, one a column], "intervals":
        [half width of the 95 % interval or None]}], "notes": [str]}.

    Raises:
        UserError: none of the runs has results, or one cannot be read.
    """
    columns: dict[tuple, dict[str, Any]] = {}
    cells: dict[_RowKey, dict[tuple, tuple[float, float | None]]] = {}
    notes = []
    for run in runs:
        entries = read_results(run)
        if not entries:
            notes.append(f"{run} has no results yet; measure it with localagg knn {run}.")
        several = len({_weights_name(entry) for entry in entries if "row" not in entry}) > 1
        for entry in entries:
            weights = entry.get("row") or (_weights_name(entry) if several else None)
            key = _RowKey(str(run), weights, None)
            row = cells.setdefault(key, {})
            for name, value in entry["values"].items():
                column = (*_comparison_key(entry), name)
                shown = {field: entry.get(field) for field in _COLUMN_FIELDS}
                columns.setdefault(column, {**shown, "name": name})
                row[column] = value, (entry.get("intervals") or {}).get(name)
    if not columns:
        raise UserError(
            "not-found",
            f"No results of {', '.join(map(str, runs))} yet; measure a run with localagg knn RUN.",
        )
    measured = [*cells]
    for number in PUBLISHED:
        same_number = [key for key, column in columns.items() if _is_same_number(number, column)]
        same = [key for key in same_number if columns[key]["protocol"] == number.protocol]
        if same:
            row = cells.setdefault(_RowKey(number.name, None, number.source), {})
            row.update(dict.fromkeys(same, (number.number, None)))
        elif same_number:
            notes.append(
                f"Published under another protocol, not comparable: {number.name} {number.value}"
                f" {number.number:.1%} on {number.dataset} ({number.source}:"
                f" {describe_protocol(number.protocol)})."
            )
    rows = []
    for row, found in cells.items():
        values, intervals = zip(*(found.get(key, (None, None)) for key in columns), strict=True)
        rows.append(
            {**row._asdict(), "published": row not in measured}
            | {"values": [*values], "intervals": [*intervals]}
        )
    return {"columns": [*columns.values()], "rows": rows, "notes": notes}


def tables(comparison: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return the result of :func:`compare` to print: a table for each protocol and data.

    Returns:
        (title, columns, rows) of each; numbers up to 1 in percent. A table of more numbers than
        runs, and than fit a line, is transposed.
    """
    groups: dict[tuple, list[int]] = {}
    for number, column in enumerate(comparison["columns"]):
        groups.setdefault((*_comparison_key(column), column["data"]), []).append(number)
    found = []
    for numbers in groups.values():
        rows = []
        for row in comparison["rows"]:
            shown = [(row["values"][n], row["intervals"][n]) for n in numbers]
            if any(value is not None for value, _ in shown):
                rows.append([_row_name(row), *(_format_number(*cell) for cell in shown)])
        columns = ["", *(comparison["columns"][n]["name"] for n in numbers)]
        if len(numbers) > max(_MAX_COLUMNS, len(rows)):
            columns, *rows = (list(line) for line in zip(columns, *rows, strict=True))
        found.append((_title(comparison["columns"][numbers[0]]), columns, rows))
    return found


def _comparison_key(entry: dict[str, Any]) -> tuple:
    """Return the fields that two numbers must share to be compared, hashable."""
    images = entry.get("fingerprint") or entry["data"]
    return images, *(json.dumps(entry.get(name), sort_keys=True) for name in _SHARED)


def _weights_name(entry: dict[str, Any]) -> str | None:
    if (step := entry.get("step")) is not None:
        return f"step {step:,}"
    digest = entry.get("weights_digest")
    return None if digest is None else f"weights {digest[:8]}"


def _is_same_number(number: PublishedNumber, column: dict[str, Any]) -> bool:
    same = (number.measure, number.dataset, number.value)
    return same == (column["measure"], column["dataset"], column["name"])


def _title(column: dict[str, Any]) -> str:
    named = f" ({column['dataset']})" if column["dataset"] else ""
    counts = f"{column['measure']} on {column['data']}{named}{_format_counts(column)}"
    return f"{counts}: {describe_protocol(column['protocol'])}"


def _format_counts(column: dict[str, Any]) -> str:
    """Return the numbers of images measured and of training images used."""
    images, asked, training = (column[name] for name in ("images", "asked", "training_images"))
    words = ""
    if images is not None:
        some = "" if asked in (None, images) else f"{asked:,} of "
        words = f", {some}{images:,} images"
    if training is not None and column["training_fingerprint"] != column["fingerprint"]:
        some = "" if column["known"] in (None, training) else f"{column['known']:,} of "
        words += f", {some}{training:,} training images"
    return words


def _row_name(row: dict[str, Any]) -> str:
    if row["published"]:
        return f"{row['run']} (published: {row['source']})"
    return row["run"] if row["weights"] is None else f"{row['run']}, {row['weights']}"


def _format_number(value: float | None, interval: float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) > 1:
        return f"{value:,.4g}"
    return f"{value:.1%}" + ("" if interval is None else f" ± {100 * interval:.1f}")
