"""Named configurations, each with its command, its machine and the number to expect.

To add a recipe, add an entry to ``RECIPES``.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

from ..config import (
    AdaptConfig,
    EncoderConfig,
    ObjectiveConfig,
    PretrainConfig,
    TransferConfig,
    ViewConfig,
    check_argument_types,
    override,
)
from ..errors import UserError, suggest
from .paper import IMAGENET, PLACES, PRETRAINING, READOUTS
from .schedule import Schedule

Config = TypeVar("Config", PretrainConfig, TransferConfig)


@dataclass(frozen=True)
class Recipe(Generic[Config]):
    """A configuration with its purpose and its cost."""

    config: Config
    about: str
    cost: str


_CIFAR10 = PretrainConfig(
    encoder=EncoderConfig(model="resnet18_small", width=32, blocks=(1, 1, 1, 1), stem_stride=2),
    views=ViewConfig(image_size=32),
    batch_size=128,
    epochs=44,
    ir_epochs=34,
    drops=(39.0, 42.0),
    eval_every=2,
)

RECIPES: dict[str, Recipe[PretrainConfig]] = {
    # localagg pretrain folder --data IMAGES --out RUN
    # derived_settings.py derives all that depends on the number and size of the images.
    "folder": Recipe(
        PretrainConfig(views=ViewConfig(exif_orientation=True)),
        about="any images: K, clusters, epochs, batch and network follow their number and size",
        cost="half an hour on a CPU, or --minutes; derived options are printed before the run",
    ),
    # localagg demo, or: localagg pretrain digits --data digits --out RUN
    # 2 CPU cores, 25 s. Held-out 1-NN 0.97-0.99, k-means NMI 0.83-0.86 (seeds 0, 1, 2 in
    # benchmarks/results/digits.md). Digits have no color, and a mirrored digit is another sign.
    # Three stages halve the side twice, so the 8 x 8 images are enlarged to 16 x 16.
    # LA merges best with few clusters and half of the images as background: 15 clusters and
    # K = 700 gave an NMI of 0.86, 60 clusters 0.70.
    "digits": Recipe(
        PretrainConfig(
            encoder=EncoderConfig(model="resnet18_small", width=32, blocks=(1, 1, 1)),
            views=ViewConfig(
                image_size=16, crop_area=(0.5, 1.0), gray=0.0, jitter=(0.0, 0.0, 0.0, 0.0), flip=0.0
            ),
            objective=ObjectiveConfig(neighbors=700, clusters=(15, 15, 15)),
            epochs=50,
            ir_epochs=20,
            batch_size=32,
            eval_every=2,
        ),
        about="scikit-learn's 1,400 digits of 8 x 8 pixels",
        cost="half a minute on 2 CPU cores",
    ),
    # localagg pretrain cifar10 --data CIFAR10 --out RUN
    # 2 CPU cores, 25 minutes; the curve is in benchmarks/results/cifar10.md. One block a stage and
    # a stem of stride 2 reduce an epoch of IR to 25 s. LA starts late, because neighbors help only
    # once they are pure. From epoch 8 on LA lost to IR alone (44.6 against 49.0 % by 200-NN at
    # epoch 18). From epoch 40 on, with N / 64 clusters, it led after 6 epochs at the first rate
    # (63.1 against 62.0 %, 1-NN 53.7 against 50.0 %).
    "cifar10": Recipe(
        _CIFAR10,
        about="CIFAR-10 on a CPU: 50,000 images of 32 x 32 pixels",
        cost="25 minutes on 2 CPU cores",
    ),
    # localagg pretrain cifar10_gpu --data CIFAR10 --out RUN
    # One GPU, not measured. Network, rates and the 200 epochs of Wu et al.'s CIFAR-10 run (200-NN
    # of 80.8 % by IR); LA starts at 77 % of the epochs, as in the CPU recipe.
    "cifar10_gpu": Recipe(
        PretrainConfig(
            encoder=EncoderConfig(model="resnet18_small"),
            views=ViewConfig(image_size=32),
            batch_size=128,
            epochs=200,
            ir_epochs=155,
            drops=(177.0, 191.0),
            eval_every=5,
        ),
        about="CIFAR-10 on a GPU: ResNet-18 for 200 epochs",
        cost="not measured",
    ),
    # localagg pretrain la_modern --data CIFAR10 --out RUN
    # One CPU core, 13 minutes: the best LA at equal time (docs/results.md). Close neighbors come
    # from 128 near rows, and IR keeps half of the loss, so LA may start early. 200-NN of
    # 57.9 ± 1.2 % over seeds 0, 1, 2, where IR alone has 55.7 ± 0.5 % in the same time. IR among
    # the same 128 neighbors (--instance-share 1) is as good, 58.5 ± 0.3 %.
    "la_modern": Recipe(
        override(
            _CIFAR10,
            width=16,
            neighbors=128,
            instance_share=0.5,
            warm_clusters=True,
            epochs=38,
            ir_epochs=8,
            drops=(35.0, 37.0),
        ),
        about="CIFAR-10 in minutes: LA from early on, among few neighbors, half of its loss IR's",
        cost="13 minutes on a CPU core",
    ),
    # localagg pretrain adapt --data IMAGES --model timm:NAME --weights FILE --out RUN
    "adapt": Recipe(
        PretrainConfig(
            adapt=AdaptConfig(train="head", feature_views=6),
            views=ViewConfig(image_size=112, exif_orientation=True),
            rate_schedule="cosine",
            eval_every=1000,
        ),
        about="your images from a pretrained network: a head on its frozen features",
        cost="minutes on 2 CPU cores for 5,000 images",
    ),
}
READOUT_RECIPES: dict[str, Recipe[TransferConfig]] = {}

# The sixteen configurations of the reference, by its names.
REFERENCE = (*PRETRAINING, *READOUTS)
_NETWORK = {
    "alexnet": "AlexNet with batch-norm",
    "vggnet": "VGG16 with some batch-norm",
    "res18": "PreAct ResNet-18",
    "res50": "PreAct ResNet-50",
}
for _name, _config in PRETRAINING.items():
    _about = f"the reference's {_name}: {_NETWORK[_name.split('_')[0]]} on ImageNet"
    _passes = Schedule(_config, IMAGENET).images_seen / IMAGENET
    RECIPES[_name] = Recipe(_config, _about, f"{_passes:.0f} x {IMAGENET / 1e6:.2f} M")
for _name, _readout in READOUTS.items():
    _images, _where = (PLACES, "Places205") if _name.startswith("plc") else (IMAGENET, "ImageNet")
    _about = f"the reference's {_name}: read-outs of {_NETWORK[_name.split('_')[-2]]} on {_where}"
    _cost = f"{_readout.epochs} x {_images / 1e6:.2f} M"
    READOUT_RECIPES[_name] = Recipe(_readout, _about, _cost)


@check_argument_types
def recipe(name: str) -> Recipe[PretrainConfig]:
    """Return the pretraining recipe of a name.

    Raises:
        UserError: no recipe of this name; the message suggests the closest one.
    """
    if not isinstance(name, str):
        raise UserError("option-invalid", f"The recipe is {name!r}; pass a name such as 'folder'.")
    if name in READOUT_RECIPES:
        raise UserError(
            "option-invalid",
            f"'{name}' configures read-outs, not pretraining; use localagg transfer RUN --recipe"
            f" {name} --data IMAGES.",
        )
    return _find(name, RECIPES)


@check_argument_types
def readout_recipe(name: str) -> Recipe[TransferConfig]:
    """Return the read-out recipe of a name.

    Raises:
        UserError: no recipe of this name; the message suggests the closest one.
    """
    return _find(name, READOUT_RECIPES)


def _find(name: str, recipes: dict[str, Recipe[Config]]) -> Recipe[Config]:
    if name not in recipes:
        raise UserError(
            "option-unknown",
            f"There is no recipe '{name}'; use one of {', '.join(recipes)}."
            f"{suggest(name, recipes)}",
        )
    return recipes[name]
