"""Write what a transfer in training reports: console, metrics, state and results."""

import math
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from ...checkpoint import save_weights, write_json
from ...config import TransferConfig
from ...distributed.signals import StopRequest
from ...engine.device import describe_arithmetic
from ...errors import UserError, counted
from ...io.console import ProgressLine, notify
from ...io.files import atomic_write
from ...io.metrics_log import MetricsLog
from ...io.tensor_files import save_tensors
from ..results.protocols import heads_protocol, linear_protocol
from .linear_probe import LinearProbe


def transfer_protocol(config: TransferConfig, *, trained: bool) -> dict[str, Any]:
    """Return the fields of a protocol: of heads that are trained, or only measured."""
    return linear_protocol(config) if trained else heads_protocol(config)


class TransferRecorder:
    """Console, metrics, state, Ctrl-C and results of a transfer in training."""

    def __init__(self, probe: LinearProbe, run: Path | None) -> None:
        self.hint = "nothing was saved without --out"
        if run is not None:
            self.hint = f"resume it with localagg transfer --resume {run}"
        run = run if probe.world.rank == 0 else None  # which writes for all
        self.probe, self.run, self.config = probe, run, probe.config
        progress = probe.progress
        self.before, self.started = progress["seconds"], time.monotonic()
        self.saved = self.started
        self.metrics: MetricsLog | None = None
        if run is not None:
            self.metrics = MetricsLog(run, keep=progress["metrics_bytes"], step=probe.step)
        self.line = ProgressLine("learning", probe.schedule.total_steps, probe.step)

    def __enter__(self) -> "TransferRecorder":
        self.line.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.line.__exit__()
        if self.metrics is not None:
            self.metrics.close()

    def after_step(self, epoch: int, losses: dict[str, Tensor], stop: StopRequest) -> None:
        """Log losses every few steps, and save the state when due (the end of an epoch saves)."""
        step, schedule = self.probe.step, self.probe.schedule
        ends = step == schedule.end_of_epoch(step - 1)
        if step % self.config.log_every == 0 or ends:
            values = {layer: loss.item() for layer, loss in losses.items()}
            for layer, value in values.items():
                if not math.isfinite(value):
                    raise UserError(
                        "not-finite",
                        f"The loss of layer {layer} is {value} at step {step:,}; start again with"
                        " a lower --learning-rate.",
                    )
            named = {f"loss_{layer}": value for layer, value in values.items()}
            rate = schedule.learning_rate(step - 1)
            self._write({"epoch": epoch + 1, **named, "learning_rate": rate})
            note = f"mean loss {sum(values.values()) / len(values):.3f}"
            self.line.update(description=f"epoch {epoch + 1}/{self.config.epochs}", note=note)
        self.line.update(step)
        if ends:
            return
        if stop.requested or time.monotonic() - self.saved >= self.config.checkpoint_seconds:
            self.save()
        self._raise_if_stopped(stop)

    def measured(self, epoch: int, layers: dict[str, dict[str, float]]) -> None:
        """Log a line of measurements."""
        named = {f"{key}_{layer}": v for layer, found in layers.items() for key, v in found.items()}
        self._write({"epoch": epoch + 1, **named})
        shown = ", ".join(f"{layer} {found['top1']:.1%}" for layer, found in layers.items())
        notify(f"epoch {epoch + 1}/{self.config.epochs}  {self.line.note}  top-1 by layer: {shown}")

    def end_of_epoch(self, epoch: int, measured: bool, stop: StopRequest) -> None:
        """Save the state, and print a line if the epoch was not measured."""
        if not measured:
            notify(f"epoch {epoch + 1}/{self.config.epochs}  {self.line.note}")
        self.save()
        self._raise_if_stopped(stop)

    def save(self) -> None:
        """Save everything that :meth:`LinearProbe.restore` and this class need to resume."""
        if self.run is not None and self.metrics is not None:
            progress = {"metrics_bytes": self.metrics.flushed(), "seconds": self._seconds()}
            self.probe.save(self.run, progress)
        self.saved = time.monotonic()

    def finish(self) -> dict[str, Any]:
        """Measure the heads, write the results if there is a folder, and return them."""
        probe, config, splits = self.probe, self.config, self.probe.splits
        layers, measured = probe.measure(ten_crop=False)
        if lost := len(splits.held_out) - measured:
            notify(f"Left out: {counted(lost, 'unreadable held-out image')}.")
        if config.ten_crop:
            for layer, found in probe.measure(ten_crop=True)[0].items():
                layers[layer] |= {f"ten_crop_{key}": value for key, value in found.items()}
        self.measured(config.epochs - 1, layers)
        results = {
            "layers": layers,
            "data": splits.data,
            "run": probe.facts["weights"],
            "weights_digest": probe.facts["weights_digest"],
            **describe_arithmetic(probe.fabric),
            "protocol": transfer_protocol(config, trained=probe.step > 0),
            "epochs": config.epochs if probe.step else 0,
            "steps": probe.step,
            "seconds": round(self._seconds(), 2),
            "images": len(probe.feed.valid),
            "measured": measured,
            "unreadable": len(probe.feed.unreadable) + len(splits.held_out) - measured,
            "classes": splits.classes,
        }
        if self.run is not None:
            with atomic_write(self.run / "heads.safetensors") as beside:
                save_tensors(beside, probe.readout.named_heads())
            if config.finetune:
                path = self.run / "encoder.safetensors"
                save_weights(path, probe.readout.encoder, config.views)
            write_json(self.run / "results.json", results)
        return results

    def _raise_if_stopped(self, stop: StopRequest) -> None:
        if stop.requested:
            self.probe.world.barrier()  # rank 0 has saved
            raise stop.error(f"Stopped after step {self.probe.step:,}; {self.hint}.")

    def _seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def _write(self, values: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(self.probe.step, values)
