"""What is in a source, before any training: counts, sizes, formats, and what is wrong with it.

Of every image the header and the end are looked at (``headers``), and all pixels of 512 images
spread over the source, or of all where asked. Images are streamed and a few numbers of each kept,
so that a million fit anywhere.
"""

import functools
import warnings
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...io.console import ProgressCallback, show_progress
from ..images.decode import JPEG_COLORS, READ_ERRORS, decode, read_error_reason, simplejpeg_module
from ..images.headers import Header, read_ends, read_header, stored_bytes
from ..images.metadata import broken_checksum, odd_metadata
from ..loading.workers import map_in_workers
from ..sources.open import Source, open_images, report_other_splits, stored_splits
from .identical_images import compare, digest, repetitions, shared

_CHUNK = 64  # images a worker looks at before it reports
_DECODED = 512  # images whose pixels are looked at, where not all are
_NAMED = 5  # images a kind of trouble in the printed table; the JSON has all
_EMPTY_SHARE, _EMPTY_LEVELS, _EMPTY_GRID = 0.99, 8, 64


class _Look(NamedTuple):
    """What one image turned out to be."""

    index: int
    size: int = 0
    """Bytes as it is stored."""
    digest: bytes = b""
    header: Header | None = None
    fault: str | None = None
    odd: str | None = None
    decoded: bool = False
    empty: bool = False


def _look_at_chunk(source: Source, whole: set[int], chunk: range) -> list[_Look]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about metadata: said here in other words
        return [_look(source, index, index in whole) for index in chunk]


def _look(source: Source, index: int, whole: bool) -> _Look:
    found = _Look(index)
    try:
        ends = read_ends(source, index)
        if isinstance(ends, Tensor):
            header = Header(ends.shape[1], ends.shape[2], "decoded", "RGB")
            found = found._replace(size=ends.numel(), digest=digest(ends.numpy().tobytes()))
            return found._replace(header=header, decoded=True, empty=nearly_empty(ends))
        found = found._replace(size=ends.size, digest=digest(ends.head, ends.tail, ends.size))
        header, cut, info = read_header(source, index, ends)
        whole = whole or _light(header, ends.size)
        odd = "its end is not that of its format, though all pixels are there" if cut else None
        odd = odd or odd_metadata(source.name(index), header.format, info)
        empty = False
        if whole:
            pixels, doubt = _decoded(stored_bytes(source, index, ends), header)
            odd, empty = odd or doubt, nearly_empty(pixels)
        return found._replace(header=header, odd=odd, decoded=whole or header.decoded, empty=empty)
    except READ_ERRORS as error:
        return found._replace(fault=read_error_reason(error))


def _decoded(data: bytes, header: Header) -> tuple[Tensor, str | None]:
    """The pixels, and what speaks against them although they can be decoded."""
    if header.format in ("JPEG", "MPO") and header.mode in JPEG_COLORS:
        if (jpeg := simplejpeg_module()) is None:
            return decode(data), None
        colors = JPEG_COLORS[header.mode]
        try:
            pixels = jpeg.decode_jpeg(data, colorspace=colors, strict=True)
        except ValueError:
            return decode(data), "libjpeg warns that its data are damaged"
        if colors != "CMYK":
            return torch.from_numpy(pixels).permute(2, 0, 1), None
    pixels = decode(data)
    wrong = header.format == "PNG" and broken_checksum(data)
    return pixels, "a checksum in it is wrong" if wrong else None


def _light(header: Header, size: int) -> bool:
    """Whether so few bytes for so many pixels make it likely that nothing is to be seen.

    A JPEG of one color takes some 620 bytes and another one for each 36 to 64 pixels.
    """
    return size < 700 + header.height * header.width // 24


def nearly_empty(pixels: Tensor) -> bool:
    """Whether at least 99 % of an image is of one color.

    Each channel's values lie within 8 levels of the channel's median, at 99 % of the points of a
    grid of some 64 x 64.

    Args:
        pixels: uint8 [3, H, W].
    """
    step_y, step_x = (max(1, side // _EMPTY_GRID) for side in pixels.shape[1:])
    grid = pixels[:, ::step_y, ::step_x].reshape(len(pixels), -1).numpy().astype(np.int16)
    near = np.abs(grid - np.median(grid, axis=1, keepdims=True)) <= _EMPTY_LEVELS
    return bool(near.all(axis=0).mean() >= _EMPTY_SHARE)


def inspect(uri: str, *, workers: int = 0, decode_all: bool = False) -> dict[str, Any]:
    """Look at every image of every split.

    Args:
        uri: data URI.
        workers: processes that read.
        decode_all: look at the pixels of all images, not only of 512 in each split and of those
            that look suspicious (their end is missing, or their bytes are very few).

    Returns:
        {"data": uri, "splits": {"train" | "val" | "test": facts}, "left_out_splits": [names of
        others]} with facts {"images", "bytes", "classes": {name: images} or
        None, "height", "width": [smallest, median, largest], "formats", "modes": {name: images},
        "duplicates": {"images", "groups", "labels_differ", "named": up to 1,000 groups},
        "shared": images that are byte for byte images of train, or None for train itself,
        "near_empty": names, "odd" and "unreadable": [{"name", "reason"}], "decoded": images whose
        pixels were looked at}.

    Raises:
        UserError: the URI cannot be opened.
    """
    with show_progress(f"opening {uri}"):
        splits = {split: open_images(uri, split) for split in stored_splits(uri)}
        left_out = report_other_splits(uri)
    tallies: dict[str, _Tally] = {}
    for split, source in splits.items():
        with show_progress(f"looking at {split}") as show:
            tallies[split] = _looked_at(source, workers, decode_all, show)
    digests = {split: tally.digests for split, tally in tallies.items()}
    with show_progress("comparing images that seem equal") as show:
        sizes = [tally.sizes for tally in tallies.values()]
        compare(list(splits.values()), list(digests.values()), sizes, show)
    found = {split: _facts(splits[split], tally) for split, tally in tallies.items()}
    for split in digests:
        if "train" in digests and split != "train":
            found[split]["shared"] = shared(splits[split], digests[split], digests["train"])
    return {"data": uri, "splits": found, "left_out_splits": left_out}


class _Tally:
    """What was found in a split: a few numbers an image, and the names of those in trouble."""

    def __init__(self, source: Source) -> None:
        size = len(source)
        self.source = source
        self.digests = np.zeros(size, dtype="S16")
        self.sizes = np.zeros(size, dtype=np.int64)
        self.shape = np.zeros((2, size), dtype=np.int32)  # 0: unreadable
        self.formats: Counter[str] = Counter()
        self.modes: Counter[str] = Counter()
        self.odd: list[dict[str, str]] = []
        self.unreadable: list[dict[str, str]] = []
        self.near_empty: list[str] = []
        self.decoded = 0

    def add(self, look: _Look) -> None:
        """Count one image."""
        self.sizes[look.index] = look.size
        self.decoded += look.decoded
        if look.fault is not None or look.header is None:
            bad = {"name": self.source.name(look.index), "reason": look.fault or ""}
            self.unreadable.append(bad)
            return
        self.digests[look.index] = look.digest
        self.shape[:, look.index] = look.header.height, look.header.width
        self.formats[look.header.format] += 1
        self.modes[look.header.mode] += 1
        if look.odd is not None:
            self.odd.append({"name": self.source.name(look.index), "reason": look.odd})
        if look.empty:
            self.near_empty.append(self.source.name(look.index))


def _looked_at(source: Source, workers: int, every: bool, on_progress: ProgressCallback) -> _Tally:
    tally, done = _Tally(source), 0
    count = len(source) if every else min(_DECODED, len(source))
    whole = set(torch.linspace(0, len(source) - 1, count).long().tolist())
    chunks = [range(i, min(i + _CHUNK, len(source))) for i in range(0, len(source), _CHUNK)]
    for looks in map_in_workers(functools.partial(_look_at_chunk, source, whole), chunks, workers):
        for look in looks:
            tally.add(look)
        done += len(looks)
        on_progress(done, len(source))
    return tally


def _facts(source: Source, tally: _Tally) -> dict[str, Any]:
    classes = None
    if source.labels is not None and source.classes is not None:
        labels = source.labels[source.labels >= 0]
        counts = labels.bincount(minlength=len(source.classes)).tolist()
        classes = dict(zip(source.classes, counts, strict=True))
    heights, widths = tally.shape[:, tally.shape[0] > 0]
    return {
        "images": len(source),
        "bytes": int(tally.sizes.sum()),
        "classes": classes,
        "height": _spread(heights),
        "width": _spread(widths),
        "formats": dict(tally.formats.most_common()),
        "modes": dict(tally.modes.most_common()),
        "duplicates": repetitions(source, tally.digests),
        "shared": None,
        "near_empty": tally.near_empty,
        "odd": tally.odd,
        "unreadable": tally.unreadable,
        "decoded": tally.decoded,
    }


def _spread(values: np.ndarray) -> list[int] | None:
    """[smallest, median, largest]."""
    if not len(values):
        return None
    ordered = np.sort(values)
    return [int(ordered[0]), int(ordered[len(ordered) // 2]), int(ordered[-1])]


def summary_rows(facts: dict[str, Any]) -> list[list[str]]:
    """The facts of a split as rows of a table."""
    rows = [["images", f"{facts['images']:,}, {facts['bytes'] / 1e6:,.1f} MB as stored"]]
    if facts["classes"]:
        counts = facts["classes"].values()
        rows.append(["classes", f"{len(counts):,} of {min(counts):,} to {max(counts):,} images"])
    else:
        rows.append(["classes", "none"])
    for side in ("height", "width"):
        if facts[side]:
            low, middle, high = facts[side]
            rows.append([side, f"{low} to {high}, median {middle}"])
    for what in ("formats", "modes"):
        counted = ", ".join(f"{n:,} {kind}" for kind, n in facts[what].items())
        rows.append([what, counted or "none"])
    repeated = facts["duplicates"]
    told = f"{repeated['images']:,} repeat another, byte for byte"
    if repeated["labels_differ"]:
        told += f"; {repeated['labels_differ']:,} times with another label"
    rows.append(["duplicates", told])
    rows += _named([[group[1], f"as {group[0]}"] for group in repeated["named"]])
    if (common := facts["shared"]) is not None:
        rows.append(["in train too", f"{common['images']:,}, byte for byte"])
        rows += _named([[name, ""] for name in common["named"]])
    rows.append(["near-empty", f"{len(facts['near_empty']):,}"])
    rows += _named([[name, "99 % of one color"] for name in facts["near_empty"]])
    for what in ("odd", "unreadable"):
        rows.append([what, f"{len(facts[what]):,}"])
        rows += _named([[bad["name"], bad["reason"]] for bad in facts[what]])
    pixels = "all" if facts["decoded"] == facts["images"] else f"{facts['decoded']:,}"
    rows.append(["looked at", f"header and end of all, pixels of {pixels}"])
    return rows


def _named(rows: list[list[str]]) -> list[list[str]]:
    """The first few of them, indented, and how many more there are."""
    shown = [[f"  {name}", said] for name, said in rows[:_NAMED]]
    if len(rows) > _NAMED:
        shown.append([f"  and {len(rows) - _NAMED:,} more", "all are in --json FILE"])
    return shown
