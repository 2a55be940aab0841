"""torchvision's ResNets (also ResNeXt and wide ones) as backbones, with named maps."""

from collections.abc import Iterator
from typing import Any

import torchvision
from torch import Tensor, nn

from .backbone import Backbone


class TorchvisionResNet(Backbone):
    """torchvision's ResNet without its classifier; layers "0" (after the max-pool) and "1".."4".

    Args:
        name: one of :func:`torchvision_resnets`; weights are random.
        options: arguments of torchvision's ``ResNet``.
    """

    layers = ("0", "1", "2", "3", "4")

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        resnet: Any = torchvision.models.get_model(name, weights=None, **options)
        self.channels = resnet.fc.in_features
        self.stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
        self.stages = nn.ModuleList([resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4])

    def iterate_maps(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, map [B, C, H, W]) from first to last."""
        x = self.stem(x)
        yield "0", x
        for layer, stage in enumerate(self.stages, start=1):
            x = stage(x)
            yield str(layer), x


def torchvision_resnets() -> list[str]:
    """Return the names that :class:`TorchvisionResNet` takes."""
    return torchvision.models.list_models(include=("resnet*", "resnext*", "wide_resnet*"))
