"""Convert a checkpoint of TensorFlow, or of the reference's PyTorch port, to a weights file."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bank import MemoryBank
from ..checkpoint import save_weights
from ..config import ViewConfig, check_argument_types
from ..errors import UserError, suggest
from ..io.files import atomic_write, check_writable
from ..io.tensor_files import save_tensors
from ..models import Encoder, create_encoder
from ..models.vvs_resnet import VVSResNet
from . import torch_port, variable_names
from .start_state import bank_place, save_start_state
from .tf_checkpoint import open_tf_checkpoint
from .tf_variables import bank_shape, load_tf_checkpoint
from .torch_port import load_torch_port
from .variable_names import map_variables

# The reference's view of an image for validation (resnet_validate).
REFERENCE_VIEWS = ViewConfig(image_size=224, eval_crop=0.875, augmentation="reference")
PORT_VIEWS = ViewConfig(image_size=224, eval_crop=0.875)
"""The port's: Resize(256) and CenterCrop(224) of torchvision."""
VVS_VIEWS = ViewConfig(image_size=224, eval_crop=1.0)
"""That of unsup_vvs's neural fits: stimuli whole, resized to 224 pixels."""
_HEAD = re.compile(r"(?:.*/)?instance/transfer_dense(?:_(\w+))?/(kernel|bias)")


@check_argument_types
def import_weights(
    prefix: str | Path,
    model: str,
    out: str | Path,
    *,
    bank: str | Path | None = None,
    heads: str | Path | None = None,
) -> dict[str, Any]:
    """Write the weights of a checkpoint as a safetensors file that every command takes.

    Args:
        prefix: see ``open_tf_checkpoint``, or a ``.pth.tar``, ``.pth`` or ``.pt`` file of the port.
        model: the network of the checkpoint.
        out: the file to write; it appears when complete.
        bank: also write the training state to this file, for ``pretrain --start``; see
            :mod:`.start_state`.
        heads: also write the read-out heads to this file, as ``transfer`` writes its own:
            LAYER.weight [C, F] and LAYER.bias [C]. A checkpoint of read-outs may lack the embedding
            head, which then stays random.

    Returns:
        {"matched", "left", "missing": names, "global_step", "rows" of the bank or None, "model",
        "out", "from"}.

    Raises:
        UserError: not a complete checkpoint of this network, or a file that cannot be written.
    """
    prefix, out = str(prefix), Path(out)
    bank, heads = (None if file is None else Path(file) for file in (bank, heads))
    _check_files({"--out": out, "--bank": bank, "--heads": heads})
    is_port = prefix.endswith((".pth.tar", ".pth", ".pt"))
    _check_model(model, is_port)
    encoder = create_encoder(model, seed=0)
    memory = None if bank is None else MemoryBank(*_bank_shape(prefix, encoder, is_port))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # missing variables raise below
        report = (load_torch_port if is_port else load_tf_checkpoint)(prefix, encoder, memory)
    found = None if heads is None else _read_heads(prefix, encoder)
    _check_complete(prefix, encoder, report.missing, optional=("head.",) if found else ())
    views = _views(encoder, is_port)
    with atomic_write(out) as temporary:
        save_weights(temporary, encoder, views, bank and bank_place(out, bank))
    if bank is not None and memory is not None:
        save_start_state(bank, memory, report)
    if heads is not None and found is not None:
        with atomic_write(heads) as temporary:
            save_tensors(temporary, found)
    return {
        "matched": list(report.matched),
        "left": list(report.left),
        "missing": list(report.missing),
        "global_step": report.global_step,
        "rows": None if memory is None else len(memory),
        "model": model,
        "heads": None if found is None else sorted({name.split(".")[0] for name in found}),
        "out": str(out),
        "from": prefix,
    }


def _check_complete(
    prefix: str, encoder: Encoder, missing: Sequence[str], optional: tuple[str, ...]
) -> None:
    if [name for name in missing if not _parameter(encoder, name).startswith(optional)]:
        raise UserError(
            "mismatch",
            f"'{prefix}' lacks {len(missing)} variables of {encoder.spec['model']}, {missing[0]}"
            " the first; name a complete checkpoint.",
        )


def _check_files(files: dict[str, Path | None]) -> None:
    given = {option: file for option, file in files.items() if file is not None}
    for option, file in given.items():
        if file.is_dir() or not file.absolute().parent.is_dir():
            raise UserError("not-found", f"{option} {file} is not a file in an existing folder.")
        check_writable(file)
    if len({*given.values()}) < len(given):
        raise UserError("option-conflict", f"{', '.join(files)} must name different files.")


def _check_model(model: str, is_port: bool) -> None:
    networks = (torch_port if is_port else variable_names).NETWORKS
    if model not in networks:
        raise UserError(
            "option-unknown",
            f"{'The PyTorch port has' if is_port else 'The TensorFlow programs have'} no network"
            f" '{model}'; --model is one of {', '.join(networks)}.{suggest(model, networks)}",
        )


def _views(encoder: Encoder, is_port: bool) -> ViewConfig:
    if isinstance(encoder.backbone, VVSResNet):
        return VVS_VIEWS
    return PORT_VIEWS if is_port else REFERENCE_VIEWS


def _parameter(encoder: Encoder, name: str) -> str:
    return map_variables(encoder).get(name, "")


def _read_heads(prefix: str, encoder: Encoder) -> dict[str, Tensor]:
    """Return the heads of ``instance/transfer_dense_LAYER`` or, of ResNets, ``transfer_dense``."""
    found = {}
    with open_tf_checkpoint(prefix) as checkpoint:
        for name in checkpoint.names:
            if match := _HEAD.fullmatch(name):
                layer = match[1] or list(encoder.layers)[-1]
                if layer not in encoder.layers or not (
                    match[1] or "resnet" in encoder.spec["model"]
                ):
                    raise UserError(
                        "mismatch",
                        f"'{prefix}': {name} reads out a layer that {encoder.spec['model']} does"
                        f" not have; its layers are {', '.join(encoder.layers)}.",
                    )
                values = torch.from_numpy(checkpoint.read(name)).float()
                kind = "weight" if match[2] == "kernel" else "bias"
                found[f"{layer}.{kind}"] = values.T.contiguous() if values.ndim == 2 else values
    if not found:
        raise UserError("not-found", f"'{prefix}' holds no read-out heads; omit --heads.")
    return found


def _bank_shape(prefix: str, encoder: Encoder, is_port: bool) -> tuple[int, ...]:
    if is_port:
        rows = torch_port.read_torch_port(prefix).get("memory_bank")
        shape = None if rows is None else tuple(rows.shape)
    else:
        with open_tf_checkpoint(prefix) as checkpoint:
            shape = bank_shape(checkpoint, encoder, prefix)
    if shape is None or len(shape) != 2:
        raise UserError("not-found", f"'{prefix}' holds no memory bank; omit --bank.")
    return shape
