"""The reference's VGG16 (its ``vggnet_fx``): batch-norm on each stage's last convolution alone.

The layout is slim's ``vgg_16`` (Simonyan & Zisserman 2015, 1409.1556, configuration D). The last
convolution of each stage, fc6 and fc7 have batch-norm in place of a bias; the others have a bias.
"""

from collections.abc import Iterator

import torch.fx
from torch import Tensor, nn

from .backbone import (
    Backbone,
    Compat,
    average_pool_same,
    check_sides,
    flatten_nhwc,
    initialize_glorot,
    pool_window,
    reference_batch_norm,
)

_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions of each
_ANY = 1 << 31
_SIZES = (
    "vgg16_bn_last",
    "224 to 255",
    "its fc6 reads maps of 7x7 (features of layers 0 to 4 alone work from 16 pixels on)",
)

torch.fx.wrap("check_sides")  # has conditions on sizes, which fx cannot trace


class VGG16(Backbone):
    """Layers "0".."4", the last map of each stage before its max-pool, and "fc6", "fc7".

    Images of 224 to 255 pixels a side; "0" to "4" alone of any size from 16.
    """

    channels = 4096

    def __init__(self) -> None:
        super().__init__()
        layers = ("0", "1", "2", "3", "4", "fc6", "fc7")
        self.layer_modules = {layer: f"relus.{layer}" for layer in layers}
        self.convs, self.norms = nn.ModuleDict(), nn.ModuleDict()
        self.relus, self.pool = nn.ModuleDict(), nn.MaxPool2d(2)
        channels = 3
        for stage, (width, count) in enumerate(_STAGES, start=1):
            for number in range(1, count + 1):
                final = number == count
                self._add(f"conv{stage}_{number}", channels, width, 3, padding=1, norm=final)
                channels = width
        self._add("fc6", channels, 4096, 7, padding=0, norm=True)
        self._add("fc7", 4096, 4096, 1, padding=0, norm=True)

    def _add(
        self, name: str, channels: int, out: int, kernel: int, *, padding: int, norm: bool
    ) -> None:
        self.convs[name] = conv = nn.Conv2d(channels, out, kernel, padding=padding, bias=not norm)
        self.relus[_layer_name(name)] = nn.ReLU()
        initialize_glorot(conv)
        if norm:
            self.norms[name] = reference_batch_norm(out)

    def iterate_maps(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, map [B, C, H, W]) from first to last."""
        images = x
        x = check_sides(x, range(16, _ANY), images, *_SIZES)
        for stage, (_, count) in enumerate(_STAGES, start=1):
            for number in range(1, count + 1):
                x = self._layer(f"conv{stage}_{number}", x)
            yield str(stage - 1), x
            if stage == len(_STAGES):
                x = check_sides(x, range(14, 16), images, *_SIZES)
            x = self.pool(x)
        for name in ("fc6", "fc7"):
            x = self._layer(name, x)
            yield name, x

    def _layer(self, name: str, x: Tensor) -> Tensor:
        x = self.convs[name](x)
        return self.relus[_layer_name(name)](self.norms[name](x) if name in self.norms else x)

    def flatten_map(self, map_BCHW: Tensor, compat: Compat | None) -> Tensor:
        """Return [B, values] in NHWC order; large maps are averaged first, as in the ResNets.

        Deviation: with ``compat="reference"`` alone they are averaged over width and channels, as
        the reference does by transposing a map that is NHWC already.
        """
        window = pool_window(map_BCHW)
        if compat == "reference" and window > 1:
            map_BCHW = map_BCHW.permute(0, 2, 3, 1)  # flattens to width, channel, height
        return flatten_nhwc(average_pool_same(map_BCHW, window))

    def initialize_head(self, head: nn.Linear) -> None:
        """Set slim's defaults: Glorot's uniform weights, no bias."""
        initialize_glorot(head)


def _layer_name(name: str) -> str:
    """Return the layer of a stage's last convolution; other names stay."""
    layers = {f"conv{n + 1}_{count}": str(n) for n, (_, count) in enumerate(_STAGES)}
    return layers.get(name, name)
