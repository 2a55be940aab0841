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
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from .. import __version__
from ..config import ViewConfig
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

# (training images, held-out images, classes) by which a data set of the literature is recognized.
DATASETS = {
    "CIFAR-10": (50_000, 10_000, 10),
    "ImageNet": (1_281_167, 50_000, 1_000),
}


def dataset_name(training: int, held_out: int, classes: int) -> str | None:
    """The published data set of these counts, or None. A copy with fewer images is none."""
    counts = (training, held_out, classes)
    return next((name for name, known in DATASETS.items() if known == counts), None)


def knn_protocol(
    against: str, views: ViewConfig, *, held_out: bool = True, temperature: float = 0.07
) -> str:
    """The words of a vote of nearest neighbors.

    Args:
        against: who is asked: "the memory bank", "the training images", ...
        views: resolved; how images are shown.
        held_out: whether held-out images ask; else training images ask each other.
        temperature: of the votes' weights (k = 1 does not depend on it).
    """
    asking = "held-out images ask" if held_out else "training images, themselves left out, ask"
    crop = f"central {views.eval_crop:g} at {views.image_size} pixels"
    how = ", cut and resized as in the reference" if views.augmentation == "reference" else ""
    return f"{asking} {against}; votes weigh exp(similarity / {temperature:g}); {crop}{how}"


class Published(NamedTuple):
    """A number of the literature, in the words of our protocols."""

    name: str
    """Method and network."""
    dataset: str
    measure: str
    protocol: str
    value: str
    """Which of an entry's values it stands beside."""
    number: float
    source: str


_BANK = "the memory bank"
_IMAGENET_KNN = knn_protocol(_BANK, ViewConfig(image_size=224, eval_crop=0.875))
_CIFAR_KNN = knn_protocol(_BANK, ViewConfig(image_size=32, eval_crop=1.0))
# Its vote is over the pooled features under the head, and the best epoch by that very vote counts.
_LIGHTLY_KNN = (
    knn_protocol(
        "the training images' backbone features",
        ViewConfig(image_size=32, eval_crop=1.0),
        temperature=0.1,
    )
    + "; best epoch"
)
# What ``transfer.protocol`` says of the recipe trans_res50_LA.
_RES50_LINEAR = (
    "linear heads, frozen; 70 epochs of random views (reference, resized crops); center crop and"
    " ten crops by mean softmax of 0.875 at 224 pixels"
)
_WU = "Wu et al. 2018 (1805.01978)"
_WU_CODE = "Wu et al. 2018, published code (its test takes k = 200)"
_ZHUANG = "Zhuang et al. 2019 (1903.12355)"
_LIGHTLY = "lightly's table, batch 128"

PUBLISHED = (
    Published(
        *("LA, ResNet-50", "ImageNet", "linear", _RES50_LINEAR, "17 ten_crop_top1", 0.602, _ZHUANG)
    ),
    Published("IR, ResNet-18", "ImageNet", "knn", _IMAGENET_KNN, "knn200", 0.410, _WU_CODE),
    Published("IR, ResNet-50", "ImageNet", "knn", _IMAGENET_KNN, "knn200", 0.468, _WU_CODE),
    Published("IR, ResNet-18", "CIFAR-10", "knn", _CIFAR_KNN, "knn200", 0.808, _WU),
    Published("SimCLR, ResNet-18", "CIFAR-10", "knn", _LIGHTLY_KNN, "knn200", 0.847, _LIGHTLY),
    Published("MoCo, ResNet-18", "CIFAR-10", "knn", _LIGHTLY_KNN, "knn200", 0.838, _LIGHTLY),
    Published("BYOL, ResNet-18", "CIFAR-10", "knn", _LIGHTLY_KNN, "knn200", 0.869, _LIGHTLY),
)


# --- The file of a run ----------------------------------------------------------------------------


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


# --- Side by side ---------------------------------------------------------------------------------


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
