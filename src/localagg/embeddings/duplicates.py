"""Find near-duplicates: candidates by embedding and by pixels, decided by pixels."""

import functools
import io
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from ..config import check_argument_types
from ..data.images.decode import READ_ERRORS, decode
from ..data.images.levels import Levels
from ..data.images.pixel_agreement import THUMBNAIL, agreement, details, gray_thumbnail
from ..data.loading.workers import map_in_workers
from ..data.sources.source import Source, encoded_bytes
from ..errors import UserError, counted
from ..io.console import notify, show_progress
from ..io.result_file import check_result_file, write_result
from .neighbors import nearest_others
from .open_table import open_table, open_table_images
from .table import EmbeddingTable

_NEIGHBORS, _COPIES = 10, 5  # candidates of an image; ranks beyond the copies are other images
_SAMPLE = 100  # images whose altered views are compared
_FALSE, _FOUND = 1e-3, 0.95  # images with a false partner; altered views to be found
_LEAST, _DEFAULT = 0.8, 0.9
_SHARP = 0.7  # of the sharpest image of a group


@check_argument_types
def find_duplicates(
    table: str | Path | EmbeddingTable,
    *,
    above: float | None = None,
    out: str | Path | None = None,
    workers: int = 0,
) -> dict[str, Any]:
    """Find groups of images that show the same picture. No file is changed.

    Candidates are the ten nearest images by embedding, and by pixels, plain and flipped. Two
    candidates are near-duplicates if their agreement is at least S; see
    :mod:`~localagg.data.images.pixel_agreement`. Pairs that share an image are in one group.

    Args:
        table: run folder, or table written by ``localagg embed``; the images must still exist.
        above: S, 0-1. Default: by the rule of :func:`choose_threshold`.
        out: file to write: group, path, index, label, keep, agreement with the kept image, width,
            height, sharpness, bytes.
        workers: processes that decode.

    Returns:
        {"table", "images": N, "above": S, "others", "views": the two agreements, or None,
        "unreadable", "redundant": images beyond the kept ones, "groups": [[{"path", "index",
        "label", "keep", "agreement", "width", "height", "sharpness", "bytes"}]]}. The image to
        keep is first: of those with the most pixels and at least 0.7 of the best sharpness, the
        largest file. Groups are sorted by size, then by agreement.

    Raises:
        UserError: an invalid option, a table that cannot be read, or images that changed.
    """
    check_result_file(out)
    if above is not None and not 0 < above <= 1:
        raise UserError("option-invalid", f"--above is {above}; it must be above 0 and at most 1.")
    opened = open_table(table, workers=workers)
    source, index = open_table_images(opened), torch.tensor(opened.images["index"].to_pylist())
    thumbnails, readable = _read_thumbnails(source, index, opened.levels, workers)
    pairs_P2, others_P = _candidates(opened.unit_embeddings(), thumbnails, readable)
    agreement_P = _compare(thumbnails, pairs_P2)
    others, views = None, None
    if above is None:
        sample = _sample(readable)
        views = _views_agreement(source, index[sample], opened.levels, thumbnails[sample])
        others, above = choose_threshold(agreement_P[others_P], views, int(readable.sum()))
    same = agreement_P >= above
    found = _connected(len(index), pairs_P2[same])
    groups = [_describe_group(opened, source, members, thumbnails) for members in found]
    groups.sort(key=lambda group: (-len(group), -min(each["agreement"] for each in group)))
    if out is not None:
        _write_groups(out, groups, labeled="label" in opened.images.column_names)
    return {
        "table": str(opened.path),
        "images": len(index),
        "above": above,
        "others": others,
        "views": views,
        "unreadable": int((~readable).sum()),
        "redundant": sum(map(len, groups)) - len(groups),
        "groups": groups,
    }


def _sample(readable: Tensor) -> Tensor:
    """Return places of readable images, evenly spread."""
    places = readable.nonzero().flatten()
    count = min(_SAMPLE, len(places))
    return places[torch.linspace(0, len(places) - 1, count, dtype=torch.float64).long()]


_MEASURES = ("agreement", "width", "height", "sharpness", "bytes")


def _write_groups(out: str | Path, groups: list[list[dict[str, Any]]], *, labeled: bool) -> None:
    rows = [{"group": n, **each} for n, group in enumerate(groups) for each in group]
    label = ["label"] if labeled else []
    names = ["group", "path", "index", *label, "keep", *_MEASURES]
    write_result(out, {name: [row[name] for row in rows] for name in names})


def _read_thumbnails(
    source: Source, index: Tensor, levels: Levels, workers: int
) -> tuple[Tensor, Tensor]:
    """Return float16 [n, 48, 48] and whether each image can be read, bool [n]."""
    thumbnails, readable = torch.zeros(len(index), THUMBNAIL, THUMBNAIL).half(), []
    with show_progress("reading images") as show:
        chunks, done = index.split(64), 0
        for found, fine in map_in_workers(
            functools.partial(_thumbnails, source, levels), chunks, workers
        ):
            thumbnails[done : done + len(fine)] = found
            readable += fine
            done += len(fine)
            show(done, len(index))
    if missing := readable.count(False):
        notify(f"Excluded {counted(missing, 'image')} that can no longer be read.")
    return thumbnails, torch.tensor(readable)


def _thumbnails(source: Source, levels: Levels, index: Tensor) -> tuple[Tensor, list[bool]]:
    found, readable = torch.zeros(len(index), THUMBNAIL, THUMBNAIL).half(), []
    for row, i in enumerate(index.tolist()):
        try:
            found[row] = gray_thumbnail(decode(source[i].image, levels=levels))
            readable.append(True)
        except READ_ERRORS:
            readable.append(False)
    return found, readable


def _candidates(rows: Tensor, thumbnails: Tensor, readable: Tensor) -> tuple[Tensor, Tensor]:
    """Return pairs [P, 2] to compare, and which of them are certainly different images [P].

    The latter are neighbors by embedding only, beyond the rank of copies.
    """
    pixels = details(thumbnails)
    flipped = details(thumbnails.flip(2))
    near = [
        nearest_others(rows, _NEIGHBORS)[0],
        nearest_others(pixels, _COPIES)[0],
        nearest_others(pixels, _COPIES, queries=flipped)[0],
    ]
    size, keys = len(rows), []
    for neighbors in near:
        own = torch.arange(size).unsqueeze(1).expand_as(neighbors)
        low, high = torch.minimum(own, neighbors), torch.maximum(own, neighbors)
        keys.append(low * size + high)
    close = torch.cat([keys[0][:, :_COPIES].flatten(), keys[1].flatten(), keys[2].flatten()])
    far = keys[0][:, _COPIES:].flatten().unique()
    far = far[~torch.isin(far, close)]
    both = torch.cat([close.unique(), far])
    pairs = torch.stack([both // size, both % size], dim=1)
    fine = readable[pairs].all(dim=1)
    others = torch.arange(len(both)) >= len(both) - len(far)
    return pairs[fine], others[fine]


def _compare(thumbnails: Tensor, pairs: Tensor) -> Tensor:
    found = torch.empty(len(pairs))
    with show_progress("comparing pairs") as show:
        for start in range(0, len(pairs), 1024):
            part = pairs[start : start + 1024]
            found[start : start + 1024] = agreement(thumbnails[part[:, 0]], thumbnails[part[:, 1]])
            show(min(start + 1024, len(pairs)), len(pairs))
    return found


def _views_agreement(
    source: Source, index: Tensor, levels: Levels, thumbnails: Tensor
) -> float | None:
    """Return the agreement that 95 % of altered views of images reach with their image."""
    first, second = [], []
    for thumbnail, i in zip(thumbnails, index.tolist(), strict=True):
        image = Image.fromarray(decode(source[i].image, levels=levels).permute(1, 2, 0).numpy())
        for view in _altered(image):
            pixels = torch.frombuffer(bytearray(view.tobytes()), dtype=torch.uint8)
            pixels = pixels.view(view.height, view.width, 3).permute(2, 0, 1)
            first.append(thumbnail)
            second.append(gray_thumbnail(pixels))
    if not first:
        return None
    return agreement(torch.stack(first), torch.stack(second)).quantile(1 - _FOUND).item()


def _altered(image: Image.Image) -> list[Image.Image]:
    width, height = image.size
    saved = io.BytesIO()
    image.save(saved, "JPEG", quality=30)
    return [
        image.crop((width // 10, height // 12, width - width // 20, height - height // 15)),
        ImageOps.mirror(image),
        ImageEnhance.Brightness(image).enhance(1.3),
        image.resize((max(1, width // 2), max(1, height // 2)), Image.Resampling.BILINEAR),
        Image.open(saved).convert("RGB"),
    ]


def choose_threshold(
    others: Tensor, views: float | None, images: int
) -> tuple[float | None, float]:
    """Return the first of two agreements, and S, midway between them.

    A thousandth of the images reach the first with a different image: it is extrapolated from the
    90 and 99 % quantiles, linearly in Fisher's z. If it is the larger, S is the first. S is at
    least 0.8.

    Args:
        others: agreements [n] with the neighbors ranked sixth to tenth, so that single copies
            among them have no effect.
        views: the second: what 95 % of altered views (cropped, flipped, brightened, halved, saved
            at low quality) of 100 images reach with their image; None if none can be read.
        images: number of readable images.
    """
    if views is None or not len(others):
        return None, _DEFAULT
    most, few = others.quantile(torch.tensor([0.9, 0.99])).clamp(-0.99, 0.99).atanh().tolist()
    share = min(0.01, _FALSE * images / len(others))
    decades = math.log10(0.01 / share)
    other = math.tanh(few + (few - most) * decades)
    return other, max(_LEAST, other, (other + views) / 2)


def _connected(size: int, pairs: Tensor) -> list[list[int]]:
    """Return the connected components of at least two rows, each sorted."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows = pairs.flatten().unique()
    low, high = torch.searchsorted(rows, pairs).unbind(dim=1)
    graph = coo_array(([1] * len(pairs), (low.numpy(), high.numpy())), shape=(len(rows),) * 2)
    groups: dict[int, list[int]] = {}
    for row, group in zip(rows.tolist(), connected_components(graph)[1].tolist(), strict=True):
        groups.setdefault(group, []).append(row)
    return list(groups.values())


def _describe_group(
    table: EmbeddingTable, source: Source, members: list[int], thumbnails: Tensor
) -> list[dict[str, Any]]:
    """Return the images of a group, the one to keep first."""
    rows = table.rows(members)
    for row, position in zip(rows, members, strict=True):
        image = source[row["index"]].image
        pixels = decode(image, levels=table.levels)
        row |= {"width": pixels.shape[2], "height": pixels.shape[1], "row": position}
        row |= {"sharpness": sharpness(pixels), "bytes": len(encoded_bytes(image))}

    sharpest = max(row["sharpness"] for row in rows)

    def quality(row: dict[str, Any]) -> tuple[float, ...]:
        sharp = row["sharpness"] >= _SHARP * sharpest  # artifacts of JPEG count as sharpness too
        return row["width"] * row["height"], sharp, row["bytes"], -row["index"]

    rows.sort(key=quality, reverse=True)
    order = [row.pop("row") for row in rows]
    same = agreement(thumbnails[order[:1]].expand(len(order), -1, -1), thumbnails[order])
    for row, value in zip(rows, same.tolist(), strict=True):
        row |= {"keep": row is rows[0], "agreement": value}
    return rows


def sharpness(image: Tensor) -> float:
    """Return the standard deviation of the Laplacian of gray levels, over that of the gray levels.

    Args:
        image: uint8 [3, H, W].
    """
    gray = image.float().mean(dim=0)
    if min(gray.shape) < 3:
        return 0.0
    middle = gray[1:-1, 1:-1]
    laplacian = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:] - 4 * middle
    return (laplacian.std(correction=0) / gray.std(correction=0).clamp(min=1)).item()
