"""What a run writes and reads: atomic, safe to load, independent of the number of ranks.

A run folder::

    RUN/config.json              the resolved configuration, written once
    RUN/metrics.jsonl            one line a measurement
    RUN/checkpoints/step-N/      model.safetensors, optimizer.pt, bank-0-of-1.safetensors,
                                 clusters.safetensors (once LA has begun), progress.json

Each of R ranks writes its own rows: bank-0-of-R, bank-1-of-R, ..., and clusters-0-of-R, ...; any
number of ranks reads them.

A checkpoint is written beside (``.step-N.tmp``), flushed to disk and renamed, the new name is
flushed too, and then older ones are removed; so the newest folder named ``step-N`` is always whole,
after a kill or a loss of power at any moment. Nothing in it is ever unpickled: ``optimizer.pt`` is
loaded with ``weights_only=True``.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from .bank import MemoryBank
from .config import PretrainConfig, ViewConfig, from_dict, to_dict
from .distributed.collectives import World
from .errors import UserError
from .io.files import atomic_write, sync_to_disk, write_synced
from .io.run_lock import LOCK_NAME
from .io.sharded_tensors import find_shards, read_shards, shard_path
from .io.tensor_files import save_tensors
from .models import Encoder, create_encoder


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside ``path``, flush it to disk and rename."""
    with atomic_write(path) as beside:
        beside.write_text(json.dumps(value, indent=2) + "\n")


def check_new(run: Path) -> None:
    """Make sure that a new run can be written to a folder.

    Raises:
        UserError: it holds another run, or anything else.
    """
    if (run / "config.json").exists():
        raise UserError(
            "TODO", f"'{run}' holds another run; go on with --resume {run}, or name another --out."
        )
    if run.exists() and (not run.is_dir() or any(map(_not_left, run.iterdir()))):
        raise UserError("TODO", f"'{run}' exists and is not empty; name another --out.")


def _not_left(path: Path) -> bool:
    """Whether a file is something else than a run leaves that was killed before its first word."""
    if path.name == "checkpoints" and path.is_dir():
        return any(path.iterdir())
    return path.name not in (LOCK_NAME, ".config.json.tmp")


def begin_run(run: Path, config: PretrainConfig, facts: dict[str, Any]) -> None:
    """Make a run folder with its configuration and the facts that a resume must find again."""
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_json(run / "config.json", {**facts, "config": to_dict(config)})
    sync_to_disk(run.absolute().parent)


def read_run(run: Path) -> tuple[PretrainConfig, dict[str, Any]]:
    """The configuration of a run and the facts beside it ("data", "fingerprint", "size").

    Raises:
        UserError: not a run folder.
    """
    if not (run / "config.json").exists():
        what = "is not a run folder (it has no config.json)" if run.exists() else "does not exist"
        raise UserError("TODO", f"'{run}' {what}; name the --out of an earlier pretrain.")
    try:
        facts = json.loads((run / "config.json").read_text())
        return from_dict(PretrainConfig, facts.pop("config")), facts
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("TODO", f"'{run / 'config.json'}' cannot be read: {error}.") from None


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
    world: World | None = None,
) -> Path:
    """Write the checkpoint of a step and remove older ones. All ranks call it.

    Weights and bank of a step never change, so where the step has been saved before only
    ``progress`` is written anew: at no moment is there no whole checkpoint.

    Args:
        run: the run folder.
        step: optimizer steps done.
        encoder: its parameters and batch-norm statistics.
        optimizer: its state.
        bank: the memory bank, this rank's rows.
        clusters: "labels" [H, n] of these rows, and perhaps late ones; empty before LA.
        progress: JSON values; rank 0's count.
        views: noted in the weights file.
        world: the ranks. None: this process alone.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: the disk is full, or otherwise refuses, on any rank; what was half written is
            removed, and the checkpoint before stays.
    """
    folder = run / "checkpoints" / f"step-{step:09d}"
    beside = folder.with_name(f".{folder.name}.tmp")
    progress, world = {"step": step, **progress}, world or World()
    there = world.gather_objects(folder.exists())[0]  # rank 0's view of the disk
    if not there:
        if world.rank == 0:
            shutil.rmtree(beside, ignore_errors=True)
        world.barrier()
        with _of_all_ranks(world, beside), convert_write_errors(run):
            beside.mkdir(parents=True, exist_ok=True)
            if world.rank == 0:
                save_weights(beside / "model.safetensors", encoder, views)
                _save_optimizer(beside / "optimizer.pt", optimizer)
            _save_rows(beside, bank, clusters, world)
    if world.rank == 0:
        with convert_write_errors(run, None if there else beside):
            if there:
                write_json(folder / "progress.json", progress)
            else:
                write_json(beside / "progress.json", progress)
                sync_to_disk(beside)  # its files were flushed as they were written
                os.rename(beside, folder)
                sync_to_disk(folder.parent)
        for old in folder.parent.iterdir():
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
    return folder


def _save_rows(folder: Path, bank: MemoryBank, clusters: dict[str, Tensor], world: World) -> None:
    place = (world.rank, world.size)
    save_tensors(shard_path(folder, "bank", *place), {"rows": bank.rows})
    if clusters:
        whole_file = folder / "clusters.safetensors"
        file = whole_file if world.size == 1 else shard_path(folder, "clusters", *place)
        save_tensors(file, clusters)


@contextlib.contextmanager
def _of_all_ranks(world: World, half: Path) -> Iterator[None]:
    """What is written by all ranks, or else by none: if one fails, rank 0 removes ``half``.

    Raises:
        UserError: on every rank, what the first rank that failed has to say.
    """
    trouble = None
    try:
        yield
    except UserError as error:
        trouble = str(error)
    if told := [words for words in world.gather_objects(trouble) if words is not None]:
        if world.rank == 0:
            shutil.rmtree(half, ignore_errors=True)
        raise UserError("TODO", told[0])


def _save_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Through memory: on a full disk torch's own writer hides what the system said."""
    state = io.BytesIO()
    torch.save(optimizer.state_dict(), state)
    write_synced(path, [state.getbuffer()])


@contextlib.contextmanager
def convert_write_errors(run: Path, half: Path | None = None) -> Iterator[None]:
    """A full disk, or one that otherwise refuses, becomes one sentence.

    Args:
        run: the run folder that is written to.
        half: a folder to remove then.

    Raises:
        UserError: instead of what the system raised.
    """
    try:
        yield
    except OSError as error:
        if half is not None:
            shutil.rmtree(half, ignore_errors=True)
        newest = "nothing was saved yet"
        if has_checkpoint(run):
            newest = f"the last checkpoint, '{latest(run)}', is whole"
        raise UserError(
            "TODO",
            f"'{run}' cannot be written to ({error.strerror or error}); {newest}. Make room, then"
            f" go on with localagg pretrain --resume {run}",
        ) from None


def has_checkpoint(run: Path) -> bool:
    """Whether a run has a whole checkpoint."""
    return any((run / "checkpoints").glob("step-*"))


def latest(run: Path) -> Path:
    """The newest whole checkpoint of a run.

    Raises:
        UserError: there is none.
    """
    if not has_checkpoint(run):
        raise UserError("TODO", f"'{run}' holds no checkpoint yet; go on with --resume {run}.")
    return max((run / "checkpoints").glob("step-*"))


def restore(
    folder: Path, *, encoder: Encoder, optimizer: torch.optim.Optimizer, bank: MemoryBank
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load a checkpoint into encoder, optimizer and bank, whose rows alone are read.

    Returns:
        (clusters of these rows, progress) as they were saved.

    Raises:
        UserError: a file of it is missing or damaged.
    """
    try:
        encoder.load_state_dict(load_file(folder / "model.safetensors"))
        optimizer.load_state_dict(
            torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
        )
        bank.rows.copy_(_read_bank(folder, bank.part))
        return _read_clusters(folder, bank), read_progress(folder)
    except (
        *(OSError, SafetensorError, RuntimeError, ValueError, KeyError),
        *(EOFError, pickle.UnpicklingError),
    ) as error:
        reason = str(error).splitlines()[0]
        raise UserError("TODO", f"The checkpoint '{folder}' is damaged: {reason}") from None


def read_progress(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: step, seconds, unreadable images, summary of the end.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return json.loads((folder / "progress.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError("TODO", f"The checkpoint '{folder}' is damaged: {error}") from None


def save_weights(path: Path, encoder: Encoder, views: ViewConfig | None = None) -> None:
    """An encoder as one safetensors file that says itself which architecture it is.

    Args:
        path: the file to write.
        encoder: its parameters and batch-norm statistics.
        views: how images were shown to it; measurements show them the same way.
    """
    metadata = {"localagg": json.dumps(encoder.spec)}
    if views is not None:
        metadata["views"] = json.dumps(to_dict(views))
    save_tensors(path, encoder.state_dict(), metadata)


def load_encoder(path: Path) -> Encoder:
    """The encoder of a run folder's latest checkpoint, or of a weights file.

    Raises:
        UserError: no such file, not ours, or damaged.
    """
    if path.is_dir():
        read_run(path)
        path = latest(path) / "model.safetensors"
    if not path.exists():
        raise UserError("TODO", f"There is no run folder or weights file '{path}'.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        encoder = create_encoder(**json.loads(metadata["localagg"]))
        encoder.load_state_dict(load_file(path))
    except KeyError:
        raise UserError(
            "TODO", f"'{path}' was not written by localagg: it names no architecture."
        ) from None
    except (SafetensorError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError("TODO", f"The weights '{path}' are damaged: {reason}") from None
    return encoder


def load_views(path: Path) -> ViewConfig | None:
    """How images were shown to the encoder of a run folder or weights file, if that is known.

    Raises:
        UserError: no such file, or damaged.
    """
    if path.is_dir():
        return read_run(path)[0].views
    if not path.exists():
        raise UserError("TODO", f"There is no run folder or weights file '{path}'.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("views")
        return None if text is None else from_dict(ViewConfig, json.loads(text))
    except (SafetensorError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError("TODO", f"The weights '{path}' are damaged: {reason}") from None


def weights_digest(encoder: Encoder) -> str:
    """SHA-256 of an encoder's architecture and of all its values."""
    digest = hashlib.sha256(json.dumps(encoder.spec, sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_bank(run: Path) -> Tensor:
    """The memory bank [N, D] of a run's latest checkpoint."""
    return _read_bank(latest(run))


def _read_bank(folder: Path, part: range | None = None) -> Tensor:
    files = find_shards(folder, "bank")
    if not files:
        raise FileNotFoundError("it has no 'bank-0-of-1.safetensors'")
    return read_shards(files, "rows", part=part)


def _read_clusters(folder: Path, bank: MemoryBank) -> dict[str, Tensor]:
    """Labels of the bank's rows, and late ones where they were saved; none before LA."""
    whole_file = folder / "clusters.safetensors"
    if whole_file.exists() and len(bank.part) == bank.size:
        return load_file(whole_file)
    files = [whole_file] if whole_file.exists() else find_shards(folder, "clusters")
    return {"labels": read_shards(files, "labels", dim=1, part=bank.part)} if files else {}
