"""Any source to one folder of large files: Arrow, the reference's TFRecords, or WebDataset tars.

Encoded images are kept byte for byte (decoded ones become PNG) unless they are to be made smaller.
Worker processes read, check, hash and shrink; this process writes, so that the files do not depend
on the number of workers. Everything is written into ``DST.partial``, each file beside its name and
renamed when it is whole, and the folder takes its name at the end. A pack that was stopped or
killed goes on behind the files that it had finished, and makes the same bytes.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ...errors import Interrupted, UserError
from ...io.console import notify, show_progress
from ..sources.open import open_images, report_other_splits, stored_splits
from ..sources.source import Source
from .formats import FORMATS
from .partial_folder import PartialFolder, check_destination, room
from .process_images import Shrink, digests, estimate, pack_images

REPORT = "pack-report.json"
_NAMED = 5  # unreadable images in the printed table


class _Split(NamedTuple):
    """A split to be packed."""

    source: Source
    target: str
    """What it is called in the folder."""
    size: int
    """About how many bytes it will take."""
    files: list[str]
    """Names of its files inside the folder."""


def pack(
    uri: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    format: Literal["arrow", "tfrecord", "webdataset"] = "arrow",
    size: int | None = None,
    quality: int | None = None,
    workers: int = 0,
    shard_bytes: int = 1 << 28,
    verify: bool = False,
) -> dict[str, Any]:
    """Copy the splits train, val and test of a source into one folder; called again after a kill,
    go on with it.

    Images that cannot be decoded are copied like all others, and named in the report. Files that
    cannot even be read keep their index, as empty images, and are named too; they are tried again
    when a stopped pack goes on.

    Args:
        uri: data URI.
        destination: a folder that does not exist or is empty.
        format: ``arrow`` is what ``datasets.DatasetDict.save_to_disk`` writes, with the columns
            ``image`` (bytes and path) and ``label`` where there are labels; ``tfrecord`` is what
            the reference's program reads; ``webdataset`` is tars of ``000000012.jpg`` and
            ``000000012.cls``.
        size: make images smaller whose shorter side is longer than this (Pillow's Lanczos filter
            over the area), as JPEG; None keeps all bytes.
        quality: of these JPEGs (1-100; 95 where not given), with color at half the resolution and
            without metadata but the EXIF orientation.
        workers: processes that read, check and shrink; 0 does it in this one.
        shard_bytes: about how large one file may become.
        verify: read everything back and compare hashes.

    Returns:
        What ``pack-report.json`` in the folder holds, and "destination" and "seconds": {"data",
        "format", "size", "quality" (or None), "images", "bytes", "verified", "duplicates":
        [[{"split", "index", "name"}, ...]] (groups of identical images, over all splits),
        "left_out_splits": [names of splits that are none of train, val and test], "splits":
        {split: {"images", "bytes", "classes" (how many, or None), "formats": {name: images},
        "shrunk": images, "unreadable": [{"index", "name", "reason"}], "malformed_lines": [numbers],
        "files": [names]}}}.

    Raises:
        UserError: the source cannot be opened or read, only some of its images have labels though
            the format is not Arrow, the destination is not empty, another pack was begun there, too
            little space, or (``verify``) what was read back differs.
        Interrupted: Ctrl-C; what is finished is kept.
    """
    start, uri = time.monotonic(), os.fspath(uri)
    destination = Path(os.path.abspath(Path(destination).expanduser()))
    shrink = _checked(format, size, quality, shard_bytes)
    check_destination(destination)
    splits = _splits(uri, format, shrink, shard_bytes)
    key = {
        "data": uri,
        "format": format,
        "shrink": shrink,
        "splits": {s.target: [s.source.fingerprint(), len(s.files)] for s in splits},
    }
    partial = PartialFolder(destination, key)
    if not partial.root.exists():
        room(destination, sum(split.size for split in splits))
    with partial:
        try:
            report = _pack(uri, splits, format, shrink, workers, verify, partial)
            partial.finish()
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; {partial.way_on}") from None
        except OSError as error:
            raise UserError(
                "TODO", f"'{uri}' cannot be packed into '{destination}': {error}; {partial.way_on}"
            ) from None
    seconds = round(time.monotonic() - start, 3)
    return {**report, "destination": str(destination), "seconds": seconds}


def _checked(format: str, size: int | None, quality: int | None, shard_bytes: int) -> Shrink | None:
    if shard_bytes < 1:
        raise UserError("TODO", f"Files of {shard_bytes} bytes are too small; allow at least 1.")
    if format not in FORMATS:
        raise UserError("TODO", f"There is no format '{format}'; there are {', '.join(FORMATS)}.")
    if size is None:
        if quality is not None:
            raise UserError("TODO", "--quality goes with --size: without it all bytes are kept.")
        return None
    quality = 95 if quality is None else quality
    if size < 1 or not 1 <= quality <= 100:
        raise UserError(
            "TODO",
            f"--size {size} --quality {quality} cannot be: a size is at least 1 pixel, a quality 1"
            " to 100.",
        )
    return Shrink(size, quality)


def _splits(
    uri: str,
    format: str,
    shrink: Shrink | None,
    shard_bytes: int,
) -> list[_Split]:
    """What is to be packed, and into which files."""
    names = stored_splits(uri)
    if format == "tfrecord" and {"val", "test"} <= set(names):
        raise UserError(
            "TODO",
            f"'{uri}' has the splits {', '.join(names)}, but TFRecords hold train and val only;"
            " pack it as arrow or webdataset.",
        )
    splits = []
    for name in names:
        source = open_images(uri, name)
        if format != "arrow" and source.labels is not None and (source.labels < 0).any():
            bare = int((source.labels < 0).sum())
            raise UserError(
                "TODO",
                f"{bare:,} of {len(source):,} images in the split {name} of '{uri}' have no label,"
                f" and in {format} all images have one or none has; pack it as arrow.",
            )
        target = "val" if format == "tfrecord" and name == "test" else name
        size = estimate(source, shrink) + len(source) * FORMATS[format].overhead
        files = max(1, min(len(source), -(-size // shard_bytes)))
        listed = [FORMATS[format].name(target, number, files) for number in range(files)]
        splits.append(_Split(source, target, size, listed))
    return splits


def _pack(
    uri: str,
    splits: list[_Split],
    format: str,
    shrink: Shrink | None,
    workers: int,
    verify: bool,
    partial: PartialFolder,
) -> dict[str, Any]:
    """Fill the folder; returns the report, which is in it too."""
    if partial.finished:
        room(partial.folder, sum(split.size for split in splits) - partial.written())
        notify(f"Going on behind {len(partial.finished):,} files that were packed before.")
    facts = {}
    for split in splits:
        with show_progress(f"packing {split.target}") as show:
            pack_images(split.source, split.files, FORMATS[format], shrink, workers, partial, show)
        FORMATS[format].complete(partial.folder, split.target, split.files, split.source)
        facts[split.target] = _facts(split, partial)
    for split in splits:
        _check_back(split, workers, verify, partial)
    report: dict[str, Any] = {"data": uri, "format": format}
    report |= {"size": shrink and shrink.size, "quality": shrink and shrink.quality}
    report |= {key: sum(part[key] for part in facts.values()) for key in ("images", "bytes")}
    report["verified"] = verify
    report["duplicates"] = [
        [{"split": splits[s].target, "index": i, "name": splits[s].source.name(i)} for s, i in same]
        for same in partial.duplicates([split.files for split in splits])
    ]
    report["left_out_splits"] = report_other_splits(uri)
    report["splits"] = facts
    (partial.folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    return report


def _facts(split: _Split, partial: PartialFolder) -> dict[str, Any]:
    """A split's part of the report."""
    source, parts = split.source, [partial.facts(name) for name in split.files]
    formats: dict[str, int] = {}
    for part in parts:
        for name, count in part["formats"].items():
            formats[name] = formats.get(name, 0) + count
    return {
        "images": len(source),
        "bytes": sum(part["bytes"] for part in parts),
        "classes": None if source.classes is None else len(source.classes),
        "formats": dict(sorted(formats.items(), key=lambda item: (-item[1], item[0]))),
        "shrunk": sum(part["shrunk"] for part in parts),
        "unreadable": [bad for part in parts for bad in part["unreadable"]],
        "malformed_lines": list(getattr(source, "malformed", [])),
        "files": [Path(name).name for name in split.files],
    }


def _check_back(split: _Split, workers: int, verify: bool, partial: PartialFolder) -> None:
    """Open what was packed (which builds its index); with ``verify`` compare every image.

    Raises:
        UserError: other images, labels or classes. The file in question is forgotten, so that it is
            written again.
    """
    source = split.source
    try:
        packed = open_images(partial.folder, split.target)
    except UserError as error:
        partial.forget(split.files)
        raise UserError("TODO", f"{error} This was just written: look after the disk.") from None
    same = (source.labels is None) == (packed.labels is None)
    if same and source.labels is not None and packed.labels is not None:
        same = torch.equal(source.labels, packed.labels) and source.classes == packed.classes
    if not same or len(source) != len(packed):
        partial.forget(split.files)
        raise UserError(
            "TODO", f"The packed {split.target} has other images or labels; {partial.way_on}"
        )
    if not verify:
        return
    written = ((name, digest) for name in split.files for digest in partial.digests(name))
    with show_progress(f"verifying {split.target}") as show:
        for i, found in enumerate(digests(packed, workers)):
            name, due = next(written)
            if due != found:
                partial.forget([name])
                raise UserError(
                    "TODO",
                    f"{source.name(i)} was read back differently from the packed {split.target};"
                    f" look after the disk; {partial.way_on}",
                )
            show(i + 1, len(source))


def pack_rows(report: dict[str, Any]) -> list[list[str]]:
    """The report as rows of a printed table; lists of images are counted only."""
    seconds = max(report["seconds"], 1e-3)
    rows = [
        ["folder", report["destination"]],
        ["images", f"{report['images']:,}"],
        ["MB", f"{report['bytes'] / 1e6:,.1f}"],
        ["seconds", f"{seconds:,.1f} ({report['images'] / seconds:,.0f} images/s)"],
        ["read back and compared", "yes" if report["verified"] else "no"],
    ]
    if report["left_out_splits"]:
        rows.append(["splits left out", ", ".join(report["left_out_splits"])])
    copies = sum(len(group) - 1 for group in report["duplicates"])
    rows.append(["identical to another image", f"{copies:,}"])
    for split, facts in report["splits"].items():
        files = f"{len(facts['files']):,} file{'s' if len(facts['files']) > 1 else ''}"
        rows.append([split, f"{facts['images']:,} images in {files}"])
        formats = ", ".join(f"{n:,} {kind}" for kind, n in facts["formats"].items())
        rows.append(["  formats", formats or "none"])
        if report["size"] is not None:
            rows.append(["  made smaller", f"{facts['shrunk']:,}"])
        rows.append(["  unreadable", f"{len(facts['unreadable']):,}"])
        rows += [[f"    {bad['name']}", bad["reason"]] for bad in facts["unreadable"][:_NAMED]]
    if copies or any(facts["unreadable"] for facts in report["splits"].values()):
        rows.append(["all of them are named in", REPORT])
    return rows
