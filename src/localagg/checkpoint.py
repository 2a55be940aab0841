"""What a run writes and reads: atomic, safe to load, independent of the number of ranks.

A run folder::

    RUN/config.json              the resolved configuration, written once
    RUN/metrics.jsonl            one line a measurement
    RUN/checkpoints/step-N/      model.safetensors, optimizer.pt, bank-0-of-1.safetensors,
                                 clusters.safetensors (once LA has begun), progress.json

A checkpoint is written beside (``.step-N.tmp``), flushed to disk and renamed, then older ones are
removed; so a folder named ``step-N`` is always whole. Nothing in it is ever unpickled:
``optimizer.pt`` is loaded with ``weights_only=True``.
"""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .bank import MemoryBank
from .config import PretrainConfig, UserError, ViewConfig, from_dict, to_dict
from .files import flush, whole
from .models import Encoder, encoder_from_json, spec_to_json


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside ``path``, flush it to disk and rename."""
    with whole(path) as beside:
        beside.write_text(json.dumps(value, indent=2) + "\n")


def check_new(run: Path) -> None:
    """Make sure that a new run can be written to a folder.

    Raises:
        UserError: it holds another run, or anything else.
    """
    if (run / "config.json").exists():
        raise UserError(
            f"'{run}' holds another run; go on with --resume {run}, or name another --out."
        )
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UserError(f"'{run}' exists and is not empty; name another --out.")


def begin_run(run: Path, config: PretrainConfig, facts: dict[str, Any]) -> None:
    """Make a run folder with its configuration and the facts that a resume must find again."""
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_json(run / "config.json", {**facts, "config": to_dict(config)})


def read_run(run: Path) -> tuple[PretrainConfig, dict[str, Any]]:
    """The configuration of a run and the facts beside it ("data", "fingerprint", "size").

    Raises:
        UserError: not a run folder.
    """
    if not (run / "config.json").exists():
        what = "is not a run folder (it has no config.json)" if run.exists() else "does not exist"
        raise UserError(f"'{run}' {what}; name the --out of an earlier pretrain.")
    try:
        facts = json.loads((run / "config.json").read_text())
        return from_dict(PretrainConfig, facts.pop("config")), facts
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{run / 'config.json'}' cannot be read: {error}.") from None


def save(
    run: Path,
    step: int,
    *,
    encoder: Encoder,
    optimizer: torch.optim.Optimizer,
    bank: MemoryBank,
    clusters: dict[str, Tensor],
    progress: dict[str, Any],
    views: ViewConfig | None = None,
) -> Path:
    """Write the checkpoint of a step and remove older ones.

    Args:
        run: the run folder.
        step: optimizer steps done.
        encoder: its parameters and batch-norm statistics.
        optimizer: its state.
        bank: the memory bank, one shard of one.
        clusters: "labels" [H, N] and perhaps "centroids-h"; empty before LA.
        progress: JSON values.
        views: noted in the weights file.

    Returns:
        The checkpoint's folder.
    """
    folder = run / "checkpoints" / f"step-{step:09d}"
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    save_weights(beside / "model.safetensors", encoder, views)
    torch.save(optimizer.state_dict(), beside / "optimizer.pt")
    save_file({"rows": _plain(bank.rows)}, beside / "bank-0-of-1.safetensors")
    if clusters:
        tensors = {name: _plain(tensor) for name, tensor in clusters.items()}
        save_file(tensors, beside / "clusters.safetensors")
    write_json(beside / "progress.json", {"step": step, **progress})
    for file in beside.iterdir():
        flush(file)
    flush(beside)
    if folder.exists():  # the same step again, after a resume
        shutil.rmtree(folder)
    os.rename(beside, folder)
    flush(folder.parent)
    for old in folder.parent.iterdir():
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def has_checkpoint(run: Path) -> bool:
    """Whether a run has a whole checkpoint."""
    return any((run / "checkpoints").glob("step-*"))


def latest(run: Path) -> Path:
    """The newest whole checkpoint of a run.

    Raises:
        UserError: there is none.
    """
    if not has_checkpoint(run):
        raise UserError(f"'{run}' holds no checkpoint; start it again with another --out.")
    return max((run / "checkpoints").glob("step-*"))


def restore(
    folder: Path, *, encoder: Encoder, optimizer: torch.optim.Optimizer, bank: MemoryBank
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load a checkpoint into encoder, optimizer and bank.

    Returns:
        (clusters, progress) as they were saved.

    Raises:
        UserError: a file of it is missing or damaged.
    """
    try:
        encoder.load_state_dict(load_file(folder / "model.safetensors"))
        optimizer.load_state_dict(
            torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
        )
        bank.rows.copy_(load_file(folder / "bank-0-of-1.safetensors")["rows"])
        clusters = folder / "clusters.safetensors"
        progress = read_progress(folder)
        return (load_file(clusters) if clusters.exists() else {}), progress
    except (
        *(OSError, SafetensorError, RuntimeError, ValueError, KeyError),
        *(EOFError, pickle.UnpicklingError),
    ) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"The checkpoint '{folder}' is damaged: {reason}") from None


def read_progress(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: step, seconds, unreadable images, summary of the end.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return json.loads((folder / "progress.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"The checkpoint '{folder}' is damaged: {error}") from None


def save_weights(path: Path, encoder: Encoder, views: ViewConfig | None = None) -> None:
    """An encoder as one safetensors file that says itself which architecture it is.

    Args:
        path: the file to write.
        encoder: its parameters and batch-norm statistics.
        views: how images were shown to it; measurements show them the same way.
    """
    tensors = {name: _plain(tensor) for name, tensor in encoder.state_dict().items()}
    metadata = {"localagg": spec_to_json(encoder)}
    if views is not None:
        metadata["views"] = json.dumps(to_dict(views))
    save_file(tensors, path, metadata=metadata)


def load_encoder(path: Path) -> Encoder:
    """The encoder of a run folder's latest checkpoint, or of a weights file.

    Raises:
        UserError: no such file, not ours, or damaged.
    """
    if path.is_dir():
        read_run(path)
        path = latest(path) / "model.safetensors"
    if not path.exists():
        raise UserError(f"There is no run folder or weights file '{path}'.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        encoder = encoder_from_json(metadata["localagg"])
        encoder.load_state_dict(load_file(path))
    except KeyError:
        raise UserError(
            f"'{path}' was not written by localagg: it names no architecture."
        ) from None
    except (SafetensorError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"The weights '{path}' are damaged: {reason}") from None
    return encoder


def load_views(path: Path) -> ViewConfig | None:
    """How images were shown to the encoder of a run folder or weights file, if that is known.

    Raises:
        UserError: no such file, or damaged.
    """
    if path.is_dir():
        return read_run(path)[0].views
    if not path.exists():
        raise UserError(f"There is no run folder or weights file '{path}'.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("views")
        return None if text is None else from_dict(ViewConfig, json.loads(text))
    except (SafetensorError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"The weights '{path}' are damaged: {reason}") from None


def weights_digest(encoder: Encoder) -> str:
    """SHA-256 of an encoder's architecture and of all its values."""
    digest = hashlib.sha256(json.dumps(encoder.spec, sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_bank(run: Path) -> Tensor:
    """The memory bank [N, D] of a run's latest checkpoint."""
    return load_file(latest(run) / "bank-0-of-1.safetensors")["rows"]


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
