"""Linear read-outs: measure how well labels are predicted from the layers of a frozen encoder.

One head a layer, all trained in one pass over the images. A transfer folder::

    OUT/transfer.json            configuration, weights, data and their fingerprints, written once
    OUT/metrics.jsonl            one line a measurement
    OUT/state.pt                 heads, optimizer, step: replaced atomically, loaded with
                                 ``weights_only=True``
    OUT/heads.safetensors        at the end: LAYER.weight [C, F] and LAYER.bias [C]
    OUT/encoder.safetensors      at the end of a fine-tuning
    OUT/results.json             at the end: the result of :func:`transfer`
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...checkpoint import check_new, weights_digest, write_json
from ...config import TransferConfig, check_argument_types, from_dict, to_dict
from ...data.loading.workers import convert_worker_death
from ...distributed.collectives import World
from ...distributed.process_group import join_process_group
from ...distributed.signals import StopRequest, handle_stop_signals
from ...errors import UserError, counted
from ...io.console import notify
from ...io.files import absolute_place, check_writable, noted_place
from ...io.read_errors import convert_damage, convert_newer
from ...models import Encoder
from ..results.protocols import describe_protocol
from .linear_heads import cross_entropies, read_heads
from .linear_probe import LinearProbe
from .readout_inputs import LabeledSplits, open_labeled, resolve_transfer, take_encoder
from .transfer_recorder import TransferRecorder, transfer_protocol

_RANK_TIMEOUT = 6 * 3600.0  # seconds: rank 0 first extracts the features of all images


@check_argument_types
def transfer(
    config: TransferConfig,
    weights: str | Path | Encoder,
    data: str | Path,
    out: str | Path | None = None,
    heads: str | Path | None = None,
) -> dict[str, Any]:
    """Train linear heads on an encoder's layers and measure them on the held-out images.

    The reference's protocol: frozen layers in inference mode, random views, SGD whose rate drops
    on the step after a boundary, all heads in one pass. Each head has its own parameters, so its
    weights do not depend on the other heads. All held-out images count, the last partial batch too
    (deviation: the reference drops it). Features under fixed views are cached; see
    ``feature_cache``.

    Args:
        config: options.
        weights: run folder or weights file, whose views replace a configuration's default views,
            and whose view sizes replace missing ones; or an encoder, which is not changed.
        data: data URI with labels, and a held-out split.
        out: folder to make. Default: only cached features are written.
        heads: file of trained heads, which are measured without training: ``heads.safetensors`` of
            a transfer, or of ``import-tf --heads``.

    Returns:
        {"layers": {layer: {"top1", "top5", "ten_crop_top1", "ten_crop_top5": 0-1}}, "data", "run",
        "weights_digest", "device", "precision", "protocol": fields of :mod:`.protocols`, "epochs",
        "steps", "seconds", "images": training images, "measured": held-out images, "unreadable":
        images excluded from both, "classes"}.

    Raises:
        UserError: no labels, no held-out split, one class, mismatched classes, or options that do
            not fit them.
        Interrupted: Ctrl-C; with ``out`` the state has been saved.
    """
    run = None if out is None else Path(out)
    with join_process_group(_RANK_TIMEOUT, _how_to_resume(run)) as world:
        if run is not None and world.rank == 0:
            if (run / "transfer.json").exists():
                raise UserError(
                    "exists", f"'{run}' contains a transfer; use --resume {run}, or another --out."
                )
            check_new(run)
            check_writable(run)
        world.barrier()
        encoder, path = take_encoder(weights)
        splits = world.rank_zero_first(lambda: open_labeled(os.fspath(data)))
        trained = None if heads is None else Path(heads)
        return read_out(config, encoder, path, splits, run, trained, world)


def _how_to_resume(run: Path | None) -> str:
    return "start again" if run is None else f"resume with localagg transfer --resume {run}"


def read_out(
    config: TransferConfig,
    encoder: Encoder,
    path: Path | None,
    splits: LabeledSplits,
    run: Path | None = None,
    heads: Path | None = None,
    world: World | None = None,
) -> dict[str, Any]:
    """Run :func:`transfer` on open splits and an own copy of the encoder, found at ``path``."""
    given = None if heads is None else read_heads(heads)
    if given is not None and config.layers is None:
        config = replace(config, layers=tuple({name.rpartition(".")[0]: 0 for name in given}))
    world = world or World()
    resolved = resolve_transfer(config, encoder, path, splits.source)
    _check_ranks(resolved, world)
    facts = {
        "weights": path if path is None else str(path),
        "weights_digest": weights_digest(encoder),
        "data": splits.data,
        "absolute": {
            "weights": None if path is None else absolute_place(str(path)),
            "data": absolute_place(splits.data),
        },
        "fingerprints": splits.fingerprints() if run else [],
        "size": len(splits.source),
    }
    doing = "Training heads" if given is None else f"Measuring the heads of '{heads}'"
    notify(
        f"{doing} on {', '.join(resolved.layers or ())} with {len(splits.source):,} images"
        f" of {splits.classes:,} classes, measured on {len(splits.held_out):,} held-out images:"
        f" {describe_protocol(transfer_protocol(resolved, trained=given is None))}."
    )
    probe = LinearProbe(resolved, encoder, splits, facts, world)
    if given is not None:
        probe.readout.load_heads(given, str(heads))
    if run is not None and world.rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "transfer.json", {**facts, "config": to_dict(resolved)})
    if given is not None:
        with convert_worker_death(), TransferRecorder(probe, run) as recorder:
            return recorder.finish()
    return _train(probe, run)


def _check_ranks(config: TransferConfig, world: World) -> None:
    if world.size > 1 and config.finetune:
        raise UserError("option-conflict", "--finetune runs in one process; omit --processes.")
    if world.size > (config.batch_size or world.size):
        raise UserError(
            "option-conflict",
            f"--batch-size {config.batch_size} is smaller than the number of processes,"
            f" {world.size}; use fewer processes.",
        )


@check_argument_types
def resume_transfer(
    out: str | Path,
    *,
    weights: str | Path | Encoder | None = None,
    data: str | Path | None = None,
    workers: int | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Resume a transfer from its last state; its end equals that of an uninterrupted one.

    Args:
        out: folder of the transfer; a finished one returns its result.
        weights: another location of the same weights. Default: the original one.
        data: another location of the same images. Default: the original one.
        workers: another number of processes. Default: as before.
        device: another device. Default: as before.

    Raises:
        UserError: not a transfer, other weights, other images, or a damaged state.
        Interrupted: Ctrl-C; the state has been saved.
    """
    run = Path(out)
    with join_process_group(_RANK_TIMEOUT, _how_to_resume(run)) as world:
        return _resume(run, weights, data, workers, device, world)


def _resume(
    run: Path,
    weights: str | Path | Encoder | None,
    data: str | Path | None,
    workers: int | None,
    device: str | None,
    world: World,
) -> dict[str, Any]:
    config, facts = _read_transfer(run)
    if (run / "results.json").exists():
        notify(f"'{run}' has already finished its {counted(config.epochs, 'epoch')}.")
        with convert_damage(run / "results.json", "delete it, then resume again"):
            finished = json.loads((run / "results.json").read_text())
            finished["layers"].items()
        own = {"device": config.device, "precision": config.precision}  # of earlier versions
        return {"weights_digest": facts["weights_digest"], **own, **finished}
    absolute = facts.get("absolute", {})
    if weights is None and facts["weights"] is not None:
        weights = noted_place(facts["weights"], absolute.get("weights"))
    if weights is None:
        raise UserError(
            "option-missing", f"'{run}' began with an encoder, not a file; resume it with weights."
        )
    encoder, _ = take_encoder(weights)
    if weights_digest(encoder) != facts["weights_digest"]:
        raise UserError(
            "mismatch", f"The weights differ from those that '{run}' began with; start a new --out."
        )
    data = os.fspath(data or noted_place(facts["data"], absolute.get("data")))
    splits = world.rank_zero_first(lambda: open_labeled(data))
    _check_ranks(config, world)
    if splits.fingerprints() != facts["fingerprints"]:
        raise UserError(
            "mismatch",
            f"'{data}' ({len(splits.source):,} images) differs from the data that '{run}' began"
            f" with ({facts['size']:,} images); start a new transfer with another --out.",
        )
    if workers is not None:
        config = replace(config, workers=workers)
    if device is not None:
        config = from_dict(TransferConfig, {**to_dict(config), "device": device})
    probe = LinearProbe(config, encoder, splits, facts, world)
    probe.restore(run)
    notify(f"Resuming '{run}' after step {probe.step:,}.")
    return _train(probe, run)


def _train(probe: LinearProbe, run: Path | None) -> dict[str, Any]:
    """Train the heads: the loop, in the order in which a batch of images travels."""
    schedule, network = probe.schedule, probe.network
    recorder = TransferRecorder(probe, run)

    with convert_worker_death(), recorder, handle_stop_signals() as signals:
        network.train()
        stop = signals
        while probe.step < schedule.total_steps:
            epoch, first, _ = schedule.position(probe.step)
            batches = probe.batches(epoch, first)
            for _ in range(probe.step, schedule.end_of_epoch(probe.step)):
                index, images = next(batches)  # views, or their cached features
                losses = cross_entropies(network(images), probe.labels[index])
                for group in probe.optimizer.param_groups:
                    group["lr"] = schedule.learning_rate(probe.step)
                losses = probe.backward(losses)
                probe.optimizer.step()
                probe.optimizer.zero_grad()
                probe.step += 1
                stop = _agree(signals, probe.world)
                recorder.after_step(epoch, losses, stop)
            due = probe.config.eval_every and (epoch + 1) % probe.config.eval_every == 0
            last = probe.step == schedule.total_steps  # measured by finish()
            if due and not last:
                recorder.measured(epoch, probe.measure(ten_crop=False)[0])
            recorder.end_of_epoch(epoch, bool(due) or last, stop)
        return recorder.finish()


def _agree(signals: StopRequest, world: World) -> StopRequest:
    """Return a stop request that is the same on all ranks. One all-reduce of a number."""
    if world.size == 1:
        return signals
    stop = StopRequest()
    stop.status = int(world.maximum(torch.tensor([signals.status])))
    stop.requested = stop.status > 0
    return stop


def _read_transfer(run: Path) -> tuple[TransferConfig, dict[str, Any]]:
    path = run / "transfer.json"
    if not path.exists():
        fault = "is not a transfer (no transfer.json)" if run.exists() else "does not exist"
        raise UserError("not-found", f"'{run}' {fault}; name the --out of an earlier transfer.")
    try:
        facts = json.loads(path.read_text())
        with convert_newer(path):
            return from_dict(TransferConfig, facts.pop("config")), facts
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("damaged", f"'{path}' cannot be read: {error}.") from None
