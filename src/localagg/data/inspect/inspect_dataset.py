"""Inspect a source before any training: counts, sizes, formats, and problems of its images.

The header and the end of every image are read, and the pixels of 512 images spread over the source,
or of all on demand. Images are streamed and a few numbers of each are kept, so that a million fit
anywhere.
"""

from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import torch

from ...config import check_argument_types
from ...io.console import ProgressCallback, show_progress
from ..loading.workers import map_in_workers
from ..sources.open import Source, open_images, report_unread, stored_splits
from .identical_images import digest_candidates, summarize_duplicates, summarize_shared
from .inspect_image import inspect_chunk

_NAMED = 5  # images of each problem in the printed table; the JSON has all


@check_argument_types
def inspect(
    uri: str,
    *,
    workers: int = 0,
    decode_all: bool = False,
    samples: int = 512,
    chunk: int = 64,
) -> dict[str, Any]:
    """Inspect every image of every split.

    Args:
        uri: data URI.
        workers: processes that read; 0: this one.
        decode_all: decode all images, instead of ``samples`` of each split and suspicious ones
            (their end is missing, or they have very few bytes).
        samples: images of each split to decode.
        chunk: images that a worker inspects at a time.

    Returns:
        {"data": uri, "splits": {"train" | "val" | "test": facts}, "left_out_splits": [names of
        others], "unread_files": [{"kind", "fix", "files", "names"}]} with facts {"images", "bytes",
        "classes": {name: images} or None, "height", "width": [smallest, median, largest],
        "formats", "modes": {name: images}, "turned": images with an EXIF orientation, "pages":
        {"files", "pages"} of files with several, "levels": {kind: {"images", "low", "high"}} of
        decoded images of more than 8 bits a sample,
        "duplicates": {"images", "groups", "labels_differ", "named": up to 1,000 groups},
        "shared": images identical to images of train, or None for train itself,
        "near_empty": names, "odd" and "unreadable": [{"name", "reason"}], "decoded": images whose
        pixels were decoded}.

    Raises:
        UserError: the URI cannot be opened.
    """
    with show_progress(f"opening {uri}"):
        splits = {split: open_images(uri, split) for split in stored_splits(uri)}
        unread = report_unread(uri)
    facts, digests, sizes = {}, {}, {}
    for split, source in splits.items():
        count = len(source) if decode_all else min(samples, len(source))
        with show_progress(f"inspecting {split}") as show:
            facts[split], digests[split], sizes[split] = _inspect_images(
                source, workers, count, chunk, show
            )
    with show_progress("comparing images that may be identical") as show:
        digest_candidates([*splits.values()], [*digests.values()], [*sizes.values()], show)
    for split, source in splits.items():
        facts[split]["duplicates"] = summarize_duplicates(source, digests[split])
        facts[split]["shared"] = None
        if "train" in digests and split != "train":
            shared = summarize_shared(source, digests[split], digests["train"])
            facts[split]["shared"] = shared
    return {
        "data": uri,
        "splits": facts,
        "left_out_splits": unread.splits,
        "unread_files": [kind.to_json() for kind in unread.files],
    }


def _inspect_images(
    source: Source, workers: int, samples: int, chunk: int, on_progress: ProgressCallback
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Return the facts of a split, digests S16 [N] of its images' ends, and sizes int64 [N]."""
    count, done = len(source), 0
    digests, sizes = np.zeros(count, "S16"), np.zeros(count, np.int64)
    shapes = np.zeros((2, count), np.int32)  # 0: unreadable
    formats: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    near_empty: list[str] = []
    problems: dict[str, list[dict[str, str]]] = {"odd": [], "unreadable": []}
    levels: dict[str, dict[str, float]] = {}
    decoded = turned = paged = pages = 0
    sampled = frozenset(torch.linspace(0, count - 1, samples).long().tolist())
    chunks = [range(i, min(i + chunk, count)) for i in range(0, count, chunk)]
    for images in map_in_workers(partial(inspect_chunk, source, sampled), chunks, workers):
        for image in images:
            name = source.name(image.index)
            sizes[image.index] = image.size
            decoded += image.decoded
            if image.levels is not None:
                _widen_levels(levels, *image.levels)
            if image.header is None:
                problems["unreadable"].append({"name": name, "reason": image.error or ""})
                continue
            digests[image.index] = image.digest
            shapes[:, image.index] = image.header.height, image.header.width
            formats[image.header.format] += 1
            modes[image.header.samples or image.header.mode] += 1
            turned += image.header.turn > 1
            if image.header.pages > 1:
                paged, pages = paged + 1, pages + image.header.pages
            if image.oddity is not None:
                problems["odd"].append({"name": name, "reason": image.oddity})
            if image.nearly_empty:
                near_empty.append(name)
        done += len(images)
        on_progress(done, count)
    heights, widths = shapes[:, shapes[0] > 0]
    facts = {
        "images": count,
        "bytes": int(sizes.sum()),
        "classes": _class_sizes(source),
        "height": _range_and_median(heights),
        "width": _range_and_median(widths),
        "formats": dict(formats.most_common()),
        "modes": dict(modes.most_common()),
        "turned": turned,
        "pages": {"files": paged, "pages": pages},
        "levels": levels,
        "near_empty": near_empty,
        **problems,
        "decoded": decoded,
    }
    return facts, digests, sizes


def _widen_levels(levels: dict[str, dict[str, float]], kind: str, low: float, high: float) -> None:
    old = levels.get(kind, {"images": 0, "low": low, "high": high})
    levels[kind] = {
        "images": old["images"] + 1,
        "low": min(low, old["low"]),
        "high": max(high, old["high"]),
    }


def _class_sizes(source: Source) -> dict[str, int] | None:
    if source.labels is None or source.classes is None:
        return None
    labels = source.labels[source.labels >= 0]
    counts = labels.bincount(minlength=len(source.classes)).tolist()
    return dict(zip(source.classes, counts, strict=True))


def _range_and_median(values: np.ndarray) -> list[int] | None:
    """Return [smallest, median, largest]."""
    if not len(values):
        return None
    ordered = np.sort(values)
    return [int(ordered[0]), int(ordered[len(ordered) // 2]), int(ordered[-1])]


def summary_rows(facts: dict[str, Any]) -> list[list[str]]:
    """Return the facts of a split as rows of a printed table."""
    rows = [["images", f"{facts['images']:,}, {facts['bytes'] / 1e6:,.1f} MB as stored"]]
    counts = (facts["classes"] or {}).values()
    classes = f"{len(counts):,} of {min(counts):,} to {max(counts):,} images" if counts else "none"
    rows.append(["classes", classes])
    for side in ("height", "width"):
        if facts[side]:
            low, middle, high = facts[side]
            rows.append([side, f"{low} to {high}, median {middle}"])
    for kind in ("formats", "modes"):
        counted = ", ".join(f"{n:,} {name}" for name, n in facts[kind].items())
        rows.append([kind, counted or "none"])
    if facts["turned"]:
        text = f"{facts['turned']:,} turned or mirrored; --exif-orientation turns them upright"
        rows.append(["EXIF orientation", text])
    if paged := facts["pages"]["files"]:
        text = f"{facts['pages']['pages']:,} in {paged:,} files; the first of each, or --pages all"
        rows.append(["pages, frames", text])
    for kind, used in facts["levels"].items():
        text = f"{used['low']:g} to {used['high']:g} used by {used['images']:,}; --range maps them"
        rows.append([kind, text])
    repeated = facts["duplicates"]
    duplicates = f"{repeated['images']:,} identical to another image"
    if repeated["labels_differ"]:
        duplicates += f"; labels differ in {repeated['labels_differ']:,} groups"
    rows.append(["duplicates", duplicates])
    rows += _first_rows([[group[1], f"as {group[0]}"] for group in repeated["named"]])
    if (shared := facts["shared"]) is not None:
        rows.append(["also in train", f"{shared['images']:,} identical images"])
        rows += _first_rows([[name, ""] for name in shared["named"]])
    rows.append(["near-empty", f"{len(facts['near_empty']):,}"])
    rows += _first_rows([[name, "99 % of one color"] for name in facts["near_empty"]])
    for kind in ("odd", "unreadable"):
        rows.append([kind, f"{len(facts[kind]):,}"])
        rows += _first_rows([[bad["name"], bad["reason"]] for bad in facts[kind]])
    pixels = "all" if facts["decoded"] == facts["images"] else f"{facts['decoded']:,}"
    rows.append(["checked", f"header and end of all, pixels of {pixels}"])
    return rows


def _first_rows(rows: list[list[str]]) -> list[list[str]]:
    """Return the first few rows, indented, and the number of the others."""
    named = [[f"  {name}", text] for name, text in rows[:_NAMED]]
    if len(rows) > _NAMED:
        named.append([f"  and {len(rows) - _NAMED:,} more", "all are in --json FILE"])
    return named
