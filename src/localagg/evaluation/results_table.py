"""Compare the results of several runs with each other and with published numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from .published import PUBLISHED, Published
from .results_file import read_results


class _Row(NamedTuple):
    """Weights of a run, or a published number."""

    name: str
    weights: str | None
    source: str | None


def compare(runs: Sequence[Path]) -> dict[str, Any]:
    """Runs side by side, and the published numbers of the same protocols and data.

    A column is one number under one protocol on the same images, those measured and those of
    training (by fingerprint and count), so that unlike numbers never share one. A row is a run; one
    that was measured with several weights has a row of each. Of a number measured again the last
    one counts.

    Returns:
        {"columns": [{"measure", "protocol", "data", "dataset", "images", "fingerprint",
        "training_images", "training_fingerprint", "asked", "known", "name"}], "rows": [{"run",
        "weights": or None, "published": bool, "source": or None, "values": [number or None, one a
        column], "intervals": [likewise, half of the 95 % interval]}], "notes": [str]}.

    Raises:
        UserError: none of the runs has results, or one cannot be read.
    """
    kinds: dict[tuple, dict[str, Any]] = {}
    columns: dict[tuple, dict[str, Any]] = {}
    cells: dict[_Row, dict[tuple, tuple[float, float | None]]] = {}
    notes = []
    for run in runs:
        entries = read_results(run)
        if not entries:
            notes.append(f"{run} has no results yet; measure it with localagg knn {run}.")
        for entry in entries:
            row = cells.setdefault(_row(run, entry, entries), {})
            for name, value in entry["values"].items():
                kind, key = _kind(entry), (*_kind(entry), name)
                kinds.setdefault(kind, {field: entry.get(field) for field in _SHOWN})
                columns.setdefault(key, {**kinds[kind], "name": name})
                row[key] = value, (entry.get("intervals") or {}).get(name)
    if not columns:
        raise UserError(
            "TODO",
            f"Nothing was measured of {', '.join(map(str, runs))} yet; begin with localagg knn RUN.",
        )
    measured = [*cells]
    for number in PUBLISHED:
        beside = [key for key, column in columns.items() if _stands_in(number, column)]
        row = _Row(number.name, None, number.source)
        if beside:
            cells.setdefault(row, {}).update(dict.fromkeys(beside, (number.number, None)))
        elif any(_of_same_kind(number, column) for column in columns.values()):
            notes.append(_elsewhere(number))
    rows = [
        {
            "run": row.name,
            "weights": row.weights,
            "published": row not in measured,
            "source": row.source,
            "values": [found.get(key, _NOTHING)[0] for key in columns],
            "intervals": [found.get(key, _NOTHING)[1] for key in columns],
        }
        for row, found in cells.items()
    ]
    return {"columns": [*columns.values()], "rows": rows, "notes": notes}


def tables(comparison: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """What :func:`compare` found, to print: a table for each protocol and data.

    Returns:
        (title, columns, rows) of each; accuracies and other shares of 1 in percent. More numbers
        than runs, and than a line has room for, go down the page, each run in a column.
    """
    groups: dict[tuple, list[int]] = {}
    for number, column in enumerate(comparison["columns"]):
        kind = tuple(value for name, value in column.items() if name != "name")
        groups.setdefault(kind, []).append(number)
    found = []
    for numbers in groups.values():
        column = comparison["columns"][numbers[0]]
        named = f" ({column['dataset']})" if column["dataset"] else ""
        title = (
            f"{column['measure']} on {column['data']}{named}{_counts(column)}: {column['protocol']}"
        )
        rows = []
        for row in comparison["rows"]:
            shown = [(row["values"][n], row["intervals"][n]) for n in numbers]
            if any(value is not None for value, _ in shown):
                rows.append([_row_name(row), *(_shown(*cell) for cell in shown)])
        columns = ["", *(comparison["columns"][n]["name"] for n in numbers)]
        if len(numbers) > max(_ACROSS, len(rows)):
            columns, *rows = (list(line) for line in zip(columns, *rows, strict=True))
        found.append((title, columns, rows))
    return found


def _row(run: Path, entry: dict[str, Any], entries: list[dict[str, Any]]) -> _Row:
    """The row of an entry; it names the weights where the run was measured with several."""
    digests = {_weights(other) for other in entries}
    return _Row(str(run), _weights(entry) if len(digests) > 1 else None, None)


def _weights(entry: dict[str, Any]) -> str | None:
    """What tells weights of a run apart, in words."""
    if (step := entry.get("step")) is not None:
        return f"step {step:,}"
    digest = entry.get("weights_digest")
    return None if digest is None else f"weights {digest[:8]}"


_ACROSS = 6  # numbers that stand beside each other in a line
_NOTHING = (None, None)
# What two numbers must share to be compared, beside their images themselves.
_COUNTS = ("images", "asked", "training_images", "known")
_SHARED = ("measure", "protocol", "dataset", "training_fingerprint", *_COUNTS)
_SHOWN = (*_SHARED, "data", "fingerprint")


def _kind(entry: dict[str, Any]) -> tuple:
    """What two numbers must share to be compared."""
    images = entry.get("fingerprint") or entry["data"]
    return images, *(entry.get(name) for name in _SHARED)


def _counts(column: dict[str, Any]) -> str:
    """How many images were measured, and how many others were learned from."""
    images, asked, training = (column[name] for name in ("images", "asked", "training_images"))
    words = ""
    if images is not None:
        some = "" if asked in (None, images) else f"{asked:,} of "
        words = f", {some}{images:,} images"
    if training is not None and column["training_fingerprint"] != column["fingerprint"]:
        some = "" if column["known"] in (None, training) else f"{column['known']:,} of "
        words += f", {some}{training:,} training images"
    return words


def _of_same_kind(number: Published, column: dict[str, Any]) -> bool:
    same = (number.measure, number.dataset, number.value)
    return same == (column["measure"], column["dataset"], column["name"])


def _stands_in(number: Published, column: dict[str, Any]) -> bool:
    return _of_same_kind(number, column) and number.protocol == column["protocol"]


def _elsewhere(number: Published) -> str:
    return (
        f"Published under another protocol, not to be compared: {number.name} {number.value}"
        f" {number.number:.1%} on {number.dataset} ({number.source}: {number.protocol})."
    )


def _row_name(row: dict[str, Any]) -> str:
    if row["published"]:
        return f"{row['run']} (published: {row['source']})"
    return row["run"] if row["weights"] is None else f"{row['run']}, {row['weights']}"


def _shown(value: float | None, interval: float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) > 1:
        return f"{value:,.4g}"
    return f"{value:.1%}" + ("" if interval is None else f" ± {100 * interval:.1f}")
