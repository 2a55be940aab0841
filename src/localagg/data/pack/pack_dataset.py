"""Copy any source into one folder of large files: Arrow, the reference's TFRecords, or tars.

Encoded images are kept byte for byte (decoded ones become PNG) unless they are to be shrunk. Worker
processes read, check, hash and shrink; this process writes, so that the files do not depend on the
number of workers. Every file is written atomically into ``DST.partial``, and the folder is renamed
at the end. A pack that was stopped or killed continues after its finished files, and produces the
same bytes.

``pack-report.json`` has "data", "format", "size", "quality", "images", "bytes", "verified",
"left_out_splits", "unread_files", "duplicates" (groups of identical images, over all splits, as
{"split", "index", "name"}), and "splits": {split: {"images", "bytes", "classes" (count or None),
"formats": {name: images}, "shrunk", "unreadable": [{"index", "name", "reason"}], "malformed_lines":
[numbers], "files"}}.
"""

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ...config import check_argument_types
from ...errors import UserError, counted
from ...io.console import notify, show_progress
from ..sources.open import check_outside, open_images, report_unread, stored_splits
from ..sources.source import Source
from .formats import FORMATS, PackFormat
from .partial_folder import PartialFolder, check_destination, check_free_space
from .process_images import ShrinkOptions, estimate_bytes, hash_images, pack_images
from .reference_order import FILES, ReferenceOrder, reference_files

REPORT = "pack-report.json"
_NAMED = 5  # unreadable images in the printed table


class PlannedSplit(NamedTuple):
    """A split, and the files that it becomes."""

    source: Source
    target: str  # its name in the folder
    size: int  # approximate bytes of its files
    format: PackFormat
    files: list[str]  # their names inside the folder


@check_argument_types
def pack(
    uri: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    format: Literal["arrow", "tfrecord", "webdataset"] | None = None,
    size: int | None = None,
    quality: int | None = None,
    workers: int = 0,
    shard_bytes: int = 1 << 28,
    verify: bool = False,
    like: Literal["reference"] | None = None,
    seed: int = 0,
    files: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Copy the splits train, val and test of a source into one folder, or continue such a pack.

    Images that cannot be decoded are copied and named in the report. Files that cannot be read keep
    their index as empty images; a pack that continues tries them again.

    Args:
        uri: data URI.
        destination: a folder that does not exist or is empty.
        format: ``arrow``: as ``datasets.DatasetDict.save_to_disk``; ``tfrecord``: for the
            reference's program; ``webdataset``: tars of ``000000012.jpg`` and ``000000012.cls``.
            Default: arrow, or tfrecord with ``like``.
        size: shrink images whose shorter side has more pixels (Pillow's Lanczos filter), as JPEG
            without metadata but the EXIF orientation. Default: keep all bytes.
        quality: of these JPEGs, 1-100. Default: 95.
        workers: processes that read, check and shrink; 0: this one.
        shard_bytes: approximate largest size of a file.
        verify: read everything back and compare hashes.
        like: "reference": the records of the reference's scripts in their order, for the banks of
            its checkpoints; see :mod:`.reference_order`.
        seed: of the reference's shuffle.
        files: of train and val, like the reference. Default: 1,024 and 128.

    Returns:
        The report, as in ``pack-report.json``, with "destination" and "seconds".

    Raises:
        UserError: a source, option or destination is invalid, space is too small, or images were
            read back differently (``verify``).
        Interrupted: Ctrl-C; finished files are kept.
    """
    start, uri = time.monotonic(), os.fspath(uri)
    format = format or ("arrow" if like is None else "tfrecord")
    destination = Path(os.path.abspath(Path(destination).expanduser()))
    shrink = _check_options(format, size, quality, shard_bytes)
    check_destination(destination)
    check_outside(uri, destination, "DST")
    _check_like(like, format, shrink, seed, files)
    splits = _plan_splits(uri, format, shrink, shard_bytes)
    if like is not None:
        splits = [_like_reference(split, seed, files) for split in splits]
    partial = _partial_folder(destination, uri, format, shrink, splits)
    with partial.open():
        report = _fill_folder(uri, splits, format, shrink, workers, verify, partial)
        partial.finish()
    seconds = time.monotonic() - start
    return {**report, "destination": str(destination), "seconds": round(seconds, 3)}


def _partial_folder(
    destination: Path,
    uri: str,
    format: str,
    shrink: ShrinkOptions | None,
    splits: list[PlannedSplit],
) -> PartialFolder:
    """Return the folder of this very pack, which may have been begun."""
    fingerprints = {s.target: [s.source.fingerprint(), len(s.files)] for s in splits}
    key = {"data": uri, "format": format, "shrink": shrink, "splits": fingerprints}
    partial = PartialFolder(destination, key)
    if not partial.root.exists():
        check_free_space(destination, sum(split.size for split in splits))
    return partial


def _check_options(
    format: str, size: int | None, quality: int | None, shard_bytes: int
) -> ShrinkOptions | None:
    if shard_bytes < 1:
        raise UserError("option-invalid", f"shard_bytes is {shard_bytes}; it must be at least 1.")
    if format not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError("option-invalid", f"There is no format '{format}'; there are {known}.")
    if size is None:
        if quality is not None:
            raise UserError("option-conflict", f"--quality {quality} has no effect without --size.")
        return None
    quality = 95 if quality is None else quality
    if size < 1 or not 1 <= quality <= 100:
        raise UserError(
            "option-invalid",
            f"--size is {size} and --quality {quality}; size must be at least 1, quality 1 to 100.",
        )
    return ShrinkOptions(size, quality)


def _plan_splits(
    uri: str, format: str, shrink: ShrinkOptions | None, shard_bytes: int
) -> list[PlannedSplit]:
    names = stored_splits(uri)
    if format == "tfrecord" and {"val", "test"} <= set(names):
        raise UserError(
            "unsupported",
            f"'{uri}' has the splits {', '.join(names)}, but TFRecords hold train and val only;"
            " use --format arrow or webdataset.",
        )
    splits = []
    for name in names:
        source = open_images(uri, name)
        target = "val" if format == "tfrecord" and name == "test" else name
        size = estimate_bytes(source, shrink) + len(source) * FORMATS[format].overhead
        count = max(1, min(len(source), -(-size // shard_bytes)))
        files = [FORMATS[format].name(target, number, count) for number in range(count)]
        splits.append(PlannedSplit(source, target, size, FORMATS[format], files))
    return splits


def _check_like(
    like: str | None,
    format: str,
    shrink: ShrinkOptions | None,
    seed: int,
    files: tuple[int, int] | None,
) -> None:
    if not 0 <= seed < 2**32:
        raise UserError("option-invalid", f"--seed is {seed}; it must be from 0 to 2**32 - 1.")
    if like is None and files is None and not seed:
        return
    if like is None:
        name = "--seed" if files is None else "--files"
        raise UserError("option-conflict", f"{name} has no effect without --like reference.")
    if like != "reference":
        raise UserError("option-invalid", f"--like is '{like}'; it must be reference.")
    if format != "tfrecord" or shrink:
        raise UserError(
            "option-conflict",
            f"--like reference writes TFRecords of unchanged images; omit --format {format} and"
            " --size.",
        )
    if files is not None and min(files) < 1:
        raise UserError("option-invalid", f"--files is {files}; each must be at least 1.")


def _like_reference(split: PlannedSplit, seed: int, files: tuple[int, int] | None) -> PlannedSplit:
    source = ReferenceOrder(split.source, split.target, seed)
    number = (files or (*FILES.values(),))[split.target != "train"]
    format, names = reference_files(source, split.target, number)
    return split._replace(source=source, format=format, files=names)


def _fill_folder(
    uri: str,
    splits: list[PlannedSplit],
    format: str,
    shrink: ShrinkOptions | None,
    workers: int,
    verify: bool,
    partial: PartialFolder,
) -> dict[str, Any]:
    """Write all files and return the report, which is one of them."""
    if partial.finished:
        remaining = sum(split.size for split in splits) - partial.written_bytes()
        check_free_space(partial.folder, remaining)
        notify(f"Continuing a pack: {counted(len(partial.finished), 'file')} finished.")
    for split in splits:
        with show_progress(f"packing {split.target}") as show:
            pack_images(split.source, split.files, split.format, shrink, workers, partial, show)
        split.format.complete(partial.folder, split.target, split.files, split.source)
    for split in splits:
        _check_packed(split, workers, verify, partial)
    facts = {split.target: _split_report(split, partial) for split in splits}
    identical = partial.identical_images([split.files for split in splits])
    unread = report_unread(uri)
    report: dict[str, Any] = {
        "data": uri,
        "format": format,
        "size": shrink and shrink.size,
        "quality": shrink and shrink.quality,
        **{key: sum(part[key] for part in facts.values()) for key in ("images", "bytes")},
        "verified": verify,
        "duplicates": [
            [
                {"split": splits[s].target, "index": i, "name": splits[s].source.name(i)}
                for s, i in g
            ]
            for g in identical
        ],
        "left_out_splits": unread.splits,
        "unread_files": [kind.to_json() for kind in unread.files],
        "splits": facts,
    }
    (partial.folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    return report


def _split_report(split: PlannedSplit, partial: PartialFolder) -> dict[str, Any]:
    source, parts = split.source, [partial.facts(name) for name in split.files]
    formats = sum((Counter(part["formats"]) for part in parts), Counter())
    return {
        "images": len(source),
        "bytes": sum(part["bytes"] for part in parts),
        "classes": None if source.classes is None else len(source.classes),
        "formats": dict(sorted(formats.items(), key=lambda item: (-item[1], item[0]))),
        "shrunk": sum(part["shrunk"] for part in parts),
        "unreadable": [image for part in parts for image in part["unreadable"]],
        "malformed_lines": list(getattr(source, "malformed", [])),
        "files": [Path(name).name for name in split.files],
    }


def _check_packed(split: PlannedSplit, workers: int, verify: bool, partial: PartialFolder) -> None:
    """Open the packed split (which builds its index); with ``verify`` compare every image.

    The next pack writes a file again whose images, labels or classes differ.
    """
    source = split.source
    try:
        packed = open_images(partial.folder, split.target)
        if len(source) != len(packed) or not _same_labels(source, packed):
            raise UserError("damaged", f"The packed {split.target} has other images or labels.")
    except UserError as error:
        partial.forget(split.files)
        raise UserError("damaged", f"{error} It was just written: check the disk.") from None
    if not verify:
        return
    written = ((name, row.tobytes()) for name in split.files for row in partial.digests(name))
    with show_progress(f"verifying {split.target}") as show:
        pairs = zip(written, hash_images(packed, workers), strict=True)
        for i, ((name, expected), found) in enumerate(pairs):
            if expected != found:
                partial.forget([name])
                raise UserError(
                    "damaged",
                    f"{source.name(i)} was read back differently from the packed {split.target};"
                    f" check the disk; {partial.next_step}",
                )
            show(i + 1, len(source))


def _same_labels(source: Source, packed: Source) -> bool:
    if source.labels is None or packed.labels is None:
        return source.labels is packed.labels
    return torch.equal(source.labels, packed.labels) and source.classes == packed.classes


def pack_rows(report: dict[str, Any]) -> list[list[str]]:
    """Return the report as rows of a printed table, with a few of the unreadable images."""
    seconds = max(report["seconds"], 1e-3)
    identical = sum(len(group) - 1 for group in report["duplicates"])
    rows = [
        ["folder", report["destination"]],
        ["images", f"{report['images']:,}"],
        ["MB", f"{report['bytes'] / 1e6:,.1f}"],
        ["seconds", f"{seconds:,.1f} ({report['images'] / seconds:,.0f} images/s)"],
        ["read back and compared", "yes" if report["verified"] else "no"],
        ["identical to another image", f"{identical:,}"],
    ]
    if report["left_out_splits"]:
        rows.append(["splits skipped", ", ".join(report["left_out_splits"])])
    for split, facts in report["splits"].items():
        files = f"{len(facts['files']):,} file{'s' if len(facts['files']) > 1 else ''}"
        formats = ", ".join(f"{n:,} {kind}" for kind, n in facts["formats"].items())
        rows.append([split, f"{facts['images']:,} images in {files}"])
        rows.append(["  formats", formats or "none"])
        if report["size"] is not None:
            rows.append(["  shrunk", f"{facts['shrunk']:,}"])
        rows.append(["  unreadable", f"{len(facts['unreadable']):,}"])
        rows += [[f"    {bad['name']}", bad["reason"]] for bad in facts["unreadable"][:_NAMED]]
    if identical or any(facts["unreadable"] for facts in report["splits"].values()):
        rows.append(["all of them are named in", REPORT])
    return rows
