"""Pixels to views, a whole batch at a time on the device.

Semantics are torchvision's: RandomResizedCrop, RandomGrayscale, ColorJitter (each sample draws its
own order), RandomHorizontalFlip, in that order, as in InstDisc's published pipeline; or with
``augmentation="reference"`` the reference program's, which follow the same order but other formulas
(``crops``, ``reference_views``). Every draw is a function of (seed, epoch, index). Images are float
[B, 3, H, W] in 0-1 once a view begins.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...config import ViewConfig, require_resolved
from ...engine.counter_rng import VIEW, uniform
from ...io.machine import keep_freed_memory
from . import reference_views
from .crops import TRIES, Boxes, central_boxes, crop_boxes, evaluation_boxes

__all__ = [
    "Augment",
    "Boxes",
    "ViewDraws",
    "central_boxes",
    "color_jitter",
    "crop_boxes",
    "evaluation_view",
    "resample",
    "ten_crop_views",
    "view_draws",
    "view_uniforms",
]

_GRAY = (0.299, 0.587, 0.114)  # ITU-R 601-2, torchvision's rgb_to_grayscale
# A CPU works through a batch in runs that stay in its cache from one operation to the next: images
# of more values than _LARGE one at a time, which also spares picking those of an operation.
_LARGE = 2**15
_RUN = 2**19


class ViewDraws(NamedTuple):
    """All random parameters of the views of a batch, on the CPU."""

    crop: Tensor
    """float64 [B, 10, 4] in 0-1: area (reference: height), aspect, top, left of each try."""
    gray: Tensor
    """bool [B]."""
    flip: Tensor
    """bool [B]."""
    factors: Tensor
    """float32 [B, 4]: brightness, contrast and saturation factors; hue shift in turns."""
    order: Tensor
    """int64 [B, 4]: which of the four comes first, second, ... for each sample."""


def view_uniforms(seed: int, epoch: int, index: Tensor) -> Tensor:
    """Draw float64 [B, 50] in 0-1 for the views of samples ``index`` [B] (on the CPU) in an epoch.

    A batch is drawn once: workers crop by these numbers, and :class:`Augment` reads the others.
    """
    return uniform(seed, VIEW, epoch, index, count=4 * TRIES + 10)


def view_draws(config: ViewConfig, uniforms: Tensor) -> ViewDraws:
    """Convert draws of :func:`view_uniforms` to the parameters of views."""
    color = uniforms[:, 4 * TRIES :]
    strength = torch.tensor(config.jitter, dtype=torch.float64)
    factors = (2 * color[:, 2:6] - 1) * strength
    factors[:, :3] += 1
    return ViewDraws(
        crop=uniforms[:, : 4 * TRIES].view(-1, TRIES, 4),
        gray=color[:, 0] < config.gray,
        flip=color[:, 1] < config.flip,
        factors=factors.float(),
        order=color[:, 6:10].argsort(dim=1),
    )


def resample(images: Tensor, boxes: Boxes, size: int, flip: Tensor | None = None) -> Tensor:
    """Crop, bilinear antialiased resize and mirror of a batch, as two batched matrix products.

    The weights are Pillow's and torchvision's (``antialias=True``): a triangle as wide as the
    scale, cut at the box and normalized.

    Args:
        images: uint8 or float [B, 3, H, W].
        boxes: one for each image.
        size: side of the result.
        flip: bool [B], which results to mirror.

    Returns:
        float32 [B, 3, size, size], on the images' scale.
    """
    B, C, H, W = images.shape
    rows_BSH = _weights(boxes.top, boxes.height, H, size).to(images.device)
    columns_BSW = _weights(boxes.left, boxes.width, W, size).to(images.device)
    if flip is not None:
        flip = flip.to(images.device).view(-1, 1, 1)
        columns_BSW = torch.where(flip, columns_BSW.flip(1), columns_BSW)
    # Channels between rows and columns: then each product is a single one for each image.
    pixels = torch.empty(B, H, C, W, device=images.device).copy_(images.transpose(1, 2))
    pixels = torch.bmm(rows_BSH, pixels.view(B, H, C * W)).view(B, size * C, W)
    pixels = torch.bmm(pixels, columns_BSW.transpose(1, 2))
    return pixels.view(B, size, C, size).transpose(1, 2)


def _weights(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """float32 weights [B, size, source] by which each output pixel reads the source's pixels."""
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    scale = length / size
    reach = scale.clamp(min=1)
    out = torch.arange(size, dtype=torch.float64).view(1, -1, 1) + 0.5
    pixel = torch.arange(source, dtype=torch.float64).view(1, 1, -1) + 0.5
    inside = (pixel > start) & (pixel < start + length)
    # Distances of far pixels in double precision; what is left of them fits single.
    weights = torch.empty(len(start), size, source)
    torch.sub(pixel / reach, (start + out * scale) / reach, out=weights)
    weights = torch.rsub(weights.abs_(), 1).clamp_(min=0).mul_(inside)
    return weights.div_(weights.sum(dim=2, keepdim=True))


# --- Color, each on float [B, 3, H, W] in 0-1 with one factor a sample [B] ------------------------

# All overwrite the images and return them. They are written without ``where`` and ``%``, which on
# CPUs cost as much as twenty sums.


def grayscale(images: Tensor) -> Tensor:
    """Luma [B, 1, H, W]; the images stay as they are."""
    red, green, blue = images.split(1, dim=1)
    return (red * _GRAY[0]).add_(green, alpha=_GRAY[1]).add_(blue, alpha=_GRAY[2])


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scaled values, clipped."""
    return images.mul_(factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Distance from the mean luma scaled, clipped."""
    factor = factor.view(-1, 1, 1, 1)
    mean = grayscale(images.mean(dim=(2, 3), keepdim=True))
    return images.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Distance from each pixel's luma scaled, clipped."""
    factor = factor.view(-1, 1, 1, 1)
    luma = grayscale(images).mul_(1 - factor)
    return torch.addcmul(luma, images, factor, out=images).clamp_(0, 1)


def hue(images: Tensor, turns: Tensor) -> Tensor:
    """HSV hue shifted by ``turns`` in -1..1 (1 is a full circle).

    The hue, as an angle from red, is 1 + (green + blue - red - low) / chroma sixths of a turn, to
    the side of green or of blue, whichever is more; this is HSV's formula in all six sextants.
    """
    red, green, blue = images.split(1, dim=1)
    value = torch.maximum(red, green).maximum(blue)
    low = torch.minimum(red, green).minimum(blue)
    chroma = value - low
    sixfold = chroma * 6
    angle = (green + blue).sub_(red).sub_(low).div_(sixfold.clamp(min=1e-12)).add_(1 / 6)
    angle.copysign_(green - blue)  # in turns
    # A channel lacks all chroma within a sixth of a turn of its opposite color, none from two on.
    opposite = torch.tensor([3 / 6, 5 / 6, 1 / 6], device=images.device).view(1, 3, 1, 1)
    away = angle + (turns.view(-1, 1, 1, 1) - opposite + 2.5)  # positive, and a half too much
    # A little less than a sixth each way keeps rounding within 0-1, where clipping costs a tenth.
    away = away.frac_().sub_(0.5).abs_().clamp_(1 / 6 + 1e-7, 2 / 6 - 1e-7)
    return torch.addcmul(torch.sub(value, chroma, alpha=2), away, sixfold, out=images)


Operation = Callable[[Tensor, Tensor], Tensor]
_JITTER = (brightness, contrast, saturation, hue)
_NOTHING = 4  # a fifth


def color_jitter(
    images: Tensor,
    factors: Tensor,
    order: Tensor,
    strength: Sequence[float],
    operations: Sequence[Operation] = _JITTER,
) -> Tensor:
    """The four color operations, in each sample's own order; those of strength 0 are left out.

    Args:
        images: float [B, 3, H, W] in 0-1, overwritten.
        factors: float [B, 4].
        order: int64 [B, 4] of numbers 0-3, or 4 for none of the four; on the CPU.
        strength: of the configuration, to know what is switched off.
        operations: the four, in the order of ``strength``.
    """
    if not any(strength):
        return images
    factors = factors.to(images.device)
    strength = *strength, 0.0
    if len(images) == 1:
        for number in order[0].tolist():
            if strength[number]:
                images.copy_(operations[number](images, factors[:, number]))
        return images
    # In each turn samples of the same operation are moved beside each other; no sample is picked.
    place = torch.arange(len(images))
    sorted_images = images
    for turn in range(4):
        sample = order[:, turn].argsort(stable=True)
        sorted_images = sorted_images.index_select(0, place[sample].to(images.device))
        place[sample] = torch.arange(len(images))
        counts = order[:, turn].bincount(minlength=5).tolist()
        parts = zip(
            sorted_images.split(counts), sample.to(images.device).split(counts), strict=True
        )
        for number, (part, rows) in enumerate(parts):
            if strength[number] and len(part):
                part.copy_(operations[number](part, factors[rows, number]))
    return torch.index_select(sorted_images, 0, place.to(images.device), out=images)


class Augment:
    """Random views of a batch. One object serves a whole run.

    Args:
        config: what is random, and how much.
        seed: of the draws.
        cropped: the images come already cropped and resized (by the workers that decoded them).
    """

    def __init__(self, config: ViewConfig, seed: int, *, cropped: bool = False) -> None:
        self.config, self.seed, self.cropped = config, seed, cropped
        keep_freed_memory()

    def __call__(
        self, images: Tensor, epoch: int, index: Tensor, uniforms: Tensor | None = None
    ) -> Tensor:
        """Return random views of a batch.

        Args:
            images: uint8 [B, 3, H, W].
            epoch: the epoch, from 0.
            index: int64 [B], the samples.
            uniforms: the batch's :func:`view_uniforms`; default: drawn here.

        Returns:
            float32 [B, 3, S, S] in 0-1, on the device of the images.
        """
        if uniforms is None:
            uniforms = view_uniforms(self.seed, epoch, index.cpu())
        chosen = view_draws(self.config, uniforms)
        size = require_resolved(self.config.image_size)
        views = torch.empty(len(images), 3, size, size, device=images.device)
        make = self._reference
        if self.config.augmentation == "torchvision":
            make, chosen = self._torchvision, _spared(chosen)
        for part in _parts(views):
            make(images[part], ViewDraws(*(drawn[part] for drawn in chosen)), views[part])
        return views

    def _torchvision(self, images: Tensor, chosen: ViewDraws, views: Tensor) -> None:
        if self.cropped:
            views.copy_(_mirrored(images, chosen.flip)).div_(255)
        else:
            boxes = self._boxes(images, chosen)
            views.copy_(resample(images, boxes, views.shape[2], chosen.flip)).div_(255)
        if self.config.gray:
            _apply_gray(views, chosen.gray, grayscale)
        color_jitter(views, chosen.factors, chosen.order, self.config.jitter)

    def _reference(self, images: Tensor, chosen: ViewDraws, views: Tensor) -> None:
        """The same by the reference's formulas: levels throughout, 0-1 only at the end."""
        if self.cropped:
            views.copy_(_mirrored(images, chosen.flip))
        else:
            boxes = self._boxes(images, chosen)
            resized = reference_views.resample(images, boxes, views.shape[2])
            views.copy_(_mirrored(resized, chosen.flip))
        if self.config.gray:
            _apply_gray(views, chosen.gray, reference_views.grayscale)
        strength, operations = self.config.jitter, reference_views.JITTER
        color_jitter(views, chosen.factors, chosen.order, strength, operations).div_(255)

    def _boxes(self, images: Tensor, chosen: ViewDraws) -> Boxes:
        height, width = torch.tensor(images.shape[2]), torch.tensor(images.shape[3])
        return crop_boxes(self.config, chosen.crop, height, width)


def _spared(chosen: ViewDraws) -> ViewDraws:
    """Without saturation and hue for gray views: half of the time, to change their rounding."""
    of_color = (chosen.order >= 2) & chosen.gray.unsqueeze(1)
    return chosen._replace(order=chosen.order.masked_fill(of_color, _NOTHING))


def _parts(views: Tensor) -> list[slice]:
    """The runs of samples that are worked on together; the views are the same for any."""
    if views.device.type != "cpu":
        return [slice(0, len(views))]
    values = views.shape[1:].numel()
    step = 1 if values > _LARGE else max(1, _RUN // values)
    return [slice(first, first + step) for first in range(0, len(views), step)]


def _mirrored(images: Tensor, flip: Tensor) -> Tensor:
    """The images, those to flip mirrored; of their type."""
    if len(images) == 1:
        return images.flip(3) if flip[0] else images
    if not flip.any():
        return images
    if flip.all():
        return images.flip(3)
    return torch.where(flip.to(images.device).view(-1, 1, 1, 1), images.flip(3), images)


def _apply_gray(views: Tensor, gray: Tensor, luma: Callable[[Tensor], Tensor]) -> None:
    if len(views) == 1:  # no need to pick it
        if gray[0]:
            views.copy_(luma(views))
    elif len(rows := gray.nonzero().squeeze(1)):
        rows = rows.to(views.device)
        views.index_copy_(0, rows, luma(views.index_select(0, rows)).expand(-1, 3, -1, -1))


def evaluation_view(images: Tensor, config: ViewConfig) -> Tensor:
    """The one view that is measured: central square of side ``eval_crop``, resized.

    With ``augmentation="reference"`` it is the reference's ``resnet_validate``: its box, its area
    resize, truncated to whole levels.

    Args:
        images: uint8 [B, 3, H, W].
        config: augmentation, image_size and eval_crop.

    Returns:
        float32 [B, 3, S, S] in 0-1.
    """
    if config.eval_crop == 1 and images.shape[2:] == (config.image_size, config.image_size):
        return images.float() / 255
    return _fixed_views(images, config, ten_crop=False)[:, 0]


def ten_crop_views(images: Tensor, config: ViewConfig) -> Tensor:
    """The ten views of ten-crop evaluation: center, the four corners, and these five mirrored.

    The order is the reference's: center, up left, up right, down left, down right. (torchvision's
    TenCrop puts the center fifth.)

    Args:
        images: uint8 [B, 3, H, W].
        config: augmentation, image_size and eval_crop; the squares are as large as in
            :func:`evaluation_view`.

    Returns:
        float32 [B, 10, 3, S, S] in 0-1.
    """
    five = _fixed_views(images, config, ten_crop=True)
    return torch.cat([five, five.flip(4)], dim=1)


def _fixed_views(images: Tensor, config: ViewConfig, ten_crop: bool) -> Tensor:
    B, _, H, W = images.shape
    height, width = torch.full((B,), float(H)), torch.full((B,), float(W))
    boxes = evaluation_boxes(config, height, width, ten_crop=ten_crop)
    size = require_resolved(config.image_size)
    if config.augmentation == "reference":
        views = [reference_views.resample(images, box, size) / 255 for box in boxes]
    else:
        pixels = images.float() / 255
        views = [resample(pixels, box, size) for box in boxes]
    return torch.stack(views, dim=1)
