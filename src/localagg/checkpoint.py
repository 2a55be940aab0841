"""Run folders and checkpoints: atomic, safe to load, independent of the number of ranks.

A run folder::

    RUN/config.json              the resolved configuration, written once
    RUN/metrics.jsonl            one line a measurement
    RUN/checkpoints/step-N/      model.safetensors, optimizer.pt, bank-0-of-1.safetensors,
                                 clusters.safetensors (once LA has begun), progress.json

Each of R ranks writes its own rows: bank-0-of-R, bank-1-of-R, ..., and clusters-0-of-R, ...; any
number of ranks reads them.

A checkpoint is written as ``.step-N.tmp``, synced to disk and renamed; its name is synced before
older checkpoints are removed. The newest ``step-N`` is complete after a kill or a loss of power at
any moment. Nothing is unpickled: ``optimizer.pt`` is loaded with ``weights_only=True``.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from .bank import MemoryBank
from .config import PretrainConfig, ViewConfig, from_dict, removed_options, to_dict
from .distributed.collectives import World, raise_on_all_ranks
from .errors import UserError
from .io.files import (
    absolute_place,
    atomic_write,
    check_unicode,
    disk_advice,
    noted_place,
    sync_to_disk,
)
from .io.read_errors import RESTORE, convert_damage, convert_newer
from .io.run_lock import LOCK_NAME
from .io.sharded_tensors import find_shards, read_shards, shard_path
from .io.tensor_files import save_pickled, save_tensors
from .models import Encoder, create_encoder, encoder_of

EXPORTED_NAME = "localagg.safetensors"
"""The weights file within a folder of ``localagg export --to hub``."""


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    with atomic_write(path) as beside:
        beside.write_text(json.dumps(value, indent=2) + "\n")


def check_new(run: Path) -> None:
    """Raise UserError if a folder contains a run with a checkpoint, or any other file.

    A run that failed before its first checkpoint has nothing to lose: it can be begun anew.
    """
    check_unicode(run)
    if (run / "config.json").exists():
        if not has_checkpoint(run):
            return
        raise UserError(
            "exists",
            f"'{run}' already contains a run; use --resume {run}, or choose another --out.",
        )
    if run.exists() and (not run.is_dir() or not all(map(_is_left_by_a_kill, run.iterdir()))):
        raise UserError("exists", f"'{run}' exists and is not empty; choose another --out.")


def _is_left_by_a_kill(path: Path) -> bool:
    """Whether a run that was killed before it wrote its configuration leaves this file."""
    if path.name == "checkpoints" and path.is_dir():
        return not any(path.iterdir())
    return path.name in (LOCK_NAME, ".config.json.tmp")


def begin_run(run: Path, config: PretrainConfig, facts: dict[str, Any]) -> None:
    """Create a run folder with its configuration and the facts that a resume checks.

    The metrics of a run that failed there before its first checkpoint are removed.
    """
    if not has_checkpoint(run):
        (run / "metrics.jsonl").unlink(missing_ok=True)
        shutil.rmtree(run / "tensorboard", ignore_errors=True)
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    facts = {**facts, "data_absolute": absolute_place(str(facts.get("data")))}
    write_json(run / "config.json", {**facts, "config": to_dict(config)})
    sync_to_disk(run.absolute().parent)


def read_run(run: str | Path) -> tuple[PretrainConfig, dict[str, Any]]:
    """Return a run's configuration and the facts beside it ("data", "fingerprint", "size",
    "removed": options of earlier versions that it changed).

    Raises UserError if it is not a run folder or its configuration is damaged.
    """
    run = Path(run)
    check_unicode(run)
    path = run / "config.json"
    if not path.exists():
        problem = "is not a run folder (no config.json)" if run.exists() else "does not exist"
        raise UserError("not-found", f"'{run}' {problem}; pass the --out of an earlier pretrain.")
    with convert_damage(path):
        facts = json.loads(path.read_text())
        stored = facts.pop("config")
        if "data" in facts:
            facts["data"] = noted_place(facts["data"], facts.get("data_absolute"))
        with convert_newer(path):
            return from_dict(PretrainConfig, stored), {**facts, "removed": removed_options(stored)}


@contextlib.contextmanager
def convert_write_errors(run: Path, unfinished: Path | None = None) -> Iterator[None]:
    """Convert OSError (disk full, no permission) to UserError, and remove ``unfinished``."""
    try:
        yield
    except OSError as error:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, FileNotFoundError):  # moved while it was written
            _check_in_place(run)
        newest = "no checkpoint was saved yet"
        if has_checkpoint(run):
            newest = f"the last checkpoint, '{latest(run)}', is complete"
        raise UserError(
            "environment",
            f"Writing '{run}' failed ({error.strerror or error}); {newest}."
            f" {disk_advice(error).capitalize()}, then run localagg pretrain --resume {run}",
        ) from None


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
    """Write the checkpoint of a step, remove older ones, and return its folder.

    All ranks call it. Weights and bank of a step never change: where the step was saved before,
    only ``progress`` is rewritten, so that a complete checkpoint exists at every moment.

    Args:
        run, step: the run folder, and the number of optimizer steps done.
        encoder, optimizer, bank: of this rank, which writes its rows of the bank.
        clusters: "labels" [H, n] of these rows; empty before LA.
        progress: JSON values; those of rank 0 are saved.
        views: image settings, stored in the weights file.
        world: the ranks. Default: this process alone.

    Raises:
        UserError: writing failed on some rank. The last checkpoint stays.
    """
    folder = run / "checkpoints" / f"step-{step:09d}"
    beside = folder.with_name(f".{folder.name}.tmp")
    progress = {"step": step, "clustered": bool(clusters), **progress}
    world = world or World()
    exists = world.gather_objects(folder.exists())[0]  # rank 0's view of the disk
    if not exists:
        if world.rank == 0:
            shutil.rmtree(beside, ignore_errors=True)
        world.barrier()
        with raise_on_all_ranks(world, beside), convert_write_errors(run):
            if world.rank == 0:
                _check_in_place(run)
            beside.mkdir(parents=True, exist_ok=True)
            if world.rank == 0:
                save_weights(beside / "model.safetensors", encoder, views)
                save_pickled(beside / "optimizer.pt", optimizer.state_dict())
            _save_rows(beside, bank, clusters, world)
    if world.rank == 0:
        with convert_write_errors(run, None if exists else beside):
            write_json((folder if exists else beside) / "progress.json", progress)
            if not exists:
                sync_to_disk(beside)  # its files were synced as they were written
                os.rename(beside, folder)
                sync_to_disk(folder.parent)
        for old in folder.parent.iterdir():
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
    return folder


def _check_in_place(run: Path) -> None:
    """Raise UserError if a run folder that was begun is gone: a new one would lack its start."""
    if not (run / "config.json").exists():
        raise UserError(
            "not-found",
            f"The run folder '{run}' was moved or deleted during the training; move it back, then"
            f" go on from its last checkpoint with localagg pretrain --resume {run}",
        )


def _save_rows(folder: Path, bank: MemoryBank, clusters: dict[str, Tensor], world: World) -> None:
    place = (world.rank, world.size)
    save_tensors(shard_path(folder, "bank", *place), {"rows": bank.rows})
    if clusters:
        alone = folder / "clusters.safetensors"
        save_tensors(alone if world.size == 1 else shard_path(folder, "clusters", *place), clusters)


def has_checkpoint(run: Path) -> bool:
    """Return whether a run has a complete checkpoint."""
    return any((run / "checkpoints").glob("step-*"))


def latest(run: Path) -> Path:
    """Return the folder of a run's newest complete checkpoint, or raise UserError."""
    if not has_checkpoint(run):
        raise UserError("not-found", f"'{run}' has no checkpoint yet; run it with --resume {run}.")
    return max((run / "checkpoints").glob("step-*"))


def restore(
    folder: Path, *, encoder: Encoder, optimizer: torch.optim.Optimizer, bank: MemoryBank | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load a checkpoint into encoder, optimizer and bank; only this rank's rows are read.

    Returns (clusters of these rows, progress) as they were saved. Raises UserError if a file is
    missing or damaged.
    """
    with convert_damage(folder / "model.safetensors"):
        encoder.load_state_dict(load_file(folder / "model.safetensors"))
    with convert_damage(folder / "optimizer.pt"):
        optimizer.load_state_dict(
            torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
        )
    if bank is None:  # its rows are of other images
        return {}, read_progress(folder)
    with convert_damage(folder / "bank-*.safetensors"):
        bank.rows.copy_(_load_bank_rows(folder, bank.part))
    progress = read_progress(folder)
    with convert_damage(folder / "clusters*.safetensors"):
        clusters = _load_clusters(folder, bank)
        if progress.get("clustered") and not clusters:
            raise FileNotFoundError(errno.ENOENT, "", str(folder / "clusters.safetensors"))
    return clusters, progress


def read_progress(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's step, seconds, unreadable images, and summary of the end."""
    with convert_damage(folder / "progress.json"):
        return json.loads((folder / "progress.json").read_text())


def load_bank(run: Path) -> Tensor:
    """Return the memory bank [N, D] of a run's latest checkpoint; UserError if it is damaged."""
    folder = latest(run)
    fix = "localagg knn --against embeddings does not need the bank"
    with convert_damage(folder, fix):
        return _load_bank_rows(folder, fix=fix)


def _load_bank_rows(folder: Path, part: range | None = None, fix: str = RESTORE) -> Tensor:
    files = find_shards(folder, "bank")
    if not files:
        raise FileNotFoundError(errno.ENOENT, "", str(folder / "bank-0-of-1.safetensors"))
    return read_shards(files, "rows", part=part, fix=fix)


def _load_clusters(folder: Path, bank: MemoryBank) -> dict[str, Tensor]:
    """Return the labels of the bank's rows; empty before LA."""
    alone = folder / "clusters.safetensors"
    if alone.exists() and len(bank.part) == bank.size:
        with convert_damage(alone):
            return load_file(alone)
    files = [alone] if alone.exists() else find_shards(folder, "clusters")
    return {"labels": read_shards(files, "labels", dim=1, part=bank.part)} if files else {}


def save_weights(
    path: Path, encoder: Encoder, views: ViewConfig | None = None, bank: str | None = None
) -> None:
    """Write parameters, statistics and architecture of an encoder as one safetensors file.

    ``views``: image settings of its training. ``bank``: relative path of an imported memory bank.
    """
    normalization = json.dumps(to_dict(encoder.normalization))
    metadata = {"localagg": json.dumps(encoder.spec), "normalization": normalization}
    if views is not None:
        metadata["views"] = json.dumps(to_dict(views))
    if bank is not None:
        metadata["bank"] = bank
    save_tensors(path, encoder.state_dict(), metadata)


def load_encoder(path: str | Path, backbone: nn.Module | None = None) -> Encoder:
    """Load the encoder of a run's latest checkpoint, a weights file or an exported folder.

    It is in eval mode.

    Args:
        path: run folder, weights file or exported folder.
        backbone: the network of a run that was given one in Python; its weights are replaced.

    Raises:
        UserError: there is none, localagg did not write it, it is damaged, or it has another
            backbone.
    """
    path = _exported_file(path)
    if path.is_dir():
        read_run(path)
        path = latest(path) / "model.safetensors"
        if not path.exists():
            raise UserError("damaged", f"'{path}' is missing; {RESTORE}.")
    metadata = read_metadata(path)
    if "localagg" not in metadata:
        raise UserError(
            "unsupported", f"'{path}' was not written by localagg: it names no architecture."
        )
    with convert_damage(path):
        spec = json.loads(metadata["localagg"])
        if backbone is None:
            encoder = create_encoder(**spec)
        else:
            size = from_dict(ViewConfig, json.loads(metadata.get("views", "{}"))).image_size or 224
            encoder = encoder_of(
                backbone, spec["dim"], size, head_layers=spec.get("head_layers", 1)
            )
            _check_same_keys(path, encoder)
        encoder.load_state_dict(load_file(path))
    return encoder.eval()


def _check_same_keys(path: Path, encoder: Encoder) -> None:
    """Raise UserError if a weights file has other tensors than an encoder."""
    targets, found = encoder.state_dict(), load_file(path)
    for key in [*targets, *found]:
        shapes = [tuple(t[key].shape) if key in t else "none" for t in (found, targets)]
        if shapes[0] != shapes[1]:
            raise UserError(
                "mismatch",
                f"'{path}' has {key} of shape {shapes[0]}, the given backbone of shape"
                f" {shapes[1]}; pass the network that the run learned.",
            )


def load_views(path: str | Path) -> ViewConfig | None:
    """Return the image settings of a run folder or weights file; None if it stores none."""
    path = _exported_file(path)
    if path.is_dir():
        return read_run(path)[0].views
    views = read_metadata(path).get("views")
    with convert_damage(path), convert_newer(path):
        return None if views is None else from_dict(ViewConfig, json.loads(views))


def _exported_file(path: str | Path) -> Path:
    """Return the weights file of an exported folder, and any other path as it is."""
    file = Path(path) / EXPORTED_NAME
    return file if file.is_file() else Path(path)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a weights file; UserError if there is none or it is damaged."""
    check_unicode(path)
    if not (path.is_file() or path.is_dir()):
        raise UserError("not-found", f"There is no run folder or weights file '{path}'.")
    with convert_damage(path), open(path, "rb") as file:
        head = file.read(9)
        if head[:2] in (b"PK", b"\x80\x02"):  # torch.save, today and before 1.6
            raise UserError(
                "unsupported",
                f"'{path}' holds weights of another program; start a run from them with"
                f" localagg pretrain --weights {path}.",
            )
    if head[8:] != b"{" and path.suffix != ".safetensors":  # there its JSON header begins
        raise UserError("unsupported", f"'{path}' is no weights file; name one, or a run folder.")
    with convert_damage(path), safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def weights_digest(encoder: Encoder) -> str:
    """Return the SHA-256 of an encoder's architecture and of all its values."""
    digest = hashlib.sha256(json.dumps(encoder.spec, sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
