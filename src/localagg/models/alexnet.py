"""The reference's AlexNet with batch-norm and without dropout (its ``alexnet_bn_no_drop``).

The layout is slim's ``alexnet_v2`` (Krizhevsky 2014, 1404.5997, one tower, no LRN): every
convolution has a bias and a batch-norm before its ReLU; conv1, the max-pools and fc6 do not pad.
"""

from collections.abc import Iterator

import torch.fx
from torch import Tensor, nn

from .backbone import (
    Backbone,
    Compat,
    check_sides,
    flatten_nhwc,
    initialize_glorot,
    reference_batch_norm,
    truncated_normal_,
)

# name: channels in, out, kernel, stride, padding
_CONVS = {
    "conv1": (3, 64, 11, 4, 0),
    "conv2": (64, 192, 5, 1, 2),
    "conv3": (192, 384, 3, 1, 1),
    "conv4": (384, 384, 3, 1, 1),
    "conv5": (384, 256, 3, 1, 1),
    "fc6": (256, 4096, 5, 1, 0),
    "fc7": (4096, 4096, 1, 1, 0),
}
_ANY = 1 << 31
_SIZES = (
    "alexnet_bn",
    "195 to 226",
    "its fc6 reads maps of 5x5 (features of conv1 to conv5 alone work from 35 pixels on)",
)

torch.fx.wrap("check_sides")  # has conditions on sizes, which fx cannot trace


class AlexNet(Backbone):
    """Layers "conv1".."conv5" and "fc6", "fc7" behind their ReLU, and "pool1", "pool2", "pool5".

    Images of 195 to 226 pixels a side; "conv1" to "conv5" alone of any size from 35.
    """

    channels = 4096

    def __init__(self) -> None:
        super().__init__()
        names = [f"conv{n}" for n in range(1, 6)]
        for n in (5, 2, 1):  # these convolutions have a max-pool behind them
            names.insert(n, f"pool{n}")
        names += ["fc6", "fc7"]
        kinds = ("pools" if name.startswith("pool") else "relus" for name in names)
        self.layer_modules = {n: f"{kind}.{n}" for n, kind in zip(names, kinds, strict=True)}
        convs = {name: nn.Conv2d(*sizes) for name, sizes in _CONVS.items()}
        self.convs = nn.ModuleDict(convs)
        self.norms = nn.ModuleDict({name: reference_batch_norm(s[1]) for name, s in _CONVS.items()})
        self.relus = nn.ModuleDict({name: nn.ReLU() for name in _CONVS})
        self.pools = nn.ModuleDict({f"pool{n}": nn.MaxPool2d(3, 2) for n in (1, 2, 5)})
        for name, conv in convs.items():
            if name.startswith("conv"):
                initialize_glorot(conv)
            else:  # the reference starts fc6 and fc7 as "one weird trick"
                truncated_normal_(conv.weight, 0.005)
                nn.init.constant_(conv.bias, 0.1)  # type: ignore[arg-type]

    def iterate_maps(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, map [B, C, H, W]) from first to last."""
        images = x
        x = check_sides(x, range(35, _ANY), images, *_SIZES)
        for name in self.layers:
            if name == "pool5":
                x = check_sides(x, range(11, 13), images, *_SIZES)
            if name in self.pools:
                x = self.pools[name](x)
            else:
                x = self.relus[name](self.norms[name](self.convs[name](x)))
            yield name, x

    def flatten_map(self, map_BCHW: Tensor, compat: Compat | None) -> Tensor:
        """Return [B, values] in NHWC order, never pooled, as in the reference."""
        return flatten_nhwc(map_BCHW)

    def initialize_head(self, head: nn.Linear) -> None:
        """Initialize as the reference's fc8: normal of deviation 0.005 cut at two, no bias."""
        truncated_normal_(head.weight, 0.005)
        nn.init.zeros_(head.bias)
