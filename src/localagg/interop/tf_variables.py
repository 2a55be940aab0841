"""Load a TensorFlow checkpoint's variables into an encoder and a memory bank.

:mod:`.tf_checkpoint` reads the file, :mod:`.variable_names` names its variables.
"""

import os
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..bank import MemoryBank
from ..config import check_argument_types
from ..errors import UserError
from ..models import Encoder, create_encoder
from .tf_checkpoint import TFCheckpoint, open_tf_checkpoint
from .variable_names import NETWORKS, map_variables, trainer_names

_USE_THE_FILES = "use the network and dim of the file"


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
    """Fill an encoder, and a memory bank, from a checkpoint of TensorFlow.

    An error changes nothing. Bank rows are copied as they are; the reference leaves some of them
    at other than unit length. A warning names missing variables.

    Args:
        prefix: see :func:`~localagg.interop.tf_checkpoint.open_tf_checkpoint`.
        encoder: one of ``NETWORKS`` in :mod:`.variable_names`, with the file's embedding size (128
            in the originals).
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
    wanted, trainer = map_variables(encoder, source.names), trainer_names(encoder, source.names)
    found = _find(source.names, {*wanted, *trainer})
    _check_network(source, encoder, wanted, found, where)
    if bank is not None:
        stored = source.shape(found[trainer.bank]) if trainer.bank in found else None
        check_bank(bank, stored, where)
    targets = encoder.state_dict()
    values, momentum = {}, {}
    for name, key in wanted.items():
        if name in found:
            values[key] = _weights(source, found[name], targets[key], where)
            slot = f"{found[name]}/Momentum"
            if slot in source.names and source.shape(slot) == source.shape(found[name]):
                momentum[key] = _weights(source, slot, targets[key], where)
    step = _integers(source, found.get(trainer.step), 0, where)
    labels = _integers(source, found.get(trainer.labels), 1, where)
    clusters = _integers(source, found.get(trainer.clusters), 2, where)
    rows = None if bank is None else _array(source, found[trainer.bank], "f", where)
    for key, value in values.items():
        targets[key].copy_(value)
    if bank is not None and rows is not None:
        bank.rows.copy_(rows)
    used = {found[name] for name in found if name != trainer.bank or bank is not None}
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


def bank_shape(source: TFCheckpoint, encoder: Encoder, where: str) -> tuple[int, ...] | None:
    """Return the shape of the memory bank in an encoder's checkpoint, None without one.

    Raises:
        UserError: the checkpoint is of another network.
    """
    wanted, trainer = map_variables(encoder, source.names), trainer_names(encoder, source.names)
    found = _find(source.names, {*wanted, *trainer})
    _check_network(source, encoder, wanted, found, where)
    return source.shape(found[trainer.bank]) if trainer.bank in found else None


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
    where: str,
    encoder: Encoder,
    name: str,
    shape: Sequence[int],
    key: str,
    fix: str = _USE_THE_FILES,
) -> UserError:
    """Return the error for a variable of another shape than the encoder's parameter ``key``."""
    target = list(encoder.state_dict()[key].shape)
    return UserError(
        "mismatch",
        f"{where} does not fit this {encoder.spec['model']}: {name} has shape {list(shape)}, {key}"
        f" {target}; {fix}.",
    )


def warn_missing(missing: Sequence[str], encoder: Encoder, where: str) -> None:
    """Warn that the encoder keeps its own values of missing variables."""
    if missing:
        warnings.warn(
            f"{where} lacks {len(missing)} variables of {encoder.spec['model']}, {missing[0]} the"
            " first; these keep their values.",
            stacklevel=3,
        )


def _find(names: Iterable[str], wanted: Collection[str]) -> dict[str, str]:
    """Return {variable: name in the file}, ignoring scopes before it ("tower_0/", "model/").

    If several scopes hold a variable, the scope with most variables wins, then the shortest.
    """
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
    source: TFCheckpoint,
    encoder: Encoder,
    wanted: Mapping[str, str],
    found: Mapping[str, str],
    where: str,
) -> None:
    """Raise UserError if the file holds no variable of the network, or one of another shape."""
    model = encoder.spec["model"]
    if found.keys().isdisjoint(wanted):
        right = _matching_network(source)
        raise UserError(
            "mismatch",
            f"{where} holds no variable of {model}; its first ones are"
            f" {', '.join(source.names[:3]) or 'none'}{f'; use --model {right}' if right else ''}.",
        )
    if misfit := _first_misfit(source, encoder, wanted, found):
        key, right = wanted[misfit], _matching_network(source)
        fix = f"use --model {right}" if right not in (None, model) else _USE_THE_FILES
        raise shape_error(where, encoder, found[misfit], source.shape(found[misfit]), key, fix)


def _first_misfit(
    source: TFCheckpoint, encoder: Encoder, wanted: Mapping[str, str], found: Mapping[str, str]
) -> str | None:
    """Return the first variable whose shape in the file is not the encoder's."""
    targets = encoder.state_dict()
    for name in filter(found.__contains__, wanted):
        stored, target = tuple(source.shape(found[name])), tuple(targets[wanted[name]].shape)
        shape = (stored[-1], stored[-2], *stored[:-2]) if len(stored) > 1 else stored
        if _without_1x1(shape) != _without_1x1(target):
            return name
    return None


def _matching_network(source: TFCheckpoint) -> str | None:
    """Return the network of which the file has all variables but the head's, in its shapes."""
    for model in NETWORKS:
        with torch.device("meta"):  # shapes are enough
            encoder = create_encoder(model)
        wanted = map_variables(encoder, source.names)
        wanted = {name: key for name, key in wanted.items() if not key.startswith("head.")}
        found = _find(source.names, wanted)
        if len(found) == len(wanted) and not _first_misfit(source, encoder, wanted, found):
            return model
    return None


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
