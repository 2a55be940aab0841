"""The reference's sixteen configurations, with its names and numbers.

Its boundaries count steps of ImageNet's 1,281,167 images (10,009 steps of 128 images an epoch,
5,004 of 256). Here they are divided into epochs, which a recipe keeps on other data. Its LA runs
load an IR run of step 100,090, the end of epoch 10; ours run IR first unless ``--start`` is given.
"""

from dataclasses import replace

from ..config import EncoderConfig, ObjectiveConfig, PretrainConfig, TransferConfig, ViewConfig
from .reference_keys import IMAGENET

STEPS = IMAGENET // 128  # 10,009: an epoch of the reference's default batch
_VGG_STEPS = IMAGENET // 256  # 5,004
_IR_EPOCHS = 10
IR_BATCH = 128

# The defaults of its command line (param_setter.py), with IR as the only loss.
DEFAULTS = PretrainConfig(
    encoder=EncoderConfig(model="preact_resnet18"),
    views=ViewConfig(image_size=224, augmentation="reference"),
    objective=ObjectiveConfig(
        temperature=0.07,
        bank_momentum=0.5,
        bank_start="random",
        instance_loss="nce",
        noise=4096,
        neighbors=4096,
        clusters=(10_000,),
    ),
    batch_size=IR_BATCH,
    ir_epochs=_IR_EPOCHS,
    learning_rate=0.03,
    drops=(),
    momentum=0.9,
    weight_decay=1e-4,
    precision="32-true",
    sized_for=IMAGENET,
)


def _ir(model: str) -> PretrainConfig:
    compat = "reference" if model == "alexnet_bn" else None  # its batch-norm decays
    encoder = EncoderConfig(model=model)
    return replace(DEFAULTS, encoder=encoder, epochs=_IR_EPOCHS, compat=compat)


def _la(
    model: str, clusters: tuple[int, ...], drops: tuple[int, int], end: int, steps: int = STEPS
) -> PretrainConfig:
    """Return IR for ten epochs, then LA until step ``end``, in steps of ImageNet."""
    return replace(
        _ir(model),
        objective=replace(DEFAULTS.objective, clusters=clusters),
        batch_size=IMAGENET // steps,
        ir_batch_size=IR_BATCH,
        epochs=end // steps,
        drops=tuple(drop / steps for drop in drops),
    )


PRETRAINING: dict[str, PretrainConfig] = {
    "alexnet_IR": _ir("alexnet_bn"),
    "alexnet_LA": _la("alexnet_bn", (30_000,) * 3, (1_190_000, 1_423_100), 1_601_440),
    "vggnet_IR": _ir("vgg16_bn_last"),
    "vggnet_LA": _la("vgg16_bn_last", (10_000,) * 6, (680_681, 790_791), 890_712, _VGG_STEPS),
    "res18_IR": _ir("preact_resnet18"),
    "res18_LA": _la("preact_resnet18", (30_000,) * 10, (1_600_000, 1_873_411), 2_001_800),
    "res50_IR": _ir("preact_resnet50"),
    "res50_LA": _la("preact_resnet50", (30_000,) * 10, (1_522_000, 1_895_857), 2_001_800),
}

PLACES = 2_448_873  # training images of Places205
PLACES_CLASSES = 205
_READOUTS = {
    "alexnet": ("conv1", "conv2", "conv3", "conv4", "conv5"),
    "vggnet": ("0", "1", "2", "3", "4"),
    "res18": ("1", "3", "5", "7", "9"),
    "res50": ("1", "4", "8", "14", "17"),
}
# Steps after the start of the read-outs at which the rate drops, twice, and at which they end.
# (VGG16's count from step 890,712, where its LA run ended.)
_READOUT_STEPS = {
    "alexnet": (450_405, 550_495, 650_585),
    "vggnet": (110_188, 410_458, 510_548),
    "res18": (300_270, 600_540, 700_630),
    "res50": (300_270, 600_540, 700_630),
}
FULL = ViewConfig(image_size=224, augmentation="reference")
CROP_AND_FLIP = replace(FULL, crop="fixed", gray=0.0, jitter=(0.0, 0.0, 0.0, 0.0))


def _readout(network: str, images: int) -> TransferConfig:
    """Return the read-outs of a network in epochs of ``images``, the last one rounded."""
    steps = images // 128
    *drops, end = _READOUT_STEPS[network]
    plain = images == PLACES or network == "alexnet"
    return TransferConfig(
        layers=_READOUTS[network],
        views=CROP_AND_FLIP if plain else FULL,
        epochs=round(end / steps),
        drops=tuple(drop / steps for drop in drops),
        batch_size=128,
        learning_rate=0.01,
        momentum=0.9,
        weight_decay=0.0 if network == "alexnet" else 1e-4,
        ten_crop=True,
        compat="reference" if network == "vggnet" else None,
    )


READOUTS: dict[str, TransferConfig] = {
    f"{prefix}trans_{network}_LA": _readout(network, images)
    for prefix, images in (("", IMAGENET), ("plc_", PLACES))
    for network in _READOUTS
}
