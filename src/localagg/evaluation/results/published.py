"""Published numbers, with the protocols and data sets that they belong to."""

from typing import Any, NamedTuple

from ...config import ViewConfig, override
from ...recipes.builtin import readout_recipe
from .protocols import BANK, knn_protocol, linear_protocol

# (training images, held-out images, classes) that identify a data set of the literature.
DATASETS = {
    "CIFAR-10": (50_000, 10_000, 10),
    "ImageNet": (1_281_167, 50_000, 1_000),
}


def dataset_name(training: int, held_out: int, classes: int) -> str | None:
    """Return the published data set of these counts, or None; a copy with fewer images is none."""
    counts = (training, held_out, classes)
    return next((name for name, known in DATASETS.items() if known == counts), None)


class PublishedNumber(NamedTuple):
    """A number of the literature."""

    name: str
    """Method and network."""
    dataset: str
    measure: str
    value: str
    """Name of the value in an entry of results.json."""
    protocol: dict[str, Any]
    number: float
    source: str


_IMAGENET_KNN = knn_protocol(BANK, ViewConfig(image_size=224, eval_crop=0.875))
_CIFAR_VIEWS = ViewConfig(image_size=32, eval_crop=1.0)
CIFAR_KNN = knn_protocol(BANK, _CIFAR_VIEWS)
# Lightly votes over the pooled features below the head and reports the best epoch by that vote.
_LIGHTLY_KNN = {
    **knn_protocol("the backbone features of the training images", _CIFAR_VIEWS, temperature=0.1),
    "epoch": "best",
}
_RES50_LINEAR = linear_protocol(
    override(readout_recipe("trans_res50_LA").config, image_size=224, eval_crop=0.875)
)
_KNN = ("knn", "knn200")
_LINEAR = ("linear", "17 ten_crop_top1")
_WU = "Wu et al. 2018 (1805.01978)"
_WU_CODE = "Wu et al. 2018, published code (its test takes k = 200)"
_ZHUANG = "Zhuang et al. 2019 (1903.12355)"
_LIGHTLY = "lightly's table, batch 128"

PUBLISHED = (
    PublishedNumber("LA, ResNet-50", "ImageNet", *_LINEAR, _RES50_LINEAR, 0.602, _ZHUANG),
    PublishedNumber("IR, ResNet-18", "ImageNet", *_KNN, _IMAGENET_KNN, 0.410, _WU_CODE),
    PublishedNumber("IR, ResNet-50", "ImageNet", *_KNN, _IMAGENET_KNN, 0.468, _WU_CODE),
    PublishedNumber("IR, ResNet-18", "CIFAR-10", *_KNN, CIFAR_KNN, 0.808, _WU),
    PublishedNumber("SimCLR, ResNet-18", "CIFAR-10", *_KNN, _LIGHTLY_KNN, 0.847, _LIGHTLY),
    PublishedNumber("MoCo, ResNet-18", "CIFAR-10", *_KNN, _LIGHTLY_KNN, 0.838, _LIGHTLY),
    PublishedNumber("BYOL, ResNet-18", "CIFAR-10", *_KNN, _LIGHTLY_KNN, 0.869, _LIGHTLY),
)
