"""Load the reference program's variables into an encoder and a memory bank.

Here are the variables' names and layouts; :mod:`.tf_checkpoint` reads the file. The reference
builds its ResNets by ``tf.layers``, which numbers layers as they are created (``conv2d``,
``conv2d_1``, ..., a block's projection before its other convolutions), AlexNet and VGG by slim,
which names them.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..bank import MemoryBank
from ..config import check_argument_types
from ..errors import UserError
from ..models import Encoder
from ..models.alexnet import AlexNet
from ..models.preact_resnet import PreActResNet
from ..models.vgg import VGG16
from .tf_checkpoint import TFCheckpoint, open_tf_checkpoint

NETWORKS = ("preact_resnet18", "preact_resnet50", "alexnet_bn", "vgg16_bn_last")
_BANK, _LABELS = "instance/memory_bank", "instance/all_labels"
_CLUSTERS, _STEP = "instance/cluster_labels", "global_step"
_TRAINER = {_BANK, _LABELS, _CLUSTERS, _STEP}


@dataclass(frozen=True)
class LoadReport:
    """Names and values that a checkpoint contributed."""

    matched: tuple[str, ...]
    """Names in the file that the encoder, the bank or this report uses."""
    left: tuple[str, ...]
    """Unused names in the file, optimizer slots among them."""
    missing: tuple[str, ...]
    """Variables of the network that the file lacks; the encoder keeps its own values there."""
    global_step: int | None
    """Training steps done."""
    labels: Tensor | None
    """int64 [N]: class of each image seen so far, by bank row."""
    cluster_labels: Tensor | None
    """int32 [H, N]: the clusterings, as from :func:`localagg.clustering.cluster`."""
    momentum: dict[str, Tensor]
    """``momentum_buffer`` of ``torch.optim.SGD`` by parameter name, for the parameters whose
    ``/Momentum`` slot is in the file."""


@check_argument_types
def load_tf_checkpoint(
    prefix: str | os.PathLike[str], encoder: Encoder, bank: MemoryBank | None = None
) -> LoadReport:
    """Fill an encoder, and a memory bank, from a checkpoint of the reference program.

    An error changes nothing. Bank rows are copied as they are; the reference leaves some of them
    at other than unit length. A warning names missing variables.

    Args:
        prefix: see :func:`~localagg.interop.tf_checkpoint.open_tf_checkpoint`.
        encoder: one of :data:`NETWORKS`, with the file's embedding size (128 in the reference).
        bank: with the number of rows of the file's bank.

    Raises:
        UserError: unreadable file, another network, or a bank of another size.
    """
    with open_tf_checkpoint(prefix) as checkpoint:
        return load_variables(checkpoint, encoder, bank, where=str(prefix))


def load_variables(
    source: TFCheckpoint,
    encoder: Encoder,
    bank: MemoryBank | None = None,
    *,
    where: str = "the checkpoint",
) -> LoadReport:
    """Load an open checkpoint as :func:`load_tf_checkpoint` does; ``where`` names it in errors."""
    wanted = map_variables(encoder)
    found = _find(source.names, wanted)
    _check_network(source, encoder, found, where)
    if bank is not None:
        check_bank(bank, source.shape(found[_BANK]) if _BANK in found else None, where)
    targets = encoder.state_dict()
    values, momentum = {}, {}
    for name, key in wanted.items():
        if name in found:
            values[key] = _weights(source, found[name], targets[key], where)
            slot = f"{found[name]}/Momentum"
            if slot in source.names and source.shape(slot) == source.shape(found[name]):
                momentum[key] = _weights(source, slot, targets[key], where)
    step = _integers(source, found.get(_STEP), 0, where)
    labels = _integers(source, found.get(_LABELS), 1, where)
    clusters = _integers(source, found.get(_CLUSTERS), 2, where)
    rows = None if bank is None else _array(source, found[_BANK], "f", where)
    for key, value in values.items():
        targets[key].copy_(value)
    if bank is not None and rows is not None:
        bank.rows.copy_(rows)
    used = {found[name] for name in found if name != _BANK or bank is not None}
    missing = tuple(name for name in wanted if name not in found)
    warn_missing(missing, encoder, where)
    return LoadReport(
        matched=tuple(name for name in source.names if name in used),
        left=tuple(name for name in source.names if name not in used),
        missing=missing,
        global_step=None if step is None else int(step),
        labels=labels,
        cluster_labels=None if clusters is None else clusters.to(torch.int32),
        momentum=momentum,
    )


def check_bank(bank: MemoryBank, shape: Sequence[int] | None, where: str) -> None:
    """Raise UserError unless a file's memory bank has ``bank``'s shape (None if absent)."""
    if shape is None:
        raise UserError("not-found", f"{where} holds no memory bank; load it without a bank.")
    if tuple(shape) != tuple(bank.rows.shape):
        raise UserError(
            "mismatch",
            f"{where} holds a memory bank of shape {list(shape)}, not {list(bank.rows.shape)};"
            " make the bank with the file's shape.",
        )


def shape_error(
    where: str, encoder: Encoder, name: str, shape: Sequence[int], key: str
) -> UserError:
    """Return the error for a variable of another shape than the encoder's parameter ``key``."""
    target = list(encoder.state_dict()[key].shape)
    return UserError(
        "mismatch",
        f"{where} does not fit this {encoder.spec['model']}: {name} has shape {list(shape)}, {key}"
        f" {target}; use the network and dim of the file.",
    )


def warn_missing(missing: Sequence[str], encoder: Encoder, where: str) -> None:
    """Warn that the encoder keeps its own values of missing variables."""
    if missing:
        warnings.warn(
            f"{where} lacks {len(missing)} variables of {encoder.spec['model']}, {missing[0]} the"
            " first; these keep their values.",
            stacklevel=3,
        )


def map_variables(encoder: Encoder) -> dict[str, str]:
    """Return {variable name in the reference: key in the encoder's state dict}.

    Raises:
        UserError: the encoder is none of :data:`NETWORKS`.
    """
    backbone = encoder.backbone
    if isinstance(backbone, PreActResNet):
        return dict(_resnet_variables(backbone))
    if isinstance(backbone, AlexNet):
        return dict(_alexnet_variables(backbone))
    if isinstance(backbone, VGG16):
        return dict(_vgg_variables(backbone))
    raise UserError(
        "unsupported",
        f"The reference program has no network {encoder.spec['model']}; its weights fit"
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


def _batch_norm(scope: str, key: str) -> Iterator[tuple[str, str]]:
    yield f"{scope}/gamma", f"{key}.weight"
    yield f"{scope}/beta", f"{key}.bias"
    yield f"{scope}/moving_mean", f"{key}.running_mean"
    yield f"{scope}/moving_variance", f"{key}.running_var"


def _find(names: Iterable[str], variables: Iterable[str]) -> dict[str, str]:
    """Return {variable: name in the file}, ignoring scopes before it ("tower_0/", "model/").

    The trainer's variables are found too. If several scopes hold a variable, the scope with most
    variables wins, then the shortest.
    """
    wanted = _TRAINER.union(variables)
    by_scope: dict[str, dict[str, str]] = {}
    for name in names:
        parts = name.split("/")
        for start in range(len(parts)):
            rest = "/".join(parts[start:])
            if rest in wanted:
                by_scope.setdefault("/".join(parts[:start]), {})[rest] = name
    found: dict[str, str] = {}
    for scope in sorted(by_scope, key=lambda s: (-len(by_scope[s]), len(s), s)):
        found = by_scope[scope] | found
    return found


def _check_network(
    source: TFCheckpoint, encoder: Encoder, found: dict[str, str], where: str
) -> None:
    """Raise UserError if the file holds no variable of the network, or one of another shape."""
    model, targets, wanted = encoder.spec["model"], encoder.state_dict(), map_variables(encoder)
    if found.keys().isdisjoint(wanted):
        raise UserError(
            "mismatch",
            f"{where} holds no variable of {model}; its first ones are"
            f" {', '.join(source.names[:3]) or 'none'}.",
        )
    for name in filter(found.__contains__, wanted):
        key, stored = wanted[name], tuple(source.shape(found[name]))
        shape = (stored[-1], stored[-2], *stored[:-2]) if len(stored) > 1 else stored
        target = tuple(targets[key].shape)
        if _without_1x1(shape) != _without_1x1(target):
            raise shape_error(where, encoder, found[name], stored, key)


def _without_1x1(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Drop a 1x1 kernel's axes: slim's fully connected layers have them, dense layers do not."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _weights(source: TFCheckpoint, name: str, target: Tensor, where: str) -> Tensor:
    """Return weights in torch's layout: HWIO -> OIHW, [in, out] -> [out, in]."""
    array = _array(source, name, "f", where)
    if array.ndim >= 2:
        last = array.ndim - 1
        array = array.permute(last, last - 1, *range(last - 1))
    return array.reshape(target.shape).to(target)


def _integers(source: TFCheckpoint, name: str | None, axes: int, where: str) -> Tensor | None:
    """Return int64 of ``axes`` axes, or None if the file lacks it."""
    if name is None:
        return None
    array = _array(source, name, "iu", where)
    if array.ndim != axes:
        raise UserError(
            "mismatch", f"{where}: {name} has {array.ndim} axes, not {axes}; use another file."
        )
    return array.to(torch.int64)


def _array(source: TFCheckpoint, name: str, kinds: str, where: str) -> Tensor:
    array = source.read(name)
    if array.dtype.kind not in kinds:
        wanted = "floating-point" if kinds == "f" else "whole"
        raise UserError(
            "mismatch",
            f"{where}: {name} holds {array.dtype}, not {wanted} numbers; use another file.",
        )
    return torch.from_numpy(np.require(array, requirements=("C", "W")))
