"""Read the lines of a listing: paths, and perhaps labels and splits, in any of its usual forms.

``path label`` lines as Places205 has them; tables of pandas with a header; lines of paths only;
JSON lines as the image folders of ``datasets`` have them.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import UserError
from .image_files import EXTENSIONS
from .labels import MAX_CLASSES
from .splits import parse_split

SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".json", ".lst")
_LINE_LIMIT = 8192  # characters; a longer line is no path
_LABEL = re.compile(r'[ \t,]"?([0-9]{1,7})"?$')
_PROBED = 64  # lines that decide the form
# Names of columns, in order of preference.
_PATHS = (
    *("path", "file_name", "filename", "filepath", "file_path", "image_path", "img_path"),
    *("image_file", "image_name", "image", "img", "file", "name", "image_id", "id"),
)
_LABELS = (
    *("label", "class", "category", "target", "labels", "class_name", "label_name"),
    *("category_name", "class_id", "label_id", "category_id", "fine_label"),
)
_SPLITS = ("split", "set", "subset", "partition")
_MISSING = ("", "nan", "null", "none", "na", "n/a")


class ListedImage(NamedTuple):
    """A line of a listing."""

    line: int
    """From 1."""
    path: str
    label: int | str | None
    split: str = "train"


class Listing(NamedTuple):
    """The lines of a listing."""

    images: list[ListedImage]
    malformed: list[int]
    """Numbers of the lines that are no images."""
    others: tuple["Listing", ...] = ()
    """Further readings of lines without a header; the one whose files exist counts."""


def read_listing(table: Path, limit: int | None = None) -> Listing:
    """Read a listing, or the first ``limit`` lines of it.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with open(table, encoding=_encoding(table), errors="surrogateescape", newline="") as file:
            is_list = file.read(_LINE_LIMIT).lstrip().startswith("[")
            file.seek(0)
            values = _json_list(file.read()) if is_list else None
            file.seek(0)
            lines = [*itertools.islice(_short_lines(file), limit)]
    except (OSError, UnicodeError) as error:
        raise UserError("environment", f"'{table}' cannot be read: {error}.") from None
    first = next((line.strip() for line in lines if line.strip()), "")
    if values is not None:
        return _collect(_json_rows(enumerate(values, 1)))
    if first.startswith("{") or table.suffix.lower() in (".jsonl", ".ndjson"):
        return _collect(_json_rows(_json_lines(lines)))
    for delimiter in ("\t", ";", ",", "|", " "):
        names = [_column(cell) for cell in next(csv.reader([first], delimiter=delimiter), [])]
        known = {*names} & {*_LABELS}
        if not {*names}.isdisjoint(_PATHS) and (delimiter != " " or known or len(names) == 1):
            return _collect(_headed_rows(lines, delimiter))
    plain = _collect(_plain_rows(lines))
    readings = [plain, _collect(_guessed_rows(lines)), _collect(_path_rows(lines))]
    good = [found for found in readings if len(found.images) > len(found.malformed)]
    return good[0]._replace(others=tuple(good[1:])) if good else plain


def _encoding(table: Path) -> str:
    with open(table, "rb") as file:
        start = file.read(2)
    return "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _short_lines(file: io.TextIOBase | Any) -> Iterator[str]:
    """Yield lines; an overlong line is cut and marked as malformed by a NUL."""
    while line := file.readline(_LINE_LIMIT):
        whole = line
        while not whole.endswith("\n") and (whole := file.readline(_LINE_LIMIT)):
            line = line[:_LINE_LIMIT] + "\0"
        yield line


def _collect(rows: Iterable[tuple[int, ListedImage | None]]) -> Listing:
    images, malformed = [], []
    for number, image in rows:
        if image is None or not image.path or "\0" in image.path:
            malformed.append(number)
        else:
            images.append(image)
    return Listing(images, malformed)


# --- Lines of a path and a number -----------------------------------------------------------------


def _plain_rows(lines: list[str]) -> Iterator[tuple[int, ListedImage | None]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            entry = _parse_plain(line)
            yield number, entry and ListedImage(number, *entry)


def _parse_plain(line: str) -> tuple[str, int] | None:
    """Return (path, label), separated by blanks, tabs or a comma, or None for a malformed line.

    Either field may stand in double quotes, as Python's ``csv`` writes a path with a comma. A path
    without quotes may contain blanks and commas too.
    """
    if (match := _LABEL.search(line.strip())) is None or int(match[1]) >= MAX_CLASSES:
        return None
    path = line.strip()[: match.start()].rstrip(" \t,")
    if path.startswith('"'):
        inner = path[1:-1].replace('""', "\0")  # a quote inside quotes is doubled
        if len(path) < 2 or path[-1] != '"' or '"' in inner or "\0" in path:
            return None
        path = inner.replace("\0", '"')
    return path, int(match[1])


# --- Tables ---------------------------------------------------------------------------------------


def _column(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().strip('"').lower())


def _headed_rows(lines: list[str], delimiter: str) -> Iterator[tuple[int, ListedImage | None]]:
    """Yield the rows below a header; columns are found by their names."""
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    header = next((row for row in reader if any(cell.strip() for cell in row)), [])
    names = [_column(cell) for cell in header]
    path = _find(names, _PATHS)
    rows = [*_csv_rows(reader, lines, delimiter, path)]
    label, split = _find(names, _LABELS), _find(names, _SPLITS)
    if label is None and len(names) == 2:
        label = 1 - (path or 0)
        if _are_captions([row[label] for _, row in rows if len(row) == 2]):
            label = None
    for number, row in rows:
        if path is None or len(row) <= path:
            yield number, None
            continue
        text = row[label] if label is not None and label < len(row) else ""
        named = parse_split(row[split])[0] if split is not None and split < len(row) else None
        yield number, ListedImage(number, row[path].strip(), _label(text), named or "train")


def _csv_rows(
    reader: Any, lines: list[str], delimiter: str, path: int | None
) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, row). A text may go on over lines, unless these name images themselves: then a
    quote is a character, as in tables that were not written as CSV."""
    while True:
        start = reader.line_num
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            row = []
        else:
            if not any(cell.strip() for cell in row):
                continue
        several = lines[start : reader.line_num]
        if path is None or len(several) < 2:
            yield reader.line_num, row
            continue
        options: Any = {"delimiter": delimiter, "skipinitialspace": True}
        alone = [*csv.reader(several, quoting=csv.QUOTE_NONE, **options)]
        if not any(_is_image(each[path]) for each in alone[1:] if len(each) > path):
            yield reader.line_num, row
            continue
        for number, each in enumerate(alone, start + 1):
            quoted = len(each) > path and '"' in each[path]
            yield number, [] if quoted else each


def _find(names: Sequence[str], wanted: tuple[str, ...]) -> int | None:
    return next((names.index(name) for name in wanted if name in names), None)


def _are_captions(texts: list[str]) -> bool:
    """Return whether most texts differ and have several words."""
    words = sum(len(text.split()) for text in texts)
    return len({*texts}) * 2 > len(texts) and words > 2 * len(texts)


def _label(text: Any) -> int | str | None:
    """Return a label as a number or a word; None if it is missing."""
    if isinstance(text, bool) or not isinstance(text, (str, int, float)):
        return str(text) if isinstance(text, bool) else None
    word = str(text).strip()
    if word.lower() in _MISSING:
        return None
    whole = re.fullmatch(r"(-?\d{1,9})(\.0+)?", word)  # pandas writes 1.0 beside missing values
    return int(whole[1]) if whole else word


def _path_rows(lines: list[str]) -> Iterator[tuple[int, ListedImage | None]]:
    """Yield lines that are a path alone."""
    for number, line in enumerate(lines, 1):
        if path := line.strip().strip('"'):
            yield number, ListedImage(number, path, None) if _is_image(path) else None


def _guessed_rows(lines: list[str]) -> Iterator[tuple[int, ListedImage | None]]:
    """Yield the rows of a table without a header; the column of image names is the path."""
    numbered = [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
    probed = [line for _, line in numbered[:_PROBED]]
    for delimiter in ("\t", ";", ",", "|", " "):
        rows = [next(csv.reader([line], delimiter=delimiter), []) for line in probed]
        width = max(map(len, rows), default=0)
        columns = [c for c in range(width) if _share(rows, c) > 0.5]
        if not columns or width < 2:
            continue
        path = columns[0]
        label = path + 1 if path + 1 < width else (path - 1 if width == 2 else None)
        if label is not None and _are_captions([row[label] for row in rows if len(row) > label]):
            label = None
        for number, line in numbered:
            row = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
            if len(row) <= path or not _is_image(row[path]):
                yield number, None
            else:
                text = row[label] if label is not None and label < len(row) else ""
                yield number, ListedImage(number, row[path].strip(), _label(text))
        return


def _is_image(path: str) -> bool:
    return Path(path.strip().strip('"')).suffix.lower() in EXTENSIONS


def _share(rows: list[list[str]], column: int) -> float:
    return sum(len(row) > column and _is_image(row[column]) for row in rows) / len(rows)


# --- JSON -----------------------------------------------------------------------------------------


def _json_list(text: str) -> list[Any] | None:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # lines of another form, which begin with a bracket
        return None


def _json_lines(lines: list[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _json_rows(values: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, ListedImage | None]]:
    """Yield the images of JSON objects or paths."""
    for number, value in values:
        if isinstance(value, str):
            value = {"path": value}
        if not isinstance(value, dict):
            yield number, None
            continue
        fields = {_column(str(name)): value[name] for name in value}
        path = next((fields[n] for n in _PATHS if isinstance(fields.get(n), str)), "")
        label = next((fields[n] for n in _LABELS if n in fields), None)
        split = next((fields[n] for n in _SPLITS if isinstance(fields.get(n), str)), "")
        yield number, ListedImage(number, path, _label(label), parse_split(split)[0] or "train")
