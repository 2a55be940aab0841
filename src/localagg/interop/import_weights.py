"""A checkpoint of the reference, or of its PyTorch port, as one of our weights files."""

import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..bank import MemoryBank
from ..checkpoint import save_weights
from ..config import ViewConfig
from ..errors import UserError, suggest
from ..io.files import atomic_write
from ..models import Encoder, create_encoder
from .tf_checkpoint import open_tf_checkpoint
from .tf_variables import NETWORKS, LoadReport, load_variables
from .torch_port import load_torch_port, read_torch_port

# How the reference shows an image that it measures (resnet_validate).
REFERENCE_VIEWS = ViewConfig(image_size=224, eval_crop=0.875, augmentation="reference")


def import_weights(
    prefix: str, model: str, out: Path, *, bank: Path | None = None
) -> dict[str, Any]:
    """Write the weights of a checkpoint as a safetensors file that every command takes.

    Args:
        prefix: what ``open_tf_checkpoint`` takes, or the PyTorch port's ``checkpoint.pth.tar``.
        model: the network of the checkpoint.
        out: the file to write; it appears when it is whole.
        bank: also write the memory bank here: ``rows`` [N, D], and what there is of ``labels``
            [N] and ``clusters`` [H, N].

    Returns:
        {"matched", "left", "missing": names, "global_step", "rows" of the bank or None, "model",
        "out", "from"}.

    Raises:
        UserError: not such a checkpoint, another network, or a file that cannot be written.
    """
    for option, file in (("--out", out), ("--bank", bank)):
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise UserError("TODO", f"{option} {file} is not a file in an existing folder.")
    port = prefix.endswith((".pth.tar", ".pth", ".pt"))
    known = _PORT if port else NETWORKS
    if model not in known:
        raise UserError(
            "TODO",
            f"{'The PyTorch port' if port else 'The reference'} has no network '{model}'; --model"
            f" is one of {', '.join(known)}.{suggest(model, known)}",
        )
    encoder = create_encoder(model, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # missing variables are refused below
        report, rows = (_from_port if port else _from_tf)(prefix, encoder, bank is not None)
    if report.missing:
        raise UserError(
            "TODO",
            f"'{prefix}' lacks {len(report.missing)} variables of {model},"
            f" {report.missing[0]} the first; it is not a whole checkpoint of it.",
        )
    with atomic_write(out) as beside:
        save_weights(beside, encoder, REFERENCE_VIEWS)
    if bank is not None and rows is not None:
        parts = {"rows": rows.rows, "labels": report.labels, "clusters": report.cluster_labels}
        tensors = {name: t.contiguous() for name, t in parts.items() if t is not None}
        with atomic_write(bank) as beside:
            save_file(tensors, beside)
    return {
        "matched": list(report.matched),
        "left": list(report.left),
        "missing": list(report.missing),
        "global_step": report.global_step,
        "rows": None if rows is None else len(rows),
        "model": model,
        "out": str(out),
        "from": prefix,
    }


_PORT = ("preact_resnet18", "resnet18", "resnet50")


def _from_tf(prefix: str, encoder: Encoder, bank: bool) -> tuple[LoadReport, MemoryBank | None]:
    with open_tf_checkpoint(prefix) as checkpoint:
        stored = next((n for n in checkpoint.names if n.endswith("instance/memory_bank")), None)
        rows: MemoryBank | None = None
        if bank:
            if stored is None:
                raise UserError("TODO", f"'{prefix}' holds no memory bank; leave out --bank.")
            rows = MemoryBank(*checkpoint.shape(stored))
        return load_variables(checkpoint, encoder, rows, where=f"'{prefix}'"), rows


def _from_port(prefix: str, encoder: Encoder, bank: bool) -> tuple[LoadReport, MemoryBank | None]:
    rows: MemoryBank | None = None
    if bank:
        stored = read_torch_port(prefix).get("memory_bank")
        if stored is None:
            raise UserError("TODO", f"'{prefix}' holds no memory bank; leave out --bank.")
        rows = MemoryBank(*stored.shape)
    return load_torch_port(prefix, encoder, rows), rows
