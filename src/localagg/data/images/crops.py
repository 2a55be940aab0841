"""Where a view is cut out of its image: boxes of whole batches, from uniform draws.

Two rules for each kind of crop, chosen by ``ViewConfig.augmentation``: torchvision's, and the
reference program's, which differ (docs/data.md has the table). All of it is arithmetic on sizes, so
workers, devices and tests share it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...config import ViewConfig, require_resolved
from ...engine.counter_rng import uniform

TRIES = 10  # how often torchvision's RandomResizedCrop is drawn until it fits
_MORE_TRIES = 90  # on top of these, the reference's sample_distorted_bounding_box: 100 in all
FIXED_SHARE = 7 / 8  # 224 of 256: the crop "fixed" after resizing the shorter side


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
    """The boxes of a batch's training views.

    Args:
        config: augmentation and crop choose the rule; image_size, eval_crop, crop_area and
            crop_aspect are its numbers.
        crop: float64 [B, 10, 4] in 0-1, as ``augment.draw`` gives.
        height: sizes of the images, float64 [B] or scalar.
        width: likewise.

    Returns:
        Whole-pixel boxes.
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
    """The central square, and for ten crops the corners after it.

    Args:
        config: augmentation, eval_crop and (reference) image_size.
        height: sizes of the images, [B].
        width: likewise.
        ten_crop: also the squares up left, up right, down left, down right, in this order, which
            is the reference's; the other five views are the mirrored ones.

    Returns:
        One or five boxes for each image.
    """
    if config.augmentation == "reference":
        size = require_resolved(config.image_size)
        side = _reference_side(
            size, round(size / require_resolved(config.eval_crop)), height, width
        )
        center = _central(side, height, width)
    else:
        center = central_boxes(require_resolved(config.eval_crop), height, width)
        side = center.height
    if not ten_crop:
        return [center]
    zero = torch.zeros_like(side)
    down, right = height - side, width - side
    corners = [(zero, zero), (zero, right), (down, zero), (down, right)]
    return [center, *(Boxes(top, left, side, side) for top, left in corners)]


def central_boxes(share: float, height: Tensor, width: Tensor) -> Boxes:
    """Central squares whose side is ``share`` of the shorter side."""
    height, width = height.to(torch.float64), width.to(torch.float64)
    side = (torch.minimum(height, width) * share).round().clamp(min=1)
    return _central(side, height, width)


def _central(side: Tensor, height: Tensor, width: Tensor) -> Boxes:
    return Boxes(((height - side) / 2).floor(), ((width - side) / 2).floor(), side, side)


# --- torchvision's --------------------------------------------------------------------------------


def _resized(config: ViewConfig, crop: Tensor, height: Tensor, width: Tensor) -> Boxes:
    """RandomResizedCrop. Where ten tries fail: the central crop of the nearest allowed aspect."""
    H, W = height.unsqueeze(1), width.unsqueeze(1)
    low, high = config.crop_area
    area = H * W * (low + (high - low) * crop[..., 0])
    low, high = (math.log(aspect) for aspect in config.crop_aspect)
    aspect = torch.exp(low + (high - low) * crop[..., 1])
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= W) & (h > 0) & (h <= H)
    top = (crop[..., 2] * (H - h + 1)).floor()
    left = (crop[..., 3] * (W - w + 1)).floor()
    drawn = _first_that_fits(fits, top, left, h, w)

    w = torch.minimum(width, (height * config.crop_aspect[1]).round())
    h = torch.minimum(height, (width / config.crop_aspect[0]).round())
    central = Boxes(((height - h) / 2).floor(), ((width - w) / 2).floor(), h, w)
    return _where(fits.any(dim=1), drawn, central)


def _fixed(config: ViewConfig, crop: Tensor, height: Tensor, width: Tensor) -> Boxes:
    """Resize to 256, RandomCrop(224): a square anywhere in the image."""
    side = (torch.minimum(height, width) * FIXED_SHARE).round().clamp(min=1)
    top = (crop[:, 0, 2] * (height - side + 1)).floor()
    left = (crop[:, 0, 3] * (width - side + 1)).floor()
    return Boxes(top, left, side, side)


def _first_that_fits(fits: Tensor, *values: Tensor) -> Boxes:
    first = fits.int().argmax(dim=1, keepdim=True)
    return Boxes(*(value.gather(1, first).squeeze(1) for value in values))


def _where(condition: Tensor, yes: Boxes, no: Boxes) -> Boxes:
    return Boxes(*(torch.where(condition, a, b) for a, b in zip(yes, no, strict=True)))


# --- The reference's ------------------------------------------------------------------------------


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
    side = _reference_side(size, round(size / FIXED_SHARE), height, width)
    low, high = fixed_range(side, height, width)
    top = low.top + (crop[:, 0, 2] * (high.top - low.top)).floor()
    left = low.left + (crop[:, 0, 3] * (high.left - low.left)).floor()
    return Boxes(top, left, side, side)


def fixed_range(side: Tensor, height: Tensor, width: Tensor) -> tuple[Boxes, Boxes]:
    """First boxes, and first boxes beyond the last, of the reference's AlexNet crop."""
    shorter = torch.minimum(height, width)
    top, left = ((height - shorter) / 2).floor(), ((width - shorter) / 2).floor()
    beyond = Boxes(height - side + 1 - top, width - side + 1 - left, side, side)
    return Boxes(top, left, side, side), beyond


def _reference_resized(config: ViewConfig, crop: Tensor, height: Tensor, width: Tensor) -> Boxes:
    """tf.image.sample_distorted_bounding_box, as the reference calls it.

    The aspect is uniform (torchvision's: its logarithm), and the height is uniform between the
    least and the largest that the aspect and the area allow (torchvision's: the area); the last
    row and column are never used by a crop that could be moved. A whole image, drawn or after 100
    failures, becomes a random square of the shorter side. (The reference leaves a gray JPEG's
    whole image as it is, by comparing its one channel with three; not copied.)
    """
    found, drawn = _reference_tries(config, crop, height, width)
    if not found.all():
        rows = (~found).nonzero().squeeze(1)
        key = (crop[rows, 0, 0] * 2**53).long()  # the further draws follow from the first
        more = uniform(key, count=4 * _MORE_TRIES).view(-1, _MORE_TRIES, 4)
        found[rows], again = _reference_tries(config, more, height[rows], width[rows])
        for values, others in zip(drawn, again, strict=True):
            values[rows] = others

    side = torch.minimum(height, width)
    square = Boxes(
        (crop[:, 0, 2] * (height - side + 1)).floor(),
        (crop[:, 0, 3] * (width - side + 1)).floor(),
        side,
        side,
    )
    part = found & ((drawn.height < height) | (drawn.width < width))
    return _where(part, drawn, square)


def _reference_tries(
    config: ViewConfig, crop: Tensor, height: Tensor, width: Tensor
) -> tuple[Tensor, Boxes]:
    """Which images [B] have a try that fits, and their first such crops."""
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
    return fits.any(dim=1), _first_that_fits(fits, top, left, h.double(), w.double())
