"""Random views by a function of the user's, such as a transform of torchvision."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...config import ViewConfig, require_resolved
from ...errors import UserError
from ..images.augment import view_uniforms
from ..images.decode import READ_ERRORS, decode, read_error_reason
from ..images.levels import levels_of
from ..sources.source import Source
from .cropping import TrainingBatch

Transform = Callable[[Tensor], Tensor]
"""Maps an image uint8 [3, H, W] to a view [3, S, S], uint8 or floating in 0-1, by torch's draws."""
_OVERSHOOT = 0.25  # by which interpolation may leave 0-1


def own_view_crops(
    source: Source, views: ViewConfig, transform: Transform, seed: int, epoch: int, index: Tensor
) -> tuple[TrainingBatch, dict[int, str]]:
    """Return views float32 [b, 3, S, S] in 0-1 of images ``index``, and {index: reason} of the
    unreadable ones. Torch's generator is seeded by (seed, epoch, index) for each view.

    Raises:
        UserError: see :func:`own_view`.
    """
    uniforms = view_uniforms(seed, epoch, index)
    size = require_resolved(views.image_size)
    kept, found, unreadable = [], [], {}
    for row, i in enumerate(index.tolist()):
        try:
            image = _decode(source, views, i)
        except READ_ERRORS as error:
            unreadable[i] = read_error_reason(error)
            continue
        found.append(own_view(transform, image, float(uniforms[row, 0]), size))
        kept.append(row)
    stacked = torch.stack(found) if found else torch.empty(0, 3, size, size)
    rows = torch.tensor(kept, dtype=torch.int64)
    return TrainingBatch(index[rows], stacked, uniforms[rows]), unreadable


def first_view(source: Source, views: ViewConfig, transform: Transform) -> Tensor:
    """Return a view of the first readable image, always the same, float32 [3, S, S].

    Raises:
        UserError: none of the first 64 images is readable; or see :func:`own_view`.
    """
    for i in range(min(64, len(source))):
        try:
            image = _decode(source, views, i)
        except READ_ERRORS:
            continue
        return own_view(transform, image, 0.5, views.image_size)
    raise UserError("unreadable-images", f"None of the first images of '{source.uri}' can be read.")


def _decode(source: Source, views: ViewConfig, i: int) -> Tensor:
    upright, levels = views.exif_orientation, levels_of(views)
    return decode(source[i].image, upright=upright, levels=levels)


def own_view(transform: Transform, image: Tensor, draw: float, size: int | None = None) -> Tensor:
    """Return one view float32 [3, S, S] in 0-1.

    Args:
        transform: the user's function.
        image: uint8 [3, H, W].
        draw: 0-1, the seed of torch's generator.
        size: S; default: any.

    Raises:
        UserError: the function returns another shape or dtype, or values that are not in 0-1.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(draw * 2**53))
        view = transform(image)
    if not isinstance(view, Tensor):
        raise UserError(
            "option-invalid",
            f"The views function returns {type(view).__name__}; return a tensor [3, S, S].",
        )
    shape = list(view.shape)
    if len(shape) != 3 or shape[0] != 3 or shape[1] != shape[2] or size not in (None, shape[1]):
        side = "S" if size is None else size
        raise UserError(
            "mismatch",
            f"The views function returns shape {shape}; return [3, {side}, {side}], as large as"
            " image_size.",
        )
    if view.dtype == torch.uint8:
        return view.float() / 255
    low, high = float(view.min()), float(view.max())
    if not view.is_floating_point() or not -_OVERSHOOT <= low <= high <= 1 + _OVERSHOOT:
        raise UserError(
            "option-invalid",
            f"The views function returns {view.dtype} from {low:g} to {high:g}; return uint8, or"
            " floats in 0-1 that are not normalized: the encoder normalizes them.",
        )
    return torch.Tensor(view.float())
