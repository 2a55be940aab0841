"""The training state of an imported checkpoint, which ``pretrain --start`` continues.

``import-tf --out WEIGHTS --bank BANK`` writes two files; the metadata of WEIGHTS name BANK, which
has ``rows`` [N, D], and if the checkpoint has them ``labels`` [N], ``clusters`` [H, N], momenta as
``momentum.PARAMETER``, and in its metadata ``step``.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..bank import MemoryBank
from ..checkpoint import read_metadata
from ..errors import UserError
from ..io.files import atomic_write
from ..io.tensor_files import save_tensors
from ..models import Encoder
from .tf_variables import LoadReport

_MOMENTUM = "momentum."
_FEWEST_EQUAL = 0.9  # share of equal labels; the reference may miss some images of an epoch


def save_start_state(path: Path, bank: MemoryBank, report: LoadReport) -> None:
    """Write bank, labels, clusterings, momenta and step of a loaded checkpoint, atomically."""
    parts = {"rows": bank.rows, "labels": report.labels, "clusters": report.cluster_labels}
    parts |= {_MOMENTUM + name: value for name, value in report.momentum.items()}
    metadata = {} if report.global_step is None else {"step": str(report.global_step)}
    with atomic_write(path) as temporary:
        save_tensors(temporary, {k: v for k, v in parts.items() if v is not None}, metadata)


def read_start_network(
    start: Path, images: int, labels: Tensor | None
) -> tuple[dict[str, Any], str]:
    """Check that an imported checkpoint belongs to the images, and return its network.

    Args:
        start: weights file.
        images: N.
        labels: class of each image, int64 [N], -1 if unknown.

    Returns:
        ({"model", "dim"}, a sentence on the order of the images).

    Raises:
        UserError: no bank beside the weights, another number of rows, or labels in another order.
    """
    metadata = read_metadata(start)
    if "bank" not in metadata:
        raise UserError(
            "unsupported",
            f"--start '{start}' has no memory bank; import the checkpoint again with localagg"
            f" import-tf --bank FILE, or learn from the weights alone with --weights {start}.",
        )
    with _open_bank(start) as file:
        rows = file.get_slice("rows").get_shape()[0]
        stored = file.get_tensor("labels") if "labels" in file.keys() else None  # noqa: SIM118
    if rows != images:
        raise UserError(
            "mismatch",
            f"--start '{start}' learned from {rows:,} images, and --data has {images:,}; name the"
            " images that it learned from.",
        )
    spec = json.loads(metadata["localagg"])
    return {key: spec[key] for key in ("model", "dim")}, _check_order(start, stored, labels)


def _check_order(start: Path, stored: Tensor | None, labels: Tensor | None) -> str:
    """Compare the classes of bank rows and images; the reference stores 0 for unseen images."""
    known = torch.zeros(0, dtype=torch.bool)
    if stored is not None and labels is not None:
        known = (stored != 0) & (labels >= 0)
    if stored is None or labels is None or not known.any():
        return (
            f"The order of the images cannot be checked, as --data or '{start}' has no labels: row"
            " i of the bank is taken for image i. Read the TFRecords that the checkpoint learned"
            " from, or write the same ones with localagg pack --like reference."
        )
    equal = (stored == labels)[known].float().mean().item()
    if equal < _FEWEST_EQUAL:
        raise UserError(
            "mismatch",
            f"--start '{start}' has its images in another order than --data: {equal:.0%} of the"
            f" {int(known.sum()):,} labels in its bank are equal. Name the TFRecords that it"
            " learned from, or write the same ones with localagg pack --like reference.",
        )
    return f"{equal:.1%} of the labels in the bank of '{start}' are those of the images."


def load_start_state(
    start: Path, encoder: Encoder, optimizer: torch.optim.Optimizer, bank: MemoryBank
) -> tuple[int, Tensor | None]:
    """Load bank rows and momenta; parameters without a stored momentum begin at zero.

    Args:
        start: weights file, whose weights the encoder already has.
        encoder, optimizer: of this rank.
        bank: of this rank, which reads its rows.

    Returns:
        (steps done, cluster labels int32 [H, n] of this rank's rows). Labels are None if the
        checkpoint has none, or those that the reference starts with: each image its own cluster.
    """
    part = slice(bank.part.start, bank.part.stop)
    with _open_bank(start) as file:
        names = set(file.keys())
        bank.rows.copy_(file.get_slice("rows")[part])
        clusters = file.get_slice("clusters")[:, part] if "clusters" in names else None
        momenta = {name for name in names if name.startswith(_MOMENTUM)}
        if momenta:
            for name, parameter in encoder.named_parameters():
                key = _MOMENTUM + name
                value = torch.zeros_like(parameter)
                if key in momenta:
                    value.copy_(file.get_tensor(key))
                optimizer.state[parameter]["momentum_buffer"] = value
        step = int((file.metadata() or {}).get("step", 0))
    if clusters is not None and torch.equal(clusters[0], torch.arange(part.start, part.stop)):
        clusters = None
    return step, clusters


@contextlib.contextmanager
def _open_bank(start: Path) -> Iterator[Any]:
    path = start.parent / read_metadata(start)["bank"]
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise UserError(
            "not-found",
            f"'{path}', the memory bank of '{start}', is missing; put it there, or import the"
            " checkpoint again.",
        ) from None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            "damaged", f"'{path}' is damaged ({error}); import the checkpoint again."
        ) from None


def bank_place(out: Path, bank: Path) -> str:
    """Return the path of a bank relative to its weights file."""
    return os.path.relpath(bank.absolute(), out.absolute().parent)
