"""The device and the arithmetic that a command computes with."""

import logging
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning_utilities.core import rank_zero

from ..errors import UserError
from .searchable_bank import has_bfloat16_units

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed", "64-true")


def make_fabric(device: str = "auto", precision: str = "auto", number: int | None = None) -> Fabric:
    """Return Lightning Fabric on one device.

    Args:
        device: auto, cpu, cuda or mps.
        precision: auto (bfloat16 if the device has units for it, else float32), or Fabric's name.
        number: index of the GPU, if each process of this machine has its own. Default: Fabric's
            choice.

    Raises:
        UserError: this machine lacks the device, or no such device or precision.
    """
    for option, value, known in (
        ("--device", device, DEVICES),
        ("--precision", precision, PRECISIONS),
    ):
        if value not in known:
            raise UserError(
                "option-invalid", f"{option} is {value}; choose from {', '.join(known)}."
            )
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(device, True):
        raise UserError("environment", f"--device {device}: torch finds none; use --device cpu.")
    if device == "auto":
        device = next((name for name, found in present.items() if found), "cpu")
    rank_zero.log.setLevel(logging.WARNING)  # Fabric logs its precision at INFO
    devices: Any = 1
    if device == "cuda" and number is not None:
        if number >= torch.cuda.device_count():
            raise UserError(
                "environment",
                f"Process {number} of this machine has no GPU of its own: torch finds"
                f" {torch.cuda.device_count()}; start as many processes as there are GPUs.",
            )
        devices = [number]
        torch.cuda.set_device(number)
    plugins: Any = _fast_precision(device) if precision == "auto" else precision
    return Fabric(accelerator=device, devices=devices, precision=plugins)


def describe_arithmetic(fabric: Fabric) -> dict[str, str]:
    """Return the facts "device" and "precision" of a result."""
    return {
        "device": fabric.device.type,
        "precision": str(fabric.strategy.precision.precision),
    }


def _fast_precision(device: str) -> str:
    if device == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    return "bf16-mixed" if device == "cpu" and has_bfloat16_units() else "32-true"
