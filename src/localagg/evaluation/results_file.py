"""One table of results: what was measured of a run, by which protocol, on what.

``RUN/results.json`` holds ``{"results": [entry, ...]}`` in the order of measuring (of a weights
file ``FILE.safetensors`` it is ``FILE/results.json``). An entry::

    {"measure": "knn",               what kind of number
     "protocol": "...",              exact words; other words are another protocol
     "values": {"knn1": 0.41},       numbers; shares of 1 where they are accuracies
     "intervals": {"knn1": 0.01},    half of the 95 % intervals, where there are some
     "data": URI, "fingerprint": of the split measured, "images": its size,
     "training_fingerprint", "training_images": of the split learned from, or asked,
     "asked": how many of the images were measured, "known": how many training images were there,
     "left_out": {...: images}, "capped": {"200": neighbors that voted in their place},
     "dataset": a well-known name or absent, "weights_digest" and perhaps "step": of what,
     "when": UTC, "version": of this package}

Of these, measure, protocol, data and values must be there.

``localagg demo`` and ``localagg transfer`` write a results.json of another shape into folders of
their own. Such a file is refused in one sentence, when reading and when appending, and never
overwritten.
"""

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import UserError

_FILE = "results.json"
_WAIT = 60  # seconds for another process to end its line
_NEEDED = ("measure", "protocol", "data")
_OPTIONAL = {
    **dict.fromkeys(("fingerprint", "training_fingerprint", "dataset", "weights_digest"), str),
    **dict.fromkeys(("when", "version"), str),
    **dict.fromkeys(("images", "training_images", "asked", "known", "step"), int),
    **dict.fromkeys(("intervals", "left_out", "capped"), dict),
}


def results_file(run: Path) -> Path:
    """Where the results of a run folder, or of a weights file, stand."""
    return (run.with_suffix("") if run.is_file() else run) / _FILE


def append_result(run: Path, entry: dict[str, Any]) -> None:
    """Add what was measured. Two processes that add at once lose nothing; a kill leaves it whole.

    Args:
        run: run folder, or weights file.
        entry: as above; "when" and "version" are added where they are missing.

    Raises:
        UserError: no such run, or its results.json is damaged, of another shape, or locked by
            another process for a minute; it is left as it is.
        ValueError: an entry without measure, protocol, data or values, or with a value that is no
            finite number.
    """
    from filelock import FileLock, Timeout

    from ..checkpoint import write_json

    if not run.exists():
        raise UserError("TODO", f"There is no run folder or weights file '{run}'.")
    when = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"when": when, "version": __version__, **entry}
    if why := _fault(entry):
        raise ValueError(f"not a result: {why}")
    file = results_file(run)
    file.parent.mkdir(exist_ok=True)
    try:
        with FileLock(file.with_name(f".{_FILE}.lock"), timeout=_WAIT):
            write_json(file, {"results": [*read_results(run), entry]})
    except Timeout:
        raise UserError(
            "TODO",
            f"'{file}' has been locked by another process for {_WAIT} s; measure again when it has"
            " ended.",
        ) from None


def read_results(run: Path) -> list[dict[str, Any]]:
    """All entries of a run, oldest first; none where nothing was measured yet.

    Raises:
        UserError: no such run, or its results.json is damaged or of another shape.
    """
    if not run.exists():
        raise UserError("TODO", f"There is no run folder or weights file '{run}'.")
    file = results_file(run)
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError) as error:
        raise UserError(
            "TODO", f"'{file}' is damaged ({error}); mend it, or move it away and measure again."
        ) from None
    if not isinstance(found, dict) or not isinstance(found.get("results"), list):
        raise UserError(
            "TODO",
            f"'{file}' is no list of measurements of a run, but what another command (such as demo"
            " or transfer) wrote; name the run folder itself.",
        )
    for number, entry in enumerate(found["results"], 1):
        if why := _fault(entry):
            raise UserError(
                "TODO",
                f"'{file}' is damaged (entry {number} has {why}); mend it, or move it away and"
                " measure again.",
            )
    return found["results"]


def _fault(entry: Any) -> str | None:
    """What is wrong with an entry, or None."""
    if not isinstance(entry, dict):
        return "no names"
    for name in _NEEDED:
        if not (isinstance(entry.get(name), str) and entry[name]):
            return f"no '{name}'"
    for name, kind in _OPTIONAL.items():
        if not isinstance(entry.get(name), (kind, type(None))):
            return f"a '{name}' of another kind"
    values = entry.get("values")
    if not isinstance(values, dict) or not values:
        return "no 'values'"
    intervals = entry.get("intervals") or {}
    if unknown := set(intervals) - set(values):
        return f"an interval of '{min(unknown)}', which is no value"
    for name, value in (*values.items(), *intervals.items()):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            return f"a value '{name}' that is no finite number"
    return None
