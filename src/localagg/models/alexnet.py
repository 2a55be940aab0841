"""The reference's AlexNet with batch-norm and without dropout (its ``alexnet_bn_no_drop``).

The layout is slim's ``alexnet_v2`` (Krizhevsky 2014, 1404.5997, one tower, no LRN): every
convolution has a bias and a batch-norm before its ReLU; conv1, the max-pools and fc6 do not pad.
"""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .backbone import Backbone, Compat, flatten_nhwc, reference_norm, truncated_normal_

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


class AlexNet(Backbone):
    """Layers "conv1".."conv5" and "fc6", "fc7" behind their ReLU, and "pool1", "pool2", "pool5".

    Images of 195 to 226 pixels a side; "conv1" to "conv5" alone of any size from 35.
    """

    channels = 4096
    layers = (
        "conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5", "fc6", "fc7"
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleDict({name: nn.Conv2d(*sizes) for name, sizes in _CONVS.items()})
        self.norms = nn.ModuleDict({name: reference_norm(s[1]) for name, s in _CONVS.items()})
        for name, conv in self.convs.items():
            # slim's defaults, except that the reference starts fc6 and fc7 as "one weird trick".
            if name.startswith("conv"):
                nn.init.xavier_uniform_(conv.weight)  # type: ignore[arg-type]
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            else:
                truncated_normal_(conv.weight, 0.005)  # type: ignore[arg-type]
                nn.init.constant_(conv.bias, 0.1)  # type: ignore[arg-type]

    def walk(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The named maps [B, C, H, W] from first to last.

        Raises:
            UserError: images of a size that the layers asked for cannot take.
        """
        height, width = x.shape[2:]
        if min(height, width) < 35:
            raise _wrong_size(height, width)
        for name in self.layers:
            if name == "pool5" and not {*x.shape[2:]} <= {11, 12}:
                raise _wrong_size(height, width)
            if name.startswith("pool"):
                x = F.max_pool2d(x, 3, 2)
            else:
                x = F.relu(self.norms[name](self.convs[name](x)))
            yield name, x

    def readout(self, map_BCHW: Tensor, compat: Compat | None) -> Tensor:
        """[B, values] in NHWC order, never pooled, as in the reference."""
        return flatten_nhwc(map_BCHW)

    def start_head(self, head: nn.Linear) -> None:
        """The reference's fc8: a normal of deviation 0.005 cut at two deviations, no bias."""
        truncated_normal_(head.weight, 0.005)
        nn.init.zeros_(head.bias)


def _wrong_size(height: int, width: int) -> UserError:
    return UserError(
        "TODO",
        f"alexnet_bn takes images of 195 to 226 pixels a side, not of {height}x{width}: its fc6 "
        "reads maps of 5x5 (features of conv1 to conv5 alone work from 35 pixels on).",
    )
