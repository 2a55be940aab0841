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

from ..config import ViewConfig, known
from ..draws import VIEW, uniform
from . import reference_views
from .crops import TRIES, Boxes, central_boxes, crop_boxes, evaluation_boxes

__all__ = [
    "Augment",
    "Boxes",
    "Parameters",
    "central_boxes",
    "color_jitter",
    "crop_boxes",
    "draw",
    "evaluation_view",
    "resample",
    "ten_crop_views",
]

_GRAY = (0.299, 0.587, 0.114)  # ITU-R 601-2, torchvision's rgb_to_grayscale


class Parameters(NamedTuple):
    """All that is random about the views of a batch, on the CPU."""

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


def draw(config: ViewConfig, seed: int, epoch: int, index: Tensor) -> Parameters:
    """The random parameters of the views of samples ``index`` [B] in ``epoch``."""
    crops = 4 * TRIES
    u = uniform(seed, VIEW, epoch, index.cpu(), count=crops + 10)
    color = u[:, crops:]
    strength = torch.tensor(config.jitter, dtype=torch.float64)
    factors = (2 * color[:, 2:6] - 1) * strength
    factors[:, :3] += 1
    return Parameters(
        crop=u[:, :crops].view(-1, TRIES, 4),
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
        images: float [B, 3, H, W].
        boxes: one for each image.
        size: side of the result.
        flip: bool [B], which results to mirror.

    Returns:
        float [B, 3, size, size].
    """
    rows_BSH = _weights(boxes.top, boxes.height, images.shape[2], size)
    columns_BSW = _weights(boxes.left, boxes.width, images.shape[3], size)
    if flip is not None:
        columns_BSW = torch.where(flip.view(-1, 1, 1), columns_BSW.flip(1), columns_BSW)
    rows_B1SH = rows_BSH.to(images).unsqueeze(1)
    columns_B1WS = columns_BSW.to(images).transpose(1, 2).unsqueeze(1)
    return rows_B1SH @ images @ columns_B1WS


def _weights(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """Weights [B, size, source] by which each output pixel reads the source's pixels."""
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    scale = length / size
    reach = scale.clamp(min=1)
    out = torch.arange(size, dtype=torch.float64).view(1, -1, 1) + 0.5
    pixel = torch.arange(source, dtype=torch.float64).view(1, 1, -1) + 0.5
    triangle = (1 - (pixel - start - out * scale).abs() / reach).clamp(min=0)
    triangle = triangle * ((pixel > start) & (pixel < start + length))
    return triangle / triangle.sum(dim=2, keepdim=True)


# --- Color, each on float [B, 3, H, W] in 0-1 with one factor a sample [B] ------------------------


def grayscale(images: Tensor) -> Tensor:
    """Luma [B, 1, H, W]."""
    red, green, blue = images.unbind(dim=1)
    return (_GRAY[0] * red + _GRAY[1] * green + _GRAY[2] * blue).unsqueeze(1)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scaled values, clipped."""
    return (images * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Distance from the mean luma scaled, clipped."""
    factor = factor.view(-1, 1, 1, 1)
    mean = grayscale(images).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, factor).clamp_(0, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Distance from each pixel's luma scaled, clipped."""
    return torch.lerp(grayscale(images), images, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def hue(images: Tensor, turns: Tensor) -> Tensor:
    """HSV hue shifted by ``turns`` (1 is a full circle)."""
    red, green, blue = images.unbind(dim=1)
    value, low = images.amax(dim=1), images.amin(dim=1)
    chroma = value - low
    divisor = torch.where(chroma > 0, chroma, 1)
    sixths = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    sixths = sixths + 6 * turns.view(-1, 1, 1)
    channels = []
    for offset in (5, 3, 1):  # red, green, blue of the standard closed form for HSV -> RGB
        k = (sixths + offset) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)


Operation = Callable[[Tensor, Tensor], Tensor]
_JITTER = (brightness, contrast, saturation, hue)


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
        order: int64 [B, 4], on the CPU.
        strength: of the configuration, to know what is switched off.
        operations: the four, in the order of ``strength``.
    """
    for turn in range(4):
        for number, operation in enumerate(operations):
            if strength[number] == 0:
                continue
            chosen = (order[:, turn] == number).nonzero().squeeze(1)
            if len(chosen):
                factor = factors[chosen, number].to(images.device)
                chosen = chosen.to(images.device)
                images[chosen] = operation(images[chosen], factor)
    return images


class Augment:
    """Random views of a batch. One object serves a whole run.

    Args:
        config: what is random, and how much.
        seed: of the draws.
        cropped: the images come already cropped and resized (by the workers that decoded them).
    """

    def __init__(self, config: ViewConfig, seed: int, *, cropped: bool = False) -> None:
        self.config, self.seed, self.cropped = config, seed, cropped

    def __call__(self, images: Tensor, epoch: int, index: Tensor) -> Tensor:
        """Views of uint8 images [B, 3, H, W] as float32 [B, 3, S, S] in 0-1, on their device."""
        chosen = draw(self.config, self.seed, epoch, index)
        if self.config.augmentation == "reference":
            return self._reference(images, chosen)
        views = images.float() / 255
        if self.cropped:
            views = _mirrored(views, chosen.flip)
        else:
            boxes = self._boxes(images, chosen)
            views = resample(views, boxes, known(self.config.image_size), chosen.flip)
        if self.config.gray:
            gray = chosen.gray.nonzero().squeeze(1).to(views.device)
            views[gray] = grayscale(views[gray]).expand(-1, 3, -1, -1)
        return color_jitter(views, chosen.factors, chosen.order, self.config.jitter)

    def _reference(self, images: Tensor, chosen: Parameters) -> Tensor:
        """The same by the reference's formulas: levels throughout, 0-1 only at the end."""
        if self.cropped:
            views = images.float()
        else:
            boxes = self._boxes(images, chosen)
            views = reference_views.resample(images, boxes, known(self.config.image_size))
        if self.config.gray:
            gray = chosen.gray.nonzero().squeeze(1).to(views.device)
            views[gray] = reference_views.grayscale(views[gray]).expand(-1, 3, -1, -1)
        strength, operations = self.config.jitter, reference_views.JITTER
        views = color_jitter(views, chosen.factors, chosen.order, strength, operations)
        return _mirrored(views, chosen.flip) / 255

    def _boxes(self, images: Tensor, chosen: Parameters) -> Boxes:
        height, width = torch.tensor(images.shape[2]), torch.tensor(images.shape[3])
        return crop_boxes(self.config, chosen.crop, height, width)


def _mirrored(views: Tensor, flip: Tensor) -> Tensor:
    return torch.where(flip.to(views.device).view(-1, 1, 1, 1), views.flip(3), views)


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
    size = known(config.image_size)
    if config.augmentation == "reference":
        views = [reference_views.resample(images, box, size) / 255 for box in boxes]
    else:
        pixels = images.float() / 255
        views = [resample(pixels, box, size) for box in boxes]
    return torch.stack(views, dim=1)
