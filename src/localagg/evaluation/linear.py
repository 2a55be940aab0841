"""Linear read-outs: how well labels can be told from the layers of an encoder that is frozen.

One head a layer, all trained in one pass over the images. The loop reads as pretraining's does; a
transfer folder::

    OUT/transfer.json            configuration, weights, data and their fingerprints, written once
    OUT/metrics.jsonl            one line a measurement
    OUT/state.pt                 heads, optimizer, step: replaced as a whole, loaded with
                                 ``weights_only=True``
    OUT/heads.safetensors        at the end: LAYER.weight [C, F] and LAYER.bias [C]
    OUT/encoder.safetensors      at the end of a fine-tuning
    OUT/results.json             at the end: what :func:`transfer` returns
"""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint import check_new, save_weights, weights_digest, write_json
from ..config import TransferConfig, from_dict, option_names, option_value, to_dict
from ..data.loading.workers import convert_worker_death
from ..distributed.signals import StopRequest, handle_stop_signals
from ..errors import UserError
from ..io.console import notify, progress_bar
from ..io.metrics_log import MetricsLog
from ..models import Encoder
from .feature_cache import is_fixed
from .linear_heads import cross_entropies
from .linear_probe import LinearProbe
from .readout_inputs import LabeledSplits, open_labeled, resolve_transfer, take_encoder, usual_drops


def transfer(
    config: TransferConfig, weights: str | Path | Encoder, data: str, out: str | Path | None = None
) -> dict[str, Any]:
    """Train linear heads on an encoder's layers and measure them on the held-out images.

    The reference's protocol: frozen layers in inference mode, random views, SGD whose rate drops
    on the step after a boundary, all heads in one pass. As each head has its own parameters, its
    weights are those it would have alone. All held-out images count, the last partial batch too
    (deviation: the reference drops it). Features under fixed views are computed once where they fit
    ``cache_gb`` (see ``features``): of the held-out images' center crops, and of the training
    images' if nothing about their views is random.

    Args:
        config: what to do.
        weights: run folder or weights file, whose views are taken over where the configuration
            leaves all as they are, and else their sizes; or an encoder, which is left as it is.
        data: data URI with labels, and a held-out split.
        out: folder to make. None: nothing is written but kept features.

    Returns:
        {"layers": {layer: {"top1", "top5", "ten_crop_top1", "ten_crop_top5": 0-1}}, "data", "run",
        "weights_digest", "protocol", "epochs", "steps", "seconds", "images": learned from,
        "measured": held-out images, "unreadable": images left out of both, "classes"}.

    Raises:
        UserError: no labels, no held-out split, one class, unlike classes, or options that do not
            fit them.
        Interrupted: Ctrl-C; with ``out`` the state has been saved.
    """
    run = None if out is None else Path(out)
    if run is not None:
        _check_new(run)
    encoder, path = take_encoder(weights)
    return read_out(config, encoder, path, open_labeled(data), run)


def read_out(
    config: TransferConfig,
    encoder: Encoder,
    path: Path | None,
    labelled: LabeledSplits,
    run: Path | None = None,
) -> dict[str, Any]:
    """:func:`transfer` of images that are open.

    Args:
        config: what to do.
        encoder: its own copy; fine-tuning changes it.
        path: where it was found.
        labelled: the images.
        run: folder to make, not there yet.
    """
    resolved = resolve_transfer(config, encoder, path, labelled.source)
    facts = {
        "weights": path if path is None else str(path),
        "weights_digest": weights_digest(encoder),
        "data": labelled.data,
        "fingerprints": labelled.fingerprints() if run else [],
        "size": len(labelled.source),
    }
    notify(
        f"Reading out {', '.join(resolved.layers or ())} of {len(labelled.source):,} images of"
        f" {labelled.classes:,} classes, measured on {len(labelled.held_out):,}:"
        f" {protocol(resolved)}."
    )
    probe = LinearProbe(resolved, encoder, labelled, facts)
    if run is not None:
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "transfer.json", {**facts, "config": to_dict(resolved)})
    return _learn(probe, run)


def resume_transfer(
    out: str | Path,
    *,
    weights: str | Path | Encoder | None = None,
    data: str | None = None,
    workers: int | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Go on with a transfer from its last state; the end is that of one never stopped.

    Args:
        out: the folder of the transfer.
        weights: another place of the same weights. None: where the transfer found them.
        data: another place of the same images. None: where the transfer found them.
        workers: another number of processes. None: as before.
        device: another device. None: as before.

    Returns:
        As :func:`transfer`; of a finished one, what it returned then.

    Raises:
        UserError: not a transfer, other weights, other images, or a damaged state.
        Interrupted: Ctrl-C; the state has been saved.
    """
    run = Path(out)
    config, facts = _read_transfer(run)
    if (run / "results.json").exists():
        notify(f"'{run}' has finished its {config.epochs} epochs; there is nothing to go on with.")
        ended = json.loads((run / "results.json").read_text())
        return {"weights_digest": facts["weights_digest"], **ended}
    weights = facts["weights"] if weights is None else weights
    if weights is None:
        raise UserError(
            "TODO", f"'{run}' was given an encoder, not a file; resume it with weights."
        )
    encoder, _ = take_encoder(weights)
    if weights_digest(encoder) != facts["weights_digest"]:
        raise UserError(
            "TODO", f"These weights are not those that '{run}' began with; start a new --out."
        )
    data = data or str(facts["data"])
    labelled = open_labeled(data)
    if labelled.fingerprints() != facts["fingerprints"]:
        raise UserError(
            "TODO",
            f"'{data}' ({len(labelled.source):,} images) is not what '{run}' has learned from"
            f" ({facts['size']:,} images); start a new transfer with another --out.",
        )
    if workers is not None:
        config = replace(config, workers=workers)
    if device is not None:
        config = from_dict(TransferConfig, {**to_dict(config), "device": device})
    probe = LinearProbe(config, encoder, labelled, facts)
    probe.restore(run)
    notify(f"Going on with '{run}' after step {probe.step:,}.")
    return _learn(probe, run)


def _learn(probe: LinearProbe, run: Path | None) -> dict[str, Any]:
    """The loop. It reads from top to bottom as a batch of images travels."""
    schedule, network = probe.schedule, probe.network
    record = _Record(probe, run)

    with convert_worker_death(), record, handle_stop_signals() as interrupt:
        network.train()
        while probe.step < schedule.total_steps:
            epoch, first, _ = schedule.position(probe.step)
            batches = probe.batches(epoch, first)
            for _ in range(probe.step, schedule.end_of_epoch(probe.step)):
                index, shown = next(batches)  # views, or their features where those are kept
                losses = cross_entropies(network(shown), probe.labels[index])
                for group in probe.optimizer.param_groups:
                    group["lr"] = schedule.learning_rate(probe.step)
                probe.fabric.backward(torch.stack(list(losses.values())).sum())
                probe.optimizer.step()
                probe.optimizer.zero_grad()
                probe.step += 1
                record.after_step(epoch, losses, interrupt)
            due = probe.config.eval_every and (epoch + 1) % probe.config.eval_every == 0
            if due and probe.step < schedule.total_steps:
                record.measured(epoch, probe.measure(ten_crop=False)[0])
            record.end_of_epoch(interrupt)
        return record.finish()


class _Record:
    """The record of a transfer while it learns: console, metrics, state, Ctrl-C, results."""

    def __init__(self, probe: LinearProbe, run: Path | None) -> None:
        self.probe, self.run, self.config = probe, run, probe.config
        progress = probe.progress
        self.before, self.started = progress["seconds"], time.monotonic()
        self.saved = self.started
        self.metrics: MetricsLog | None = None
        if run is not None:
            self.metrics = MetricsLog(run, keep=progress["metrics_bytes"], step=probe.step)
        self.bar = progress_bar()

    def __enter__(self) -> "_Record":
        self.bar.start()
        last = self.probe.schedule.total_steps
        self.task = self.bar.add_task("learning", total=last, note="")
        self.bar.update(self.task, completed=self.probe.step)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        if self.metrics is not None:
            self.metrics.close()

    def after_step(self, epoch: int, losses: dict[str, Tensor], interrupt: StopRequest) -> None:
        """Losses every few steps; the state when it is due. The end of an epoch saves it anyway."""
        step, schedule = self.probe.step, self.probe.schedule
        ends = step == schedule.end_of_epoch(step - 1)
        if step % self.config.log_every == 0 or ends:
            values = {layer: loss.item() for layer, loss in losses.items()}
            if wrong := [layer for layer, value in values.items() if not math.isfinite(value)]:
                raise UserError(
                    "TODO",
                    f"The loss of layer {wrong[0]} is {values[wrong[0]]} at step {step:,}; start"
                    " again with a lower --learning-rate.",
                )
            named = {f"loss_{layer}": value for layer, value in values.items()}
            rate = schedule.learning_rate(step - 1)
            self._write({"epoch": epoch + 1, **named, "learning_rate": rate})
            note = f"mean loss {sum(values.values()) / len(values):.3f}"
            self.bar.update(self.task, description=f"epoch {epoch + 1}", note=note)
        self.bar.update(self.task, completed=step)
        if ends:
            return
        if interrupt.requested or time.monotonic() - self.saved >= self.config.checkpoint_seconds:
            self.save()
        self._stop_if_asked(interrupt)

    def measured(self, epoch: int, layers: dict[str, dict[str, float]]) -> None:
        """A line of measurements."""
        named = {f"{key}_{layer}": v for layer, found in layers.items() for key, v in found.items()}
        self._write({"epoch": epoch + 1, **named})
        shown = ", ".join(f"{layer} {found['top1']:.1%}" for layer, found in layers.items())
        notify(f"epoch {epoch + 1}/{self.config.epochs}, top-1 by layer: {shown}")

    def end_of_epoch(self, interrupt: StopRequest) -> None:
        """Save what was learned and measured."""
        self.save()
        self._stop_if_asked(interrupt)

    def save(self) -> None:
        """Save everything that :meth:`LinearProbe.restore` and this class need to go on."""
        if self.run is not None and self.metrics is not None:
            progress = {"metrics_bytes": self.metrics.flushed(), "seconds": self._seconds()}
            self.probe.save(self.run, progress)
        self.saved = time.monotonic()

    def finish(self) -> dict[str, Any]:
        """Measure the heads, and write the results where there is a folder."""
        probe, config, labelled = self.probe, self.config, self.probe.labelled
        layers, measured = probe.measure(ten_crop=False)
        if config.ten_crop:
            for layer, found in probe.measure(ten_crop=True)[0].items():
                layers[layer] |= {f"ten_crop_{key}": value for key, value in found.items()}
        self.measured(config.epochs - 1, layers)
        results = {
            "layers": layers,
            "data": labelled.data,
            "run": probe.facts["weights"],
            "weights_digest": probe.facts["weights_digest"],
            "protocol": protocol(config),
            "epochs": config.epochs,
            "steps": probe.step,
            "seconds": round(self._seconds(), 2),
            "images": len(probe.feed.valid),
            "measured": measured,
            "unreadable": len(probe.feed.unreadable) + len(labelled.held_out) - measured,
            "classes": labelled.classes,
        }
        if self.run is not None:
            heads = {k: v.cpu().contiguous() for k, v in probe.readout.named_heads().items()}
            save_file(heads, self.run / "heads.safetensors")
            if config.finetune:
                path = self.run / "encoder.safetensors"
                save_weights(path, probe.readout.encoder, config.views)
            write_json(self.run / "results.json", results)
        return results

    def _stop_if_asked(self, interrupt: StopRequest) -> None:
        if interrupt.requested:
            way = "nothing was to be saved"
            if self.run is not None:
                way = f"go on with localagg transfer --resume {self.run}"
            raise interrupt.error(f"Stopped after step {self.probe.step:,}; {way}.")

    def _seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def _write(self, values: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(self.probe.step, values)


# Options that a protocol has words for of their own, and those that do not change what is measured.
_IN_WORDS = frozenset(
    {
        *("layers", "compat", "epochs", "finetune", "ten_crop"),
        *("image_size", "augmentation", "crop", "eval_crop"),
    }
)
_NO_MATTER = frozenset(
    {
        *("seed", "precision", "device", "workers", "memory", "memory_gb", "cache", "cache_gb"),
        *("unreadable", "eval_every", "log_every", "checkpoint_seconds"),
    }
)


def protocol(config: TransferConfig) -> str:
    """One line that says how a read-out was measured; numbers of unlike lines do not compare.

    What is not told is as in the reference's read-outs of ResNets (``trans_res50_LA``); every
    other option that matters stands at the end: "; learning rate 1e-09 (not 0.01)".
    """
    views = config.views
    what = "linear heads, frozen"
    if config.finetune:  # the network learns from all heads together
        heads = "all layers" if config.layers is None else " ".join(config.layers)
        what = f"linear heads on {heads} with the network fine-tuned"
    epochs = f"{config.epochs} epoch{'s' if config.epochs > 1 else ''}"
    seen = f"random views ({views.augmentation}, {views.crop} crops)"
    if is_fixed(views):
        seen = f"the center crop ({views.augmentation})"
    crops = "center crop" + (" and ten crops by mean softmax" if config.ten_crop else "")
    slip = "; features pooled as in the reference" if config.compat else ""
    measured = f"{crops} of {views.eval_crop} at {views.image_size} pixels{slip}"
    unlike = "".join(f"; {words}" for words in _deviations(config))
    return f"{what}; {epochs} of {seen}; {measured}{unlike}"


def _deviations(config: TransferConfig) -> list[str]:
    """What is unlike the reference's read-outs of ResNets: "learning rate 1e-09 (not 0.01)", ..."""
    usual = replace(TransferConfig(), batch_size=128, drops=usual_drops(config.epochs))
    told = _IN_WORDS | _NO_MATTER
    if config.drops is None:
        told |= {"drops"}
    if config.views.crop != "resized":
        told |= {"crop_area", "crop_aspect"}
    if is_fixed(config.views):  # which says that all of these are 0
        told |= {"flip", "gray", "jitter"}
    found = {
        name: (option_value(config, name), option_value(usual, name))
        for name in option_names(config)
        if name not in told
    }
    return [
        f"{name.replace('_', ' ')} {_in_words(value)} (not {_in_words(other)})"
        for name, (value, other) in found.items()
        if value != other
    ]


def _in_words(value: Any) -> str:
    if value is None:  # of the batch alone, where parts of the images are learned from
        return "by the number of images"
    if isinstance(value, tuple):
        return " ".join(map(_in_words, value))
    return str(value) if isinstance(value, (bool, str)) else f"{value:g}"


def _check_new(run: Path) -> None:
    if (run / "transfer.json").exists():
        raise UserError(
            "TODO",
            f"'{run}' holds another transfer; go on with --resume {run}, or name another --out.",
        )
    check_new(run)


def _read_transfer(run: Path) -> tuple[TransferConfig, dict[str, Any]]:
    path = run / "transfer.json"
    if not path.exists():
        what = "is not a transfer (it has no transfer.json)" if run.exists() else "does not exist"
        raise UserError("TODO", f"'{run}' {what}; name the --out of an earlier transfer.")
    try:
        facts = json.loads(path.read_text())
        return from_dict(TransferConfig, facts.pop("config")), facts
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("TODO", f"'{path}' cannot be read: {error}.") from None
