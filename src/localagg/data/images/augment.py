"""Make views of whole batches of pixels, on the device.

Semantics are torchvision's: RandomResizedCrop, RandomGrayscale, ColorJitter (each sample draws its
own order), RandomHorizontalFlip, in this order, as in InstDisc's published pipeline.
``augmentation="reference"`` keeps the order, but uses the reference program's formulas (``crops``,
``reference_views``). Every draw is a function of (seed, epoch, index).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...config import ViewConfig, require_resolved
from ...engine.counter_rng import VIEW, uniform
from ...io.machine import keep_freed_memory
from . import reference_views
from .crops import TRIES, Boxes, crop_boxes, evaluation_boxes

_GRAY = (0.299, 0.587, 0.114)  # ITU-R 601-2, torchvision's rgb_to_grayscale


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
    """int64 [B, 4]: numbers of the color operations in the order of each sample; 4: none."""


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


# --- Random views ---------------------------------------------------------------------------------


class Augment:
    """Make the random views of batches; ``cropped``: workers have already cropped the images."""

    def __init__(self, config: ViewConfig, seed: int, *, cropped: bool = False) -> None:
        self.config, self.seed, self.cropped = config, seed, cropped
        keep_freed_memory()

    def __call__(
        self, images: Tensor, epoch: int, index: Tensor, uniforms: Tensor | None = None
    ) -> Tensor:
        """Return views float32 [B, 3, S, S] in 0-1 of images uint8 [B, 3, H, W], on their device.

        ``index`` int64 [B] are the samples; ``uniforms`` their draws, by default drawn here.
        """
        if uniforms is None:
            uniforms = view_uniforms(self.seed, epoch, index.cpu())
        draws = view_draws(self.config, uniforms)
        return random_views(images, draws, self.config, cropped=self.cropped)


def random_views(
    images: Tensor,
    draws: ViewDraws,
    config: ViewConfig,
    *,
    cropped: bool = False,
    alone_above: int = 2**15,
    chunk_values: int = 2**19,
) -> Tensor:
    """Return the views that the draws describe; see :class:`Augment`.

    A CPU processes a batch in chunks that stay in its cache from one operation to the next; no view
    depends on them. Views of more than ``alone_above`` values are processed one at a time, which
    also spares sorting them by operation; others in chunks of ``chunk_values`` values.
    """
    size = require_resolved(config.image_size)
    views = torch.empty(len(images), 3, size, size, device=images.device)
    if config.augmentation == "torchvision":
        # Saturation and hue do not change gray views, except for rounding.
        color = (draws.order >= 2) & draws.gray.unsqueeze(1)
        draws = draws._replace(order=draws.order.masked_fill(color, 4))
    values = views.shape[1:].numel()
    step = 1 if values > alone_above else max(1, chunk_values // values)
    if views.device.type != "cpu":
        step = len(views)
    for first in range(0, len(views), step):
        part = slice(first, first + step)
        part_draws = ViewDraws(*(drawn[part] for drawn in draws))
        _write_views(views[part], images[part], part_draws, config, cropped)
    return views


def _write_views(
    views: Tensor, images: Tensor, draws: ViewDraws, config: ViewConfig, cropped: bool
) -> None:
    reference = config.augmentation == "reference"  # levels throughout, 0-1 only at the end
    if cropped:
        views.copy_(_flipped(images, draws.flip))
    else:
        height, width = torch.tensor(images.shape[2]), torch.tensor(images.shape[3])
        boxes, size = crop_boxes(config, draws.crop, height, width), views.shape[2]
        if reference:
            resized = reference_views.resample(images, boxes, size)
            views.copy_(_flipped(resized, draws.flip))
        else:
            views.copy_(resample(images, boxes, size, draws.flip))
    if not reference:
        views.div_(255)
    if config.gray:
        _apply_gray(views, draws.gray, reference_views.grayscale if reference else grayscale)
    operations = reference_views.JITTER if reference else JITTER
    color_jitter(views, draws.factors, draws.order, config.jitter, operations)
    if reference:
        views.div_(255)


def _flipped(images: Tensor, flip: Tensor) -> Tensor:
    """Images of the same type, those to flip mirrored."""
    if not flip.any():
        return images
    if flip.all():
        return images.flip(3)
    return torch.where(flip.to(images.device).view(-1, 1, 1, 1), images.flip(3), images)


def _apply_gray(views: Tensor, gray: Tensor, luma: Callable[[Tensor], Tensor]) -> None:
    if len(views) == 1:  # without the cost of selecting it
        if gray[0]:
            views.copy_(luma(views))
    elif len(rows := gray.nonzero().squeeze(1)):
        rows = rows.to(views.device)
        views.index_copy_(0, rows, luma(views.index_select(0, rows)).expand(-1, 3, -1, -1))


# --- Crop and resize ------------------------------------------------------------------------------


def resample(images: Tensor, boxes: Boxes, size: int, flip: Tensor | None = None) -> Tensor:
    """Crop, resize (bilinear, antialiased) and flip a batch, as two batched matrix products.

    The weights are Pillow's and torchvision's (``antialias=True``): a triangle as wide as the
    scale, cut at the box and normalized.

    Args:
        images: uint8 or float [B, 3, H, W].
        boxes: one for each image.
        size: side of the result, which is float32 [B, 3, size, size] on the images' scale.
        flip: bool [B], the results to mirror.
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
    """float32 weights [B, size, source] of the source's pixels in each output pixel."""
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    scale = length / size
    reach = scale.clamp(min=1)
    out = torch.arange(size, dtype=torch.float64).view(1, -1, 1) + 0.5
    pixel = torch.arange(source, dtype=torch.float64).view(1, 1, -1) + 0.5
    inside = (pixel > start) & (pixel < start + length)
    # Distances of far pixels need double precision; their remainders fit single precision.
    weights = torch.empty(len(start), size, source)
    torch.sub(pixel / reach, (start + out * scale) / reach, out=weights)
    weights = torch.rsub(weights.abs_(), 1).clamp_(min=0).mul_(inside)
    return weights.div_(weights.sum(dim=2, keepdim=True))


# --- Color, each on float [B, 3, H, W] in 0-1 with one factor a sample [B] ------------------------

# All overwrite the images and return them. They avoid ``where`` and ``%``, which on CPUs cost as
# much as twenty sums.


def grayscale(images: Tensor) -> Tensor:
    """Return the luma [B, 1, H, W]; the images stay as they are."""
    red, green, blue = images.split(1, dim=1)
    return (red * _GRAY[0]).add_(green, alpha=_GRAY[1]).add_(blue, alpha=_GRAY[2])


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale values, and clip."""
    return images.mul_(factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from the mean luma, and clip."""
    factor = factor.view(-1, 1, 1, 1)
    mean = grayscale(images.mean(dim=(2, 3), keepdim=True))
    return images.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from each pixel's luma, and clip."""
    factor = factor.view(-1, 1, 1, 1)
    luma = grayscale(images).mul_(1 - factor)
    return torch.addcmul(luma, images, factor, out=images).clamp_(0, 1)


def hue(images: Tensor, turns: Tensor) -> Tensor:
    """Shift the HSV hue by ``turns`` in -1..1 (1 is a full circle).

    The hue, as an angle from red, is 1 + (green + blue - red - low) / chroma sixths of a turn, to
    the side of green or of blue, whichever is larger; this is HSV's formula in all six sextants.
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
JITTER = (brightness, contrast, saturation, hue)  # in the order of ViewConfig.jitter


def color_jitter(
    images: Tensor,
    factors: Tensor,
    order: Tensor,
    strength: Sequence[float],
    operations: Sequence[Operation] = JITTER,
) -> Tensor:
    """Apply the four color operations in each sample's own order, except those of strength 0.

    Args:
        images: float [B, 3, H, W] in 0-1, overwritten.
        factors: float [B, 4].
        order: int64 [B, 4] of numbers 0-3, or 4 for no operation; on the CPU.
        strength: of the configuration.
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
    # Each turn moves samples of the same operation next to each other, so none is selected.
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


# --- Fixed views ----------------------------------------------------------------------------------


def evaluation_view(images: Tensor, config: ViewConfig) -> Tensor:
    """Return the evaluation view: the central square of side ``eval_crop``, resized.

    With ``augmentation="reference"`` it is the reference's ``resnet_validate``: its box, its area
    resize, truncated to whole levels. Images are uint8 [B, 3, H, W], views float32 [B, 3, S, S] in
    0-1; ``config`` gives augmentation, image_size and eval_crop.
    """
    if config.eval_crop == 1 and images.shape[2:] == (config.image_size, config.image_size):
        return images.float() / 255
    return _fixed_views(images, config, ten_crop=False)[:, 0]


def ten_crop_views(images: Tensor, config: ViewConfig) -> Tensor:
    """Return ten views float32 [B, 10, 3, S, S] in 0-1, with squares as in :func:`evaluation_view`.

    The order is the reference's: center, up left, up right, down left, down right, then these five
    mirrored. (torchvision's TenCrop puts the center fifth.)
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
