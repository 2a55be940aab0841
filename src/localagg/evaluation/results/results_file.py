"""Read and append to ``RUN/results.json``: every number measured of a run, in order of measuring.

The file holds ``{"results": [entry, ...]}`` (``FILE/results.json`` of a weights file
``FILE.safetensors``). An entry::

    {"measure": "knn",               kind of number
     "protocol": {...},              fields of :mod:`.protocols`; a sentence in earlier versions
     "values": {"knn1": 0.41},       numbers; accuracies in 0-1
     "intervals": {"knn1": 0.01},    half widths of 95 % intervals, where known
     "data": URI, "fingerprint": of the split measured, "images": its size,
     "training_fingerprint", "training_images": of the training split,
     "asked": images measured, "known": training images used,
     "left_out": {...: images}, "capped": {"200": neighbors that voted instead},
     "row": name beside the run's in tables, as of floors,
     "dataset": a well-known name or absent, "weights_digest" and perhaps "step": of the weights,
     "when": UTC, "version": of this package}

Only measure, protocol, data and values are required. ``localagg demo`` and ``localagg transfer``
write a results.json of another form into folders of their own; such a file is reported and never
overwritten.
"""

import json
import math
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...io.files import check_writable
from ...io.run_lock import lock_run

_FILE = "results.json"
_LOCK_SECONDS = 60
_OPTIONAL = {
    **dict.fromkeys(("fingerprint", "training_fingerprint", "dataset", "weights_digest"), str),
    **dict.fromkeys(("when", "version", "row"), str),
    **dict.fromkeys(("images", "training_images", "asked", "known", "step"), int),
    **dict.fromkeys(("intervals", "left_out", "capped"), dict),
}


def append_result(run: Path, entry: dict[str, Any]) -> None:
    """Append an entry, atomically; processes that append at the same time lose nothing.

    Args:
        run: run folder, or weights file.
        entry: as above; missing "when" and "version" are added.

    Raises:
        UserError: no such run; its results.json is damaged, of another form, or locked by another
            process for a minute. The file is left as it is.
        ValueError: a required field is missing, or a value is not a finite number.
    """
    from ...checkpoint import write_json

    file = _results_path(run)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"when": when, "version": version("localagg"), **entry}
    if fault := _find_fault(entry):
        raise ValueError(f"not a result: {fault}")
    with lock_run(file.parent, f".{_FILE}.lock", timeout=_LOCK_SECONDS):
        write_json(file, {"results": [*read_results(run), entry]})


def check_appendable(run: Path) -> None:
    """Check, before measuring, that :func:`append_result` can add to a run's results.

    A run that does not exist passes: the measurement names it.

    Raises:
        UserError: as :func:`append_result`, or no permission to write.
    """
    if not run.exists():
        return
    read_results(run)
    check_writable(_results_path(run), "measure a copy of the run")


def read_results(run: Path) -> list[dict[str, Any]]:
    """Return all entries of a run, oldest first; none if nothing was measured yet.

    Raises:
        UserError: no such run, or its results.json is damaged or of another form.
    """
    file = _results_path(run)
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError) as error:
        raise _damaged(file, str(error)) from None
    if not isinstance(found, dict) or not isinstance(found.get("results"), list):
        raise UserError(
            "mismatch",
            f"'{file}' is not a list of measurements of a run, but the result of another command"
            " (such as demo or transfer); name the run folder itself.",
        )
    for number, entry in enumerate(found["results"], 1):
        if fault := _find_fault(entry):
            raise _damaged(file, f"entry {number}: {fault}")
    return found["results"]


def _results_path(run: Path) -> Path:
    if not run.exists():
        raise UserError("not-found", f"There is no run folder or weights file '{run}'.")
    return (run.with_suffix("") if run.is_file() else run) / _FILE


def _damaged(file: Path, fault: str) -> UserError:
    return UserError(
        "damaged", f"'{file}' is damaged ({fault}); repair it, or move it away and measure again."
    )


def _find_fault(entry: Any) -> str | None:
    """Return the first fault of an entry, or None."""
    if not isinstance(entry, dict):
        return "not an object"
    for name, kinds in (("measure", str), ("protocol", (str, dict)), ("data", str)):
        if not (isinstance(entry.get(name), kinds) and entry[name]):
            return f"no valid '{name}'"
    for name, kind in _OPTIONAL.items():
        if not isinstance(entry.get(name), (kind, type(None))):
            return f"invalid '{name}'"
    values = entry.get("values")
    if not isinstance(values, dict) or not values:
        return "no 'values'"
    intervals = entry.get("intervals") or {}
    if unknown := set(intervals) - set(values):
        return f"an interval without a value: '{min(unknown)}'"
    for name, value in (*values.items(), *intervals.items()):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            return f"'{name}' is not a finite number"
    return None
