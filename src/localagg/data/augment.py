"""Pixels to views, a whole batch at a time on the device.

Semantics are torchvision's: RandomResizedCrop, RandomGrayscale, ColorJitter (each sample draws its
own order), RandomHorizontalFlip, in that order, as in InstDisc's published pipeline. Every draw is
a function of (seed, epoch, index). Images are float [B, 3, H, W] in 0-1 once a view begins.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import ViewConfig, known
from ..draws import VIEW, uniform

_CROP_TRIES = 10  # torchvision's RandomResizedCrop, before it falls back to a central crop
_GRAY = (0.299, 0.587, 0.114)  # ITU-R 601-2, torchvision's rgb_to_grayscale


class Boxes(NamedTuple):
    """Crops of a batch in pixels, float64 [B] each."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


class Parameters(NamedTuple):
    """All that is random about the views of a batch, on the CPU."""

    crop: Tensor
    """float64 [B, 10, 4]: area, log aspect, top, left of each try, in 0-1."""
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
    crops = 4 * _CROP_TRIES
    u = uniform(seed, VIEW, epoch, index.cpu(), count=crops + 10)
    color = u[:, crops:]
    strength = torch.tensor(config.jitter, dtype=torch.float64)
    factors = (2 * color[:, 2:6] - 1) * strength
    factors[:, :3] += 1
    return Parameters(
        crop=u[:, :crops].view(-1, _CROP_TRIES, 4),
        gray=color[:, 0] < config.gray,
        flip=color[:, 1] < config.flip,
        factors=factors.float(),
        order=color[:, 6:10].argsort(dim=1),
    )


def crop_boxes(config: ViewConfig, crop: Tensor, height: Tensor, width: Tensor) -> Boxes:
    """The boxes of torchvision's RandomResizedCrop, from uniform draws.

    Args:
        config: crop_area and crop_aspect.
        crop: float64 [B, 10, 4] in 0-1, as :func:`draw` gives.
        height: sizes of the images, float64 [B] or scalar.
        width: likewise.

    Returns:
        Whole-pixel boxes. An image where ten tries fail gets the central crop whose aspect is the
        nearest allowed one.
    """
    H, W = (size.to(torch.float64).expand(len(crop)).unsqueeze(1) for size in (height, width))
    low, high = config.crop_area
    area = H * W * (low + (high - low) * crop[..., 0])
    low, high = (math.log(aspect) for aspect in config.crop_aspect)
    aspect = torch.exp(low + (high - low) * crop[..., 1])
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= W) & (h > 0) & (h <= H)
    top = (crop[..., 2] * (H - h + 1)).floor()
    left = (crop[..., 3] * (W - w + 1)).floor()
    first = fits.int().argmax(dim=1, keepdim=True)
    chosen = [value.gather(1, first).squeeze(1) for value in (top, left, h, w)]

    H, W = H.squeeze(1), W.squeeze(1)
    w = torch.minimum(W, (H * config.crop_aspect[1]).round())
    h = torch.minimum(H, (W / config.crop_aspect[0]).round())
    central = [((H - h) / 2).floor(), ((W - w) / 2).floor(), h, w]
    some = fits.any(dim=1)
    return Boxes(*(torch.where(some, a, b) for a, b in zip(chosen, central, strict=True)))


def central_boxes(share: float, height: Tensor, width: Tensor) -> Boxes:
    """Central squares whose side is ``share`` of the shorter side."""
    height, width = height.to(torch.float64), width.to(torch.float64)
    side = (torch.minimum(height, width) * share).round().clamp(min=1)
    return Boxes(((height - side) / 2).floor(), ((width - side) / 2).floor(), side, side)


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


_JITTER = (brightness, contrast, saturation, hue)


def color_jitter(images: Tensor, factors: Tensor, order: Tensor, strength: tuple) -> Tensor:
    """The four color operations, in each sample's own order; those of strength 0 are left out.

    Args:
        images: float [B, 3, H, W] in 0-1, overwritten.
        factors: float [B, 4].
        order: int64 [B, 4], on the CPU.
        strength: of the configuration, to know what is switched off.
    """
    for turn in range(4):
        for number, operation in enumerate(_JITTER):
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
        views = images.float() / 255
        if self.cropped:
            flip = chosen.flip.to(views.device).view(-1, 1, 1, 1)
            views = torch.where(flip, views.flip(3), views)
        else:
            height, width = torch.tensor(images.shape[2]), torch.tensor(images.shape[3])
            boxes = crop_boxes(self.config, chosen.crop, height, width)
            views = resample(views, boxes, known(self.config.image_size), chosen.flip)
        if self.config.gray:
            gray = chosen.gray.nonzero().squeeze(1).to(views.device)
            views[gray] = grayscale(views[gray]).expand(-1, 3, -1, -1)
        return color_jitter(views, chosen.factors, chosen.order, self.config.jitter)


def evaluation_view(images: Tensor, config: ViewConfig) -> Tensor:
    """The one view that is measured: central square of side ``eval_crop``, resized.

    Args:
        images: uint8 [B, 3, H, W].
        config: image_size and eval_crop.

    Returns:
        float32 [B, 3, S, S] in 0-1.
    """
    B, _, H, W = images.shape
    views = images.float() / 255
    if config.eval_crop == 1 and (config.image_size, config.image_size) == (H, W):
        return views
    height, width = torch.full((B,), float(H)), torch.full((B,), float(W))
    boxes = central_boxes(known(config.eval_crop), height, width)
    return resample(views, boxes, known(config.image_size))
