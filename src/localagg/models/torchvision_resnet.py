"""torchvision's ResNet-18 and ResNet-50 as backbones, with named maps."""

import torchvision
from torch import Tensor, nn


class TorchvisionResNet(nn.Module):
    """torchvision's ResNet without its classifier; layers "0" (after the max-pool) and "1".."4"."""

    layers = ("0", "1", "2", "3", "4")

    def __init__(self, resnet: torchvision.models.ResNet) -> None:
        super().__init__()
        self.channels = resnet.fc.in_features
        self.stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
        self.stages = nn.ModuleList([resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4])

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """Maps by name, from first to last."""
        x = self.stem(x)
        maps = {"0": x}
        for layer, stage in enumerate(self.stages, start=1):
            x = stage(x)
            maps[str(layer)] = x
        return maps


def resnet18() -> nn.Module:
    """torchvision's ResNet-18, random weights."""
    return TorchvisionResNet(torchvision.models.resnet18())


def resnet50() -> nn.Module:
    """torchvision's ResNet-50, random weights."""
    return TorchvisionResNet(torchvision.models.resnet50())
