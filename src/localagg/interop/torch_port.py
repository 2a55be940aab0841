"""Load weights of the later PyTorch port (github.com/neuroailab/LocalAggregation-Pytorch).

Its ``checkpoint.pth.tar`` is not a tar but a dict written by ``torch.save``: ``model_state_dict``
(keys begin with ``module.``), ``optim_state_dict`` of SGD, ``memory_bank``, ``cluster_labels``,
``iteration`` and settings. The
bank and the settings are objects of the port's classes; ``weights_only=True`` reads them as
:class:`_FieldsOnly`, which keeps their fields and runs none of their code.
"""

import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bank import MemoryBank
from ..errors import UserError
from ..io.tensor_files import load_pickled
from ..models import Encoder
from ..models.preact_resnet import PreActResNet
from ..models.torchvision_resnet import TorchvisionResNet, library_name
from .tf_variables import LoadReport, check_bank, shape_error, warn_missing

NETWORKS = ("preact_resnet18", "resnet18", "resnet50")
_BANK, _CLUSTERS, _STEP = "memory_bank", "cluster_labels", "iteration"
_MOMENTUM = "momentum."  # before a parameter's name
_COUNTER = "num_batches_tracked"  # batch-norm's; unused, and absent from old files
_BUFFERS = ("running_mean", "running_var", _COUNTER)
_FIX = "save its model_state_dict (and memory_bank as a tensor) alone with torch.save"


class _FieldsOnly:
    """The fields of an object of a foreign class."""

    def __init__(self, *_: object) -> None:
        self.fields: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        self.fields = state if isinstance(state, dict) else {}


# The port's files name its bank, its settings, and numpy's arrays of its losses.
_NUMPY = ("core.multiarray._reconstruct", "core.multiarray.scalar", "ndarray", "dtype")
_FOREIGN: list[Any] = [
    (_FieldsOnly, "src.objectives.localagg.MemoryBank"),
    (OrderedDict, "dotmap.DotMap"),
    (_FieldsOnly, "builtins.bytes"),
    *((_FieldsOnly, f"numpy.{name}") for name in _NUMPY),
    *((_FieldsOnly, f"numpy._{name}") for name in _NUMPY[:2]),
]


def read_torch_port(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint of the port, or of a plain state dict.

    Only tensors and plain containers are unpickled (``weights_only=True``). A checkpoint is a dict
    with ``model_state_dict`` or ``state_dict``, and optionally ``memory_bank`` [N, D],
    ``cluster_labels`` [H, N] and ``iteration``.

    Returns:
        The network's tensors by name, without ``module.``, and if the file has them
        ``memory_bank``, ``cluster_labels``, ``iteration`` (int64 scalar), and the momentum of each
        parameter as ``momentum.NAME``.

    Raises:
        UserError: no such file, a damaged one, no weights, or objects of other types.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("not-found", f"There is no file '{path}'; name a file of the PyTorch port.")
    loaded = load_pickled(
        path, _FOREIGN, f"if it is not damaged, load it with the port's code and {_FIX}"
    )
    saved: dict[Any, Any] = loaded if isinstance(loaded, dict) else {}
    weights = saved.get("model_state_dict", saved.get("state_dict", saved))
    if not isinstance(weights, dict) or not weights:
        raise UserError("unsupported", f"'{path}' holds no state dict; {_FIX}.")
    found = {str(name).removeprefix("module."): _tensor(v, path) for name, v in weights.items()}
    found |= _momenta(saved.get("optim_state_dict"), found, path)
    bank = saved.get(_BANK)
    if isinstance(bank, _FieldsOnly):
        bank = bank.fields.get("bank_broadcast")
    for name, value in ((_BANK, bank), (_CLUSTERS, saved.get(_CLUSTERS))):
        if isinstance(value, (tuple, list)) and value:
            value = value[0]  # the others are copies on other GPUs
        if value is not None:
            found[name] = _tensor(value, path)
    if isinstance(saved.get(_STEP), int) and 0 <= saved[_STEP] < 1 << 62:
        found[_STEP] = torch.tensor(saved[_STEP])
    return found


def _momenta(state: object, weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the momenta of ``torch.optim.SGD``, which counts the parameters of a network."""
    buffers = state.get("state") if isinstance(state, dict) else None
    if not isinstance(buffers, dict):
        return {}
    parameters = [name for name in weights if not name.endswith(_BUFFERS)]
    found = {}
    for number, entry in buffers.items():
        value = entry.get("momentum_buffer") if isinstance(entry, dict) else None
        if isinstance(value, Tensor) and number in range(len(parameters)):
            name = parameters[number]
            if value.shape == weights[name].shape:
                found[_MOMENTUM + name] = _tensor(value, path)
    return found


def _tensor(value: object, path: Path) -> Tensor:
    """Return a plain tensor that is no larger than its bytes in the file."""
    if (
        not isinstance(value, Tensor)
        or value.layout is not torch.strided
        or value.device.type != "cpu"
        or value.is_quantized
        or value.numel() * value.element_size() > value.untyped_storage().nbytes()
    ):
        raise UserError("unsupported", f"'{path}' holds more than plain tensors; {_FIX}.")
    return value.detach()


def load_torch_port(
    path: str | os.PathLike[str], encoder: Encoder, bank: MemoryBank | None = None
) -> LoadReport:
    """Fill an encoder, and a memory bank, from a checkpoint of the PyTorch port.

    An error changes nothing. A warning names missing weights.

    Deviation for ``preact_resnet18``: the port pads its first max-pool with zeros, this encoder
    ignores the padding as TensorFlow does. Windows at the bottom and right edges whose values are
    all negative differ.

    Args:
        path: see :func:`read_torch_port`.
        encoder: ``preact_resnet18`` (the port's default), or torchvision's ``resnet18``,
            ``resnet50``, ..., with the file's embedding size (128 in the port).
        bank: with the number of rows of the file's bank.

    Returns:
        Names as in the port; ``global_step`` is its ``iteration``.

    Raises:
        UserError: unreadable file, another network, or a bank of another size.
    """
    found, where = read_torch_port(path), f"'{path}'"
    targets = encoder.state_dict()
    wanted = _map_names(encoder, targets)
    matched = [name for name in wanted if name in found]
    missing = tuple(name for name in wanted if name not in found and not name.endswith(_COUNTER))
    _check_network(where, encoder, found, wanted)
    momentum = {wanted[n]: found[_MOMENTUM + n] for n in matched if _MOMENTUM + n in found}
    used = {*matched, _STEP, _CLUSTERS}
    if bank is not None:
        check_bank(bank, found[_BANK].shape if _BANK in found else None, where)
        bank.rows.copy_(found[_BANK])
        used |= {_BANK, *(_MOMENTUM + name for name in matched)}
    for name in matched:
        targets[wanted[name]].copy_(found[name])
    warn_missing(missing, encoder, where)
    clusters = found.get(_CLUSTERS)
    return LoadReport(
        matched=tuple(name for name in found if name in used),
        left=tuple(name for name in found if name not in used),
        missing=missing,
        global_step=int(found[_STEP]) if _STEP in found else None,
        labels=None,
        cluster_labels=None if clusters is None else clusters.to(torch.int32),
        momentum=momentum,
    )


def _map_names(encoder: Encoder, targets: dict[str, Tensor]) -> dict[str, str]:
    """Return {name in the port: key in the encoder's state dict}."""
    if isinstance(encoder.backbone, TorchvisionResNet):
        rename = _torchvision_name
    elif isinstance(encoder.backbone, PreActResNet) and len(encoder.backbone.blocks) == 8:
        rename = _preact_name
    else:
        raise UserError(
            "unsupported",
            f"The PyTorch port has no network {encoder.spec['model']}; its weights fit"
            f" {', '.join(NETWORKS)} and other ResNets of torchvision.",
        )
    return {rename(key): key for key in targets if key not in ("mean", "std")}


def _torchvision_name(key: str) -> str:
    if key.startswith("backbone."):
        return library_name(key.removeprefix("backbone."))
    return re.sub(r"^head\.", "fc.", key)


def _preact_name(key: str) -> str:
    """Rename a key; the port has two blocks a stage and counts a block's layers from 1."""
    key = re.sub(
        r"^backbone\.blocks\.(\d)\.",
        lambda block: f"layer{int(block[1]) // 2 + 1}.{int(block[1]) % 2}.",
        key,
    )
    key = re.sub(r"\.norms\.(\d)\.", lambda norm: f".bn{int(norm[1]) + 1}.", key)
    key = re.sub(r"\.convs\.(\d)\.", lambda conv: f".conv{int(conv[1]) + 1}.", key)
    key = key.replace(".project.", ".shortcut.0.").replace("backbone.stem.", "conv1.")
    return key.replace("backbone.norm.", "bn.").replace("head.", "linear.")


def _check_network(
    where: str, encoder: Encoder, found: dict[str, Tensor], wanted: dict[str, str]
) -> None:
    """Raise UserError if the file holds another network, or shapes that do not fit."""
    model, targets = encoder.spec["model"], encoder.state_dict()
    for name, key in wanted.items():
        if name in found and found[name].shape != targets[key].shape:
            raise shape_error(where, encoder, name, found[name].shape, key)
    # A deeper network of the same widths has all names of a shallower one, in the right shapes.
    optional = ("fc.", "linear.")
    lacking = [name for name in wanted if name not in found and not name.startswith(optional)]
    lacking = [name for name in lacking if not name.endswith(_COUNTER)]
    surplus = [name for name in found if name.startswith("layer") and name not in wanted]
    if lacking or surplus:
        problem = f"it lacks {lacking[0]}" if lacking else f"{surplus[0]} is unknown"
        raise UserError(
            "mismatch", f"{where} does not fit this {model}: {problem}; use its network."
        )
