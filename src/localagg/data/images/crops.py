"""Compute crop boxes of whole batches from uniform draws, by arithmetic on image sizes.

``ViewConfig.augmentation`` selects torchvision's rules or the reference program's, which differ
(docs/data.md has the table).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...config import ViewConfig, require_resolved
from ...engine.counter_rng import uniform

TRIES = 10  # of torchvision's RandomResizedCrop, until a crop fits
_MORE_TRIES = 90  # in addition, of the reference's sample_distorted_bounding_box: 100 in all
_FIXED_SHARE = 7 / 8  # 224 of 256: the crop "fixed" after resizing the shorter side


class Boxes(NamedTuple):
    """Crops of a batch in pixels, float64 [B] each."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor

    def corners(self) -> Tensor:
        """Return int64 [B, 4]: left, top, right, bottom."""
        right, bottom = self.left + self.width, self.top + self.height
        return torch.stack([self.left, self.top, right, bottom], dim=1).long()


def crop_boxes(config: ViewConfig, crop: Tensor, height: Tensor, width: Tensor) -> Boxes:
    """Return the whole-pixel boxes of a batch's training views.

    Args:
        config: augmentation and crop select the rule; image_size, eval_crop, crop_area and
            crop_aspect are its parameters.
        crop: float64 [B, 10, 4] in 0-1, from ``augment.view_draws``.
        height: heights of the images, float64 [B] or scalar.
        width: their widths.
    """
    height, width = (size.to(torch.float64).expand(len(crop)) for size in (height, width))
    if config.crop == "center":
        return evaluation_boxes(config, height, width)[0]
    rules = {
        ("torchvision", "resized"): _resized,
        ("torchvision", "fixed"): _fixed,
        ("reference", "resized"): _reference_resized,
        ("reference", "fixed"): _reference_fixed,
    }
    return rules[config.augmentation, config.crop](config, crop, height, width)


def evaluation_boxes(
    config: ViewConfig, height: Tensor, width: Tensor, *, ten_crop: bool = False
) -> list[Boxes]:
    """Return the central square; for ten crops also those up left, up right, down left, down right.

    This is the reference's order; the other five of ten views are mirrored.

    Args:
        config: augmentation, eval_crop and (reference) image_size.
        height: heights of the images, [B].
        width: their widths.
        ten_crop: return five boxes for each image instead of one.
    """
    share = require_resolved(config.eval_crop)
    if config.augmentation == "reference":
        size = require_resolved(config.image_size)
        side = _reference_side(size, round(size / share), height, width)
    else:
        height, width = height.to(torch.float64), width.to(torch.float64)
        side = (torch.minimum(height, width) * share).round().clamp(min=1)
    down, right, zero = height - side, width - side, torch.zeros_like(side)
    center = Boxes((down / 2).floor(), (right / 2).floor(), side, side)
    if not ten_crop:
        return [center]
    corners = [(zero, zero), (zero, right), (down, zero), (down, right)]
    return [center, *(Boxes(top, left, side, side) for top, left in corners)]


def _first_fitting(fits: Tensor, *values: Tensor) -> Boxes:
    first = fits.int().argmax(dim=1, keepdim=True)
    return Boxes(*(value.gather(1, first).squeeze(1) for value in values))


def _where(condition: Tensor, yes: Boxes, no: Boxes) -> Boxes:
    return Boxes(*(torch.where(condition, a, b) for a, b in zip(yes, no, strict=True)))


def _square(crop: Tensor, side: Tensor, height: Tensor, width: Tensor) -> Boxes:
    """Squares anywhere in their images, by the first try's draws."""
    top = (crop[:, 0, 2] * (height - side + 1)).floor()
    left = (crop[:, 0, 3] * (width - side + 1)).floor()
    return Boxes(top, left, side, side)


# --- torchvision's rules --------------------------------------------------------------------------


def _resized(config: ViewConfig, crop: Tensor, height: Tensor, width: Tensor) -> Boxes:
    """RandomResizedCrop. If ten tries fail: the central crop of the nearest allowed aspect."""
    H, W = height.unsqueeze(1), width.unsqueeze(1)
    low, high = config.crop_area
    area = H * W * (low + (high - low) * crop[..., 0])
    low, high = (math.log(aspect) for aspect in config.crop_aspect)
    aspect = torch.exp(low + (high - low) * crop[..., 1])
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= W) & (h > 0) & (h <= H)
    top = (crop[..., 2] * (H - h + 1)).floor()
    left = (crop[..., 3] * (W - w + 1)).floor()
    drawn = _first_fitting(fits, top, left, h, w)

    w = torch.minimum(width, (height * config.crop_aspect[1]).round())
    h = torch.minimum(height, (width / config.crop_aspect[0]).round())
    central = Boxes(((height - h) / 2).floor(), ((width - w) / 2).floor(), h, w)
    return _where(fits.any(dim=1), drawn, central)


def _fixed(_: ViewConfig, crop: Tensor, height: Tensor, width: Tensor) -> Boxes:
    """Resize to 256, RandomCrop(224): a square anywhere in the image."""
    side = (torch.minimum(height, width) * _FIXED_SHARE).round().clamp(min=1)
    return _square(crop, side, height, width)


# --- The reference's rules ------------------------------------------------------------------------


def _reference_side(size: int, smallest: int, height: Tensor, width: Tensor) -> Tensor:
    """Side of the square that a crop of ``size`` covers once the shorter side is ``smallest``.

    Single precision, then truncation, as in the reference: a shorter side of 120 gives 104 for 224
    of 256, not 105. At least 1 (the reference fails on an image of one pixel).
    """
    shorter = torch.minimum(height, width).to(torch.float32)
    scale = torch.tensor(float(smallest)) / shorter
    return (torch.tensor(float(size)) / scale).floor().clamp(min=1).to(torch.float64)


def _reference_fixed(config: ViewConfig, crop: Tensor, height: Tensor, width: Tensor) -> Boxes:
    """The reference's AlexNet crop: resize to 256, a random 224 inside the central square."""
    size = require_resolved(config.image_size)
    side = _reference_side(size, round(size / _FIXED_SHARE), height, width)
    shorter = torch.minimum(height, width)
    first_top, first_left = ((height - shorter) / 2).floor(), ((width - shorter) / 2).floor()
    tops, lefts = height - side + 1 - 2 * first_top, width - side + 1 - 2 * first_left
    top = first_top + (crop[:, 0, 2] * tops).floor()
    left = first_left + (crop[:, 0, 3] * lefts).floor()
    return Boxes(top, left, side, side)


def _reference_resized(config: ViewConfig, crop: Tensor, height: Tensor, width: Tensor) -> Boxes:
    """tf.image.sample_distorted_bounding_box, as the reference calls it.

    The aspect is uniform (torchvision's: its logarithm). The height is uniform between the least
    and the largest that aspect and area allow (torchvision's: the area). A crop that could be moved
    never uses the last row and column. A whole image, drawn or after 100 failures, becomes a random
    square of the shorter side. (The reference leaves a gray JPEG's whole image as it is, by
    comparing its one channel with three; not copied.)
    """
    found, drawn = _reference_tries(config, crop, height, width)
    if not found.all():
        rows = (~found).nonzero().squeeze(1)
        key = (crop[rows, 0, 0] * 2**53).long()  # further draws follow from the first
        more = uniform(key, count=4 * _MORE_TRIES).view(-1, _MORE_TRIES, 4)
        found[rows], again = _reference_tries(config, more, height[rows], width[rows])
        for values, others in zip(drawn, again, strict=True):
            values[rows] = others
    square = _square(crop, torch.minimum(height, width), height, width)
    part = found & ((drawn.height < height) | (drawn.width < width))
    return _where(part, drawn, square)


def _reference_tries(
    config: ViewConfig, crop: Tensor, height: Tensor, width: Tensor
) -> tuple[Tensor, Boxes]:
    """Return the images [B] with a try that fits, and their first such crops."""
    H, W = height.unsqueeze(1).float(), width.unsqueeze(1).float()
    least, most = (share * H * W for share in config.crop_area)
    low, high = config.crop_aspect
    aspect = (low + (high - low) * crop[..., 1]).float()

    h, highest = (least / aspect).sqrt().round(), (most / aspect).sqrt().round()
    fitting = ((W + 0.5 - 1e-7) / aspect).floor()
    fitting = fitting - ((fitting * aspect).round() > W).float()
    highest = torch.where((highest * aspect).round() > W, fitting, highest).minimum(H)
    h = h.minimum(highest)
    h = h + (crop[..., 0] * (highest - h + 1)).floor().float()
    h = h + (h * (h * aspect).round() < least).float()  # rounding may have left the range
    h = h - (h * (h * aspect).round() > most).float()
    w = (h * aspect).round()
    area = h * w
    fits = (area >= least) & (area <= most) & (w > 0) & (w <= W) & (h > 0) & (h <= H)
    top = (crop[..., 2] * (H - h)).floor()
    left = (crop[..., 3] * (W - w)).floor()
    return fits.any(dim=1), _first_fitting(fits, top, left, h.double(), w.double())
