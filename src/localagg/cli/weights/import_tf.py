"""``localagg import-tf``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import printable
from ..parse import positional


@dataclass(frozen=True, kw_only=True)
class ImportTf:
    """Import weights from a checkpoint of the reference program, of its PyTorch port, or of
    unsup_vvs."""

    prefix: str = positional("PREFIX")
    """model.ckpt-N, its .index, a folder or .tar with one; or the port's checkpoint.pth.tar."""
    model: str
    """Network: preact_resnet18, preact_resnet50, alexnet_bn or vgg16_bn_last; of unsup_vvs
    resnet18_vvs or resnet50_vvs."""
    out: str
    """Weights file (.safetensors) to write."""
    bank: str | None = None
    """Also write memory bank, labels, cluster labels, momenta and step to this .safetensors file,
    so that pretrain --start OUT continues it."""
    heads: str | None = None
    """Also write trained read-out heads to this .safetensors file, for transfer --heads."""


def run(options: ImportTf) -> dict[str, Any]:
    """Import the weights and print the variables without a match."""
    from ...interop.import_weights import import_weights

    result = import_weights(
        options.prefix,
        options.model,
        Path(options.out),
        bank=None if options.bank is None else Path(options.bank),
        heads=None if options.heads is None else Path(options.heads),
    )
    print(f"{len(result['matched'])} variables written to {options.out} ({options.model}).")
    for kind in ("left", "missing"):
        if result[kind]:
            names = ", ".join(result[kind][:5]) + (" ..." if len(result[kind]) > 5 else "")
            print(f"{kind}: {len(result[kind])} ({printable(names)})")
    return result
