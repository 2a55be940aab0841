"""The reference's variables into an encoder and a memory bank: which name is which, and its layout.

Reading the file is :mod:`.tf_checkpoint`'s affair; here are its names. The ResNets of the reference
are built by ``tf.layers``, which numbers layers as they are created (``conv2d``, ``conv2d_1``, ...,
a block's projection before its other convolutions); AlexNet and VGG by slim, which names them.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..bank import MemoryBank
from ..errors import UserError
from ..models import Encoder, create_encoder
from ..models.alexnet import AlexNet
from ..models.preact_resnet import PreActResNet
from ..models.vgg import VGG16

NETWORKS = ("preact_resnet18", "preact_resnet50", "alexnet_bn", "vgg16_bn_last")
_BANK, _LABELS = "instance/memory_bank", "instance/all_labels"
_CLUSTERS, _STEP = "instance/cluster_labels", "global_step"


class VariableSource(Protocol):
    """Named arrays: an open :class:`~localagg.interop.tf_checkpoint.TFCheckpoint`, for one."""

    @property
    def names(self) -> Sequence[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> np.ndarray: ...


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint's variables."""

    matched: tuple[str, ...]
    """Names in the file that were used: by the encoder, by the bank, or by this report."""
    left: tuple[str, ...]
    """Names in the file that were not, optimizer slots among them."""
    missing: tuple[str, ...]
    """Variables of the network that the file lacks; the encoder keeps its own values there."""
    global_step: int | None
    """Steps that the reference had trained."""
    labels: Tensor | None
    """int64 [N]: class of each image seen so far, by bank row."""
    cluster_labels: Tensor | None
    """int32 [H, N]: the clusterings, as from :func:`localagg.clustering.cluster`."""
    momentum: dict[str, Tensor]
    """By parameter of the encoder, in its layout: what ``torch.optim.SGD`` calls its
    ``momentum_buffer``. Only of parameters whose ``/Momentum`` slot is in the file."""


def load_tf_checkpoint(
    prefix: str | os.PathLike[str], encoder: Encoder, bank: MemoryBank | None = None
) -> LoadReport:
    """Fill an encoder, and a memory bank, from a checkpoint of the reference program.

    Nothing is changed if anything is wrong. Bank rows are taken as they are, even where the
    reference has left them at other than unit length.

    Args:
        prefix: as :func:`~localagg.interop.tf_checkpoint.open_tf_checkpoint` takes it.
        encoder: one of ``preact_resnet18``, ``preact_resnet50``, ``alexnet_bn``,
            ``vgg16_bn_last``, with the embedding size of the file (128 in the reference).
        bank: of as many rows as the file's.

    Returns:
        What was matched, what was left and what is missing; a warning names missing variables.

    Raises:
        UserError: an unreadable file, one of another network, or a bank of another size.
    """
    from .tf_checkpoint import open_tf_checkpoint

    with open_tf_checkpoint(prefix) as checkpoint:
        return load_variables(checkpoint, encoder, bank, where=str(prefix))


def load_variables(
    source: VariableSource,
    encoder: Encoder,
    bank: MemoryBank | None = None,
    *,
    where: str = "the checkpoint",
) -> LoadReport:
    """:func:`load_tf_checkpoint` from any source of named arrays; ``where`` names it in errors."""
    wanted = map_variables(encoder)
    found = _find(source.names, [*wanted, _BANK, _LABELS, _CLUSTERS, _STEP])
    _refuse_other_network(source, encoder, found, where)
    if bank is not None:
        _refuse_other_bank(source, bank, found.get(_BANK), where)
    targets = encoder.state_dict()
    values, momentum, names = {}, {}, set(source.names)
    for name, key in wanted.items():
        if name in found:
            values[key] = _weights(source, found[name], targets[key], where)
            slot = f"{found[name]}/Momentum"
            if slot in names and _torch_shape(source.shape(slot)) == _torch_shape(
                source.shape(found[name])
            ):
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
    if missing:
        warnings.warn(
            f"{where} lacks {len(missing)} of the {len(wanted)} variables of "
            f"{encoder.spec['model']}, {missing[0]} the first; these keep their values.",
            stacklevel=2,
        )
    return LoadReport(
        matched=tuple(name for name in source.names if name in used),
        left=tuple(name for name in source.names if name not in used),
        missing=missing,
        global_step=None if step is None else int(step),
        labels=labels,
        cluster_labels=None if clusters is None else clusters.to(torch.int32),
        momentum=momentum,
    )


def map_variables(encoder: Encoder) -> dict[str, str]:
    """{variable name in the reference: key in the encoder's state dict}, of the whole network.

    Raises:
        UserError: an encoder that is none of the reference's four networks.
    """
    backbone = encoder.backbone
    if isinstance(backbone, PreActResNet):
        return dict(_resnet_variables(backbone))
    if isinstance(backbone, AlexNet):
        return dict(_alexnet_variables(backbone))
    if isinstance(backbone, VGG16):
        return dict(_vgg_variables(backbone))
    raise UserError(
        "TODO",
        f"The reference program has no network {encoder.spec['model']}; its weights fit "
        f"{', '.join(NETWORKS)}.",
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
            yield from _norm(f"resnet_model/batch_normalization{number}", f"backbone.{key}")
            norms += 1
    yield "resnet_model/dense/kernel", "head.weight"
    yield "resnet_model/dense/bias", "head.bias"


def _alexnet_variables(backbone: AlexNet) -> Iterator[tuple[str, str]]:
    for name in backbone.convs:
        yield f"alexnet_v2/{name}/weights", f"backbone.convs.{name}.weight"
        yield f"alexnet_v2/{name}/biases", f"backbone.convs.{name}.bias"
        yield from _norm(f"alexnet_v2/{name}", f"backbone.norms.{name}")
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
            yield from _norm(f"{scope}/batch_normalization", f"backbone.norms.{name}")
        else:
            yield f"{scope}/biases", f"backbone.convs.{name}.bias"
    yield "vgg_16/fc8/weights", "head.weight"
    yield "vgg_16/fc8/biases", "head.bias"


def _norm(scope: str, key: str) -> Iterator[tuple[str, str]]:
    yield f"{scope}/gamma", f"{key}.weight"
    yield f"{scope}/beta", f"{key}.bias"
    yield f"{scope}/moving_mean", f"{key}.running_mean"
    yield f"{scope}/moving_variance", f"{key}.running_var"


def _find(names: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """{wanted: name in the file}, whatever scopes stand before it ("tower_0/", "model/").

    Where the same variable is there more than once, the scope that holds most of them wins, then
    the shortest.
    """
    wanted = set(wanted)
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


def _refuse_other_network(
    source: VariableSource, encoder: Encoder, found: dict[str, str], where: str
) -> None:
    fits, wrong = _fit(source, encoder, found)
    wanted = map_variables(encoder)
    if len(fits) == len(wanted):
        return
    model = encoder.spec["model"]
    counts = {model: len(fits)}
    for other in NETWORKS:
        if other != model:
            with torch.device("meta"):
                candidate = create_encoder(other)
            there = _find(source.names, map_variables(candidate))
            counts[other] = len(_fit(source, candidate, there)[0])
    best = max(counts, key=lambda name: counts[name])
    if counts[best] == 0:
        raise UserError(
            "TODO",
            f"{where} holds no variable of {model}, nor of another network of the reference; its "
            f"first ones are {', '.join(list(source.names)[:3]) or 'none'}.",
        )
    if counts[best] > counts[model]:
        raise UserError(
            "TODO", f"{where} holds the weights of {best}, not of {model}: make a {best} for them."
        )
    if wrong:
        name = wrong[0]
        key, shape = wanted[name], list(source.shape(found[name]))
        way_out = (
            f"make it with dim={shape[-1]}" if key.startswith("head.") else "take another file"
        )
        raise UserError(
            "TODO",
            f"{where} does not fit this {model}: {found[name]} has shape {shape}, "
            f"{key} {list(encoder.state_dict()[key].shape)}; {way_out}.",
        )


def _fit(
    source: VariableSource, encoder: Encoder, found: dict[str, str]
) -> tuple[list[str], list[str]]:
    """Variables of the encoder that the file has, by their shape: the right and the wrong ones."""
    targets, fits, wrong = encoder.state_dict(), [], []
    for name, key in map_variables(encoder).items():
        if name in found:
            shape = _torch_shape(source.shape(found[name]))
            (fits if shape == _squeezed(targets[key].shape) else wrong).append(name)
    return fits, wrong


def _refuse_other_bank(
    source: VariableSource, bank: MemoryBank, name: str | None, where: str
) -> None:
    if name is None:
        raise UserError(
            "TODO", f"{where} holds no memory bank (instance/memory_bank); leave out bank."
        )
    shape = tuple(source.shape(name))
    if shape != tuple(bank.rows.shape):
        raise UserError(
            "TODO",
            f"{where} holds a memory bank of shape {list(shape)}, where one of "
            f"{list(bank.rows.shape)} is to be filled; make it with the file's.",
        )


def _torch_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The layout that :func:`_weights` gives an array of TensorFlow's."""
    if len(shape) < 2:
        return tuple(shape)
    return _squeezed((shape[-1], shape[-2], *shape[:-2]))


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """Without the 1x1 of a kernel: slim's fully connected layers have it, dense layers do not."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)


def _weights(source: VariableSource, name: str, target: Tensor, where: str) -> Tensor:
    """An array in torch's layout: HWIO -> OIHW, [in, out] -> [out, in]; as the target's dtype."""
    array = _array(source, name, "f", where)
    if array.ndim >= 2:
        last = array.ndim - 1
        array = array.permute(last, last - 1, *range(last - 1))
    return array.reshape(target.shape).to(target)


def _integers(source: VariableSource, name: str | None, axes: int, where: str) -> Tensor | None:
    """int64, of so many axes; None if the file lacks it."""
    if name is None:
        return None
    array = _array(source, name, "iu", where)
    if array.ndim != axes:
        raise UserError(
            "TODO", f"{where}: {name} has {array.ndim} axes, not {axes}; take another file."
        )
    return array.to(torch.int64)


def _array(source: VariableSource, name: str, kinds: str, where: str) -> Tensor:
    array = source.read(name)
    if array.dtype.kind not in kinds:
        wanted = "floating-point" if kinds == "f" else "whole"
        raise UserError(
            "TODO", f"{where}: {name} holds {array.dtype}, not {wanted} numbers; take another file."
        )
    return torch.from_numpy(np.require(array, requirements=("C", "W")))
