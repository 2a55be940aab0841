"""Names of the variables in TensorFlow checkpoints, by network.

The reference builds its ResNets by ``tf.layers``, which numbers layers as they are created
(``conv2d``, ``conv2d_1``, ..., a block's projection before its other convolutions), AlexNet and VGG
by slim, which names them.

neuroailab/unsup_vvs (Zhuang et al. 2021) names each layer N ``encodeN`` and within blocks
``conv_0``, ..., ``transfer``. The scope of a batch-norm is that of its convolution plus a suffix,
by its options none (the default) or the data set's name, as in ``encode1_imagenet``.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn

from ..errors import UserError
from ..models import Encoder
from ..models.alexnet import AlexNet
from ..models.preact_resnet import PreActResNet
from ..models.vgg import VGG16
from ..models.vvs_resnet import VVSResNet

NETWORKS = (
    "preact_resnet18",
    "preact_resnet50",
    "alexnet_bn",
    "vgg16_bn_last",
    "resnet18_vvs",
    "resnet50_vvs",
)
_SUFFIX = re.compile(r"(?:.*/)?encode1([^/]*)/batch_normalization/gamma")
_BANK = re.compile(r"(?:.*/)?([^/]+)/memory_bank")


class TrainerNames(NamedTuple):
    """Names of the variables that the training keeps beside the network."""

    bank: str
    labels: str
    clusters: str
    step: str = "global_step"


def trainer_names(encoder: Encoder, names: Iterable[str]) -> TrainerNames:
    """Return the trainer's variables of a network, in a file with these names."""
    if not isinstance(encoder.backbone, VVSResNet):
        names = (f"instance/{name}" for name in ("memory_bank", "all_labels", "cluster_labels"))
        return TrainerNames(*names)
    # A data set's name, for LA with "_LA": those of IR lie beside them if LA began from IR.
    scopes = {match[1] for name in names if (match := _BANK.fullmatch(name))}
    scope = min(scopes, key=lambda s: (not s.endswith("_LA"), len(s), s), default="imagenet")
    # "_semi", the semi-supervised variant, has cluster labels of another kind.
    clusters = f"{scope.removesuffix('_LA')}_LA/cluster_labels"
    return TrainerNames(f"{scope}/memory_bank", f"{scope}/all_labels", clusters)


def map_variables(encoder: Encoder, names: Iterable[str] = ()) -> dict[str, str]:
    """Return {variable name: key in the encoder's state dict}.

    Args:
        encoder: one of :data:`NETWORKS`.
        names: those in the file, which show its suffix of batch-norm scopes.

    Raises:
        UserError: another network, or batch-norms of several data sets.
    """
    backbone = encoder.backbone
    if isinstance(backbone, PreActResNet):
        return dict(_resnet_variables(backbone))
    if isinstance(backbone, AlexNet):
        return dict(_alexnet_variables(backbone))
    if isinstance(backbone, VGG16):
        return dict(_vgg_variables(backbone))
    if isinstance(backbone, VVSResNet):
        return dict(_vvs_variables(backbone, _batch_norm_suffix(names)))
    raise UserError(
        "unsupported",
        f"The TensorFlow programs have no network {encoder.spec['model']}; their weights fit"
        f" {', '.join(NETWORKS)}.",
    )


def _resnet_variables(backbone: PreActResNet) -> Iterator[tuple[str, str]]:
    convs = norms = 0
    for key, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            number = f"_{convs}" if convs else ""
            yield f"resnet_model/conv2d{number}/kernel", f"backbone.{key}.weight"
            convs += 1
        elif isinstance(module, nn.BatchNorm2d):
            number = f"_{norms}" if norms else ""
            yield from _batch_norm(f"resnet_model/batch_normalization{number}", f"backbone.{key}")
            norms += 1
    yield "resnet_model/dense/kernel", "head.weight"
    yield "resnet_model/dense/bias", "head.bias"


def _alexnet_variables(backbone: AlexNet) -> Iterator[tuple[str, str]]:
    for name in backbone.convs:
        yield f"alexnet_v2/{name}/weights", f"backbone.convs.{name}.weight"
        yield f"alexnet_v2/{name}/biases", f"backbone.convs.{name}.bias"
        yield from _batch_norm(f"alexnet_v2/{name}", f"backbone.norms.{name}")
    yield "alexnet_v2/fc8/weights", "head.weight"
    yield "alexnet_v2/fc8/biases", "head.bias"


def _vgg_variables(backbone: VGG16) -> Iterator[tuple[str, str]]:
    for name in backbone.convs:
        stage = name.split("_")[0]
        scope = f"vgg_16/{name}"
        if name.startswith("conv"):
            # The reference builds a stage's last convolution as a stage of its own.
            last = name in backbone.norms
            scope = f"vgg_16/{stage}_final/{stage}_final_1" if last else f"vgg_16/{stage}/{name}"
        yield f"{scope}/weights", f"backbone.convs.{name}.weight"
        if name in backbone.norms:
            yield from _batch_norm(f"{scope}/batch_normalization", f"backbone.norms.{name}")
        else:
            yield f"{scope}/biases", f"backbone.convs.{name}.bias"
    yield "vgg_16/fc8/weights", "head.weight"
    yield "vgg_16/fc8/biases", "head.bias"


def _vvs_variables(backbone: VVSResNet, suffix: str) -> Iterator[tuple[str, str]]:
    layers = [("encode1", "stem", "norm")]
    for n, block in enumerate(backbone.blocks):
        scope, key = f"encode{n + 2}", f"blocks.{n}"
        convs = range(len(block.convs))  # type: ignore[arg-type]
        layers += [(f"{scope}/conv_{i}", f"{key}.convs.{i}", f"{key}.norms.{i}") for i in convs]
        if block.project is not None:
            layers.append((f"{scope}/transfer", f"{key}.project", f"{key}.project_norm"))
    for scope, conv, norm in layers:
        yield f"{scope}/weights", f"backbone.{conv}.weight"
        yield f"{scope}/bias", f"backbone.{conv}.bias"
        yield from _batch_norm(f"{scope}{suffix}/batch_normalization", f"backbone.{norm}")
    yield "category2/weights", "head.weight"
    yield "category2/bias", "head.bias"


def _batch_norm(scope: str, key: str) -> Iterator[tuple[str, str]]:
    yield f"{scope}/gamma", f"{key}.weight"
    yield f"{scope}/beta", f"{key}.bias"
    yield f"{scope}/moving_mean", f"{key}.running_mean"
    yield f"{scope}/moving_variance", f"{key}.running_var"


def _batch_norm_suffix(names: Iterable[str]) -> str:
    suffixes = sorted({match[1] for name in names if (match := _SUFFIX.fullmatch(name))})
    if len(suffixes) > 1:
        raise UserError(
            "unsupported",
            "The checkpoint has batch-norms of several data sets,"
            f" {', '.join(f'encode1{suffix}' for suffix in suffixes)}, of which none is preferred;"
            " use a checkpoint of one.",
        )
    return suffixes[0] if suffixes else ""
