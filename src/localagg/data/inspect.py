"""What is in a source, before any training: counts, classes, sizes, formats, unreadable images."""

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from ..logbook import showing
from .decode import decode, image_size
from .loader import FAULTS, Progress, Throttle, through_workers
from .sources import Source, open_evaluation, open_images

_CHUNK = 64  # images a worker looks at before it reports
_NAMED = 5  # unreadable images in the printed table; the JSON has all


class _Look(NamedTuple):
    """What one image turned out to be."""

    index: int
    height: int
    width: int
    format: str
    fault: str | None


class _Looks(Dataset):
    """Item c is what chunk c of the images turned out to be, each decoded to its end."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.chunks = torch.arange(len(source)).split(_CHUNK)

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, chunk: int) -> list[_Look]:
        return [_look(self.source, index) for index in self.chunks[chunk].tolist()]


def _look(source: Source, index: int) -> _Look:
    try:
        image = source[index].image
        if not isinstance(image, bytes):
            return _Look(index, image.shape[1], image.shape[2], "decoded", None)
        height, width, kind = image_size(image)
        decode(image)
        return _Look(index, height, width, kind, None)
    except FAULTS as error:
        return _Look(index, 0, 0, "", str(error))


def inspect(uri: str, *, workers: int = 0) -> dict[str, Any]:
    """Look at every image of every split, whole.

    Args:
        uri: data URI.
        workers: processes that decode.

    Returns:
        {"data": uri, "splits": {"train"| "val": facts}} with facts {"images", "classes": {name:
        images} or None, "height", "width": [smallest, median, largest], "formats": {name: images},
        "unreadable": [{"name", "reason"}]}.

    Raises:
        UserError: the URI cannot be opened.
    """
    splits = {"train": open_images(uri)}
    if (held_out := open_evaluation(uri)) is not None:
        splits["val"] = held_out
    found = {}
    for split, source in splits.items():
        with showing(f"looking at {split}") as show:
            found[split] = _facts(source, workers, Throttle(show))
    return {"data": uri, "splits": found}


def _facts(source: Source, workers: int, on_progress: Progress) -> dict[str, Any]:
    heights, widths, formats, unreadable = [], [], Counter(), []
    done = 0
    for looks in through_workers(_Looks(source), workers):
        for look in looks:
            if look.fault is not None:
                unreadable.append({"name": source.name(look.index), "reason": look.fault})
                continue
            heights.append(look.height)
            widths.append(look.width)
            formats[look.format] += 1
        done += len(looks)
        on_progress(done, len(source))
    classes = None
    if source.labels is not None and source.classes is not None:
        counts = source.labels.bincount(minlength=len(source.classes)).tolist()
        classes = dict(zip(source.classes, counts, strict=True))
    return {
        "images": len(source),
        "classes": classes,
        "height": _spread(heights),
        "width": _spread(widths),
        "formats": dict(formats.most_common()),
        "unreadable": unreadable,
    }


def _spread(values: list[int]) -> list[int] | None:
    """[smallest, median, largest]."""
    if not values:
        return None
    ordered = sorted(values)
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def summary_rows(facts: dict[str, Any]) -> list[list[str]]:
    """The facts of a split as rows of a printed table."""
    rows = [["images", f"{facts['images']:,}"]]
    if facts["classes"]:
        counts = facts["classes"].values()
        rows.append(["classes", f"{len(counts):,} of {min(counts):,} to {max(counts):,} images"])
    else:
        rows.append(["classes", "none"])
    for side in ("height", "width"):
        if facts[side]:
            low, middle, high = facts[side]
            rows.append([side, f"{low} to {high}, median {middle}"])
    rows.append(["formats", ", ".join(f"{n:,} {kind}" for kind, n in facts["formats"].items())])
    rows.append(["unreadable", f"{len(facts['unreadable']):,}"])
    rows += [[f"  {bad['name']}", bad["reason"]] for bad in facts["unreadable"][:_NAMED]]
    if len(facts["unreadable"]) > _NAMED:
        rows.append([f"  and {len(facts['unreadable']) - _NAMED:,} more", "all are in --json FILE"])
    return rows
