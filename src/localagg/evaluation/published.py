"""Published numbers, and the protocols and data sets that they belong to."""

from typing import NamedTuple

from ..config import ViewConfig

# (training images, held-out images, classes) by which a data set of the literature is recognized.
DATASETS = {
    "CIFAR-10": (50_000, 10_000, 10),
    "ImageNet": (1_281_167, 50_000, 1_000),
}


def dataset_name(training: int, held_out: int, classes: int) -> str | None:
    """The published data set of these counts, or None. A copy with fewer images is none."""
    counts = (training, held_out, classes)
    return next((name for name, known in DATASETS.items() if known == counts), None)


def knn_protocol(
    against: str, views: ViewConfig, *, held_out: bool = True, temperature: float = 0.07
) -> str:
    """The words of a vote of nearest neighbors.

    Args:
        against: who is asked: "the memory bank", "the training images", ...
        views: resolved; how images are shown.
        held_out: whether held-out images ask; else training images ask each other.
        temperature: of the votes' weights (k = 1 does not depend on it).
    """
    asking = "held-out images ask" if held_out else "training images, themselves left out, ask"
    crop = f"central {views.eval_crop:g} at {views.image_size} pixels"
    how = ", cut and resized as in the reference" if views.augmentation == "reference" else ""
    return f"{asking} {against}; votes weigh exp(similarity / {temperature:g}); {crop}{how}"


class Published(NamedTuple):
    """A number of the literature, in the words of our protocols."""

    name: str
    """Method and network."""
    dataset: str
    measure: str
    protocol: str
    value: str
    """Which of an entry's values it stands beside."""
    number: float
    source: str


_BANK = "the memory bank"
_IMAGENET_KNN = knn_protocol(_BANK, ViewConfig(image_size=224, eval_crop=0.875))
_CIFAR_KNN = knn_protocol(_BANK, ViewConfig(image_size=32, eval_crop=1.0))
# Its vote is over the pooled features under the head, and the best epoch by that very vote counts.
_LIGHTLY_KNN = (
    knn_protocol(
        "the training images' backbone features",
        ViewConfig(image_size=32, eval_crop=1.0),
        temperature=0.1,
    )
    + "; best epoch"
)
# What ``transfer.protocol`` says of the recipe trans_res50_LA.
_RES50_LINEAR = (
    "linear heads, frozen; 70 epochs of random views (reference, resized crops); center crop and"
    " ten crops by mean softmax of 0.875 at 224 pixels"
)
_WU = "Wu et al. 2018 (1805.01978)"
_WU_CODE = "Wu et al. 2018, published code (its test takes k = 200)"
_ZHUANG = "Zhuang et al. 2019 (1903.12355)"
_LIGHTLY = "lightly's table, batch 128"

PUBLISHED = (
    Published(
        *("LA, ResNet-50", "ImageNet", "linear", _RES50_LINEAR, "17 ten_crop_top1", 0.602, _ZHUANG)
    ),
    Published("IR, ResNet-18", "ImageNet", "knn", _IMAGENET_KNN, "knn200", 0.410, _WU_CODE),
    Published("IR, ResNet-50", "ImageNet", "knn", _IMAGENET_KNN, "knn200", 0.468, _WU_CODE),
    Published("IR, ResNet-18", "CIFAR-10", "knn", _CIFAR_KNN, "knn200", 0.808, _WU),
    Published("SimCLR, ResNet-18", "CIFAR-10", "knn", _LIGHTLY_KNN, "knn200", 0.847, _LIGHTLY),
    Published("MoCo, ResNet-18", "CIFAR-10", "knn", _LIGHTLY_KNN, "knn200", 0.838, _LIGHTLY),
    Published("BYOL, ResNet-18", "CIFAR-10", "knn", _LIGHTLY_KNN, "knn200", 0.869, _LIGHTLY),
)
