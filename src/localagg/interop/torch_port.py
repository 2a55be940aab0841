"""Weights of the later PyTorch port (github.com/neuroailab/LocalAggregation-Pytorch).

Its ``checkpoint.pth.tar`` is no tar but what ``torch.save`` made of a dict: ``model_state_dict``
(keys begin with ``module.``), ``memory_bank``, ``cluster_labels``, ``iteration``, and things that
are not weights. The bank is an object of a class of the port's, so ``weights_only=True`` alone
refuses every such file; the few foreign names in it are replaced by a class that does nothing.
"""

import os
import re
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bank import MemoryBank
from ..errors import UserError
from ..models import Encoder
from ..models.preact_resnet import PreActResNet
from ..models.torchvision_resnet import TorchvisionResNet
from .tf_variables import LoadReport

_BANK, _CLUSTERS, _STEP = "memory_bank", "cluster_labels", "iteration"
_COUNTER = "num_batches_tracked"  # of batch-norm; old files lack it, and nothing here reads it


class _Inert:
    """Stands in for an object of a foreign class: keeps its fields, runs none of its code."""

    def __init__(self, *_: object) -> None:
        self.fields: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        self.fields = state if isinstance(state, dict) else {}


# What the port's files name beside weights: its bank, its settings, numpy's arrays of its losses.
_STAND_INS: list[Any] = [
    (_Inert, "src.objectives.localagg.MemoryBank"),
    (OrderedDict, "dotmap.DotMap"),
    (_Inert, "numpy.core.multiarray._reconstruct"),
    (_Inert, "numpy._core.multiarray._reconstruct"),
    (_Inert, "numpy.core.multiarray.scalar"),
    (_Inert, "numpy._core.multiarray.scalar"),
    (_Inert, "numpy.ndarray"),
    (_Inert, "numpy.dtype"),
    (_Inert, "builtins.bytes"),
]


def read_torch_port(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a ``checkpoint.pth.tar`` of the port, or of a plain state dict.

    Nothing is unpickled beyond tensors and plain containers (``weights_only=True``).

    Returns:
        The network's by name, without ``module.``; and where the file has them ``memory_bank``
        [N, D], ``cluster_labels`` [H, N] and ``iteration`` (steps trained, int64 of no axes).

    Raises:
        UserError: no such file, damaged, without weights, or with objects of other types.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            "TODO", f"There is no file '{path}'; name a checkpoint.pth.tar of the PyTorch port."
        )
    saved = _load(path)
    if not isinstance(saved, dict):
        raise UserError(
            "TODO", f"'{path}' holds no state dict; name a checkpoint.pth.tar of the port."
        )
    weights = saved.get("model_state_dict", saved.get("state_dict", saved))
    if not isinstance(weights, dict):
        raise UserError(
            "TODO", f"'{path}' holds no state dict; name a checkpoint.pth.tar of the port."
        )
    found = {str(name).removeprefix("module."): _tensor(v, path) for name, v in weights.items()}
    if not found:
        raise UserError(
            "TODO", f"'{path}' holds no weights; name a checkpoint.pth.tar of the port."
        )
    bank = saved.get(_BANK)
    if isinstance(bank, _Inert):
        bank = bank.fields.get("bank_broadcast")
    for name, value in ((_BANK, bank), (_CLUSTERS, saved.get(_CLUSTERS))):
        if isinstance(value, (tuple, list)) and value:
            value = value[0]  # the others are copies on other GPUs
        if value is not None:
            found[name] = _tensor(value, path)
    if isinstance(saved.get(_STEP), int) and 0 <= saved[_STEP] < 1 << 62:
        found[_STEP] = torch.tensor(saved[_STEP])
    return found


def _load(path: Path) -> object:
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True)
    # torch raises what comes (RuntimeError, KeyError, struct.error, ...) on files that are not its.
    except Exception as error:
        text = str(error)
        foreign = re.search(r"unsupported (?:global: )?GLOBAL ([\w.]+)", text, re.IGNORECASE)
        if foreign:
            raise UserError(
                "TODO",
                f"'{path}' holds an object of the type {foreign[1]}, which is refused because"
                " making it could run foreign code; save the state dict alone.",
            ) from None
        lines = text.split("WeightsUnpickler error: ")[-1].splitlines() or [type(error).__name__]
        raise UserError(
            "TODO",
            f"'{path}' is damaged or was not written by torch.save ({lines[0][:200]}); copy it"
            " again.",
        ) from None


def _tensor(value: object, path: Path) -> Tensor:
    """A tensor of the file, refused where it is more than its bytes in the file."""
    if (
        not isinstance(value, Tensor)
        or value.layout is not torch.strided
        or value.device.type != "cpu"
        or value.is_quantized
        or value.numel() * value.element_size() > value.untyped_storage().nbytes()
    ):
        raise UserError(
            "TODO", f"'{path}' holds something else than plain tensors; save a state dict."
        )
    return value.detach()


def load_torch_port(
    path: str | os.PathLike[str], encoder: Encoder, bank: MemoryBank | None = None
) -> LoadReport:
    """Fill an encoder, and a memory bank, from a checkpoint of the PyTorch port.

    Nothing is changed if anything is wrong. The port's optimizer state is not read.

    Deviation for ``preact_resnet18``: the port pads its first max-pool with zeros, this encoder as
    TensorFlow does with nothing, so windows at the bottom and right edge whose values are all below
    zero come out lower here.

    Args:
        path: as :func:`read_torch_port` takes it.
        encoder: ``preact_resnet18`` (the port's default), or torchvision's ``resnet18``,
            ``resnet50``, ..., with the embedding size of the file (128 in the port).
        bank: of as many rows as the file's.

    Returns:
        What was matched, what was left and what is missing by the port's names; its
        ``global_step`` is the port's ``iteration``, labels and momentum are not in its files. A
        warning names missing weights.

    Raises:
        UserError: an unreadable file, one of another network, or a bank of another size.
    """
    found = read_torch_port(path)
    targets = encoder.state_dict()
    wanted = _names(encoder, targets)
    matched = [name for name in wanted if name in found]
    missing = tuple(name for name in wanted if name not in found and not name.endswith(_COUNTER))
    _refuse_other_network(str(path), encoder, found, wanted)
    if bank is not None:
        rows = found.get(_BANK)
        if rows is None:
            raise UserError("TODO", f"'{path}' holds no memory bank; leave out bank.")
        if rows.shape != bank.rows.shape:
            raise UserError(
                "TODO",
                f"'{path}' holds a memory bank of shape {list(rows.shape)}, where one of"
                f" {list(bank.rows.shape)} is to be filled; make it with the file's.",
            )
        bank.rows.copy_(rows)
    for name in matched:
        targets[wanted[name]].copy_(found[name])
    if missing:
        warnings.warn(
            f"'{path}' lacks {len(missing)} of the weights of {encoder.spec['model']},"
            f" {missing[0]} the first; these keep their values.",
            stacklevel=2,
        )
    used = {*matched, _STEP, _CLUSTERS, *([_BANK] if bank is not None else [])}
    clusters = found.get(_CLUSTERS)
    return LoadReport(
        matched=tuple(name for name in found if name in used),
        left=tuple(name for name in found if name not in used),
        missing=missing,
        global_step=int(found[_STEP]) if _STEP in found else None,
        labels=None,
        cluster_labels=None if clusters is None else clusters.to(torch.int32),
        momentum={},
    )


def _names(encoder: Encoder, targets: dict[str, Tensor]) -> dict[str, str]:
    """{name in the port: key in the encoder's state dict}."""
    if isinstance(encoder.backbone, TorchvisionResNet):
        rename = _torchvision_name
    elif isinstance(encoder.backbone, PreActResNet) and len(encoder.backbone.blocks) == 8:
        rename = _preact_name
    else:
        raise UserError(
            "TODO",
            f"The PyTorch port has no network {encoder.spec['model']}; its weights fit"
            " preact_resnet18 and torchvision's resnet18, resnet50 and so on.",
        )
    return {rename(key): key for key in targets if key not in ("mean", "std")}


def _torchvision_name(key: str) -> str:
    key = key.replace("backbone.stem.0.", "conv1.").replace("backbone.stem.1.", "bn1.")
    key = re.sub(r"^backbone\.stages\.(\d)\.", lambda stage: f"layer{int(stage[1]) + 1}.", key)
    return re.sub(r"^head\.", "fc.", key)


def _preact_name(key: str) -> str:
    """Of a block the port counts batch-norms and convolutions from 1, and two blocks a stage."""
    key = re.sub(
        r"^backbone\.blocks\.(\d)\.",
        lambda block: f"layer{int(block[1]) // 2 + 1}.{int(block[1]) % 2}.",
        key,
    )
    key = re.sub(r"\.norms\.(\d)\.", lambda norm: f".bn{int(norm[1]) + 1}.", key)
    key = re.sub(r"\.convs\.(\d)\.", lambda conv: f".conv{int(conv[1]) + 1}.", key)
    key = key.replace(".project.", ".shortcut.0.").replace("backbone.stem.", "conv1.")
    return key.replace("backbone.norm.", "bn.").replace("head.", "linear.")


def _refuse_other_network(
    path: str, encoder: Encoder, found: dict[str, Tensor], wanted: dict[str, str]
) -> None:
    model, targets = encoder.spec["model"], encoder.state_dict()
    preact = "linear.weight" in found and "bn.weight" in found
    if preact != isinstance(encoder.backbone, PreActResNet):
        there = "preact_resnet18" if preact else "a torchvision network"
        raise UserError(
            "TODO", f"'{path}' holds the weights of {there}, not of {model}: make that one."
        )
    wrong = [n for n in wanted if n in found and found[n].shape != targets[wanted[n]].shape]
    if wrong:
        name, there, here = wrong[0], found[wrong[0]].shape, targets[wanted[wrong[0]]].shape
        is_head = wanted[name].startswith("head.")
        way_out = f"make it with dim={there[0]}" if is_head else "take the network of the file"
        raise UserError(
            "TODO",
            f"'{path}' does not fit this {model}: {name} has shape {list(there)},"
            f" {list(here)} is wanted; {way_out}.",
        )
    # A deeper network of the same widths has all names of a shallower one, in the right shapes.
    head = ("fc.", "linear.")
    gone = [name for name in wanted if name not in found and not name.startswith(head)]
    gone = [name for name in gone if not name.endswith(_COUNTER)]
    more = [name for name in found if name.startswith("layer") and name not in wanted]
    if gone or more:
        what = f"{gone[0]} is missing" if gone else f"{more[0]} is too much"
        raise UserError(
            "TODO", f"'{path}' does not fit this {model}: {what}; take the network of the file."
        )
