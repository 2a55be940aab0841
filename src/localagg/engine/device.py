"""Which device computes, and in which arithmetic."""

import logging
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning_utilities.core import rank_zero

from ..errors import UserError


def make_fabric(device: str = "auto", precision: str = "auto", number: int | None = None) -> Fabric:
    """Lightning Fabric on one device.

    Args:
        device: auto, cpu, cuda or mps.
        precision: auto (bf16 where the device has units for it, else float32), or Fabric's name.
        number: which GPU, where each process of this machine has its own. None: Fabric's choice.

    Raises:
        UserError: a device that this machine has not.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(device, True):
        raise UserError("TODO", f"--device {device}: torch finds none here; use --device cpu.")
    if device == "auto":
        device = next((name for name, found in present.items() if found), "cpu")
    rank_zero.log.setLevel(logging.WARNING)  # it announces its precision
    plugins: Any = _fast_precision(device) if precision == "auto" else precision
    devices: Any = 1
    if device == "cuda" and number is not None:
        if number >= torch.cuda.device_count():
            raise UserError(
                "TODO",
                f"Process {number} of this machine has no GPU of its own, as torch finds"
                f" {torch.cuda.device_count()}; start as many processes as there are GPUs.",
            )
        devices = [number]
        torch.cuda.set_device(number)
    return Fabric(accelerator=device, devices=devices, precision=plugins)


def _fast_precision(device: str) -> str:
    if device == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # no public query exists
    fast = device == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return "bf16-mixed" if fast else "32-true"
