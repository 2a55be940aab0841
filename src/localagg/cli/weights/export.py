"""``localagg export``."""

from dataclasses import dataclass
from typing import Any, Literal

from ..parse import positional


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the network for other programs; load it back and compare on real images."""

    run: str = positional("RUN")
    """Run folder or weights file (.safetensors)."""
    to: Literal["safetensors", "torchvision", "timm", "onnx", "torch", "hub"]
    """Format. safetensors: ours; torchvision, timm: backbone without embedding head, for their
    networks; onnx, torch (torch.export): embedding of [batch, 3, S, S]; hub: a folder with model
    card."""
    out: str
    """File or folder to write."""
    data: str | None = None
    """Data URI of the compared images. Default: those of the run, else two photographs."""
    preprocessing: Literal["inside", "outside"] = "inside"
    """onnx and torch: take uint8 pixels and normalize inside the graph, or take normalized float32
    pixels. Crop and resize stay outside."""
    push: str | None = None
    """hub: also upload the folder to USER/NAME on the Hugging Face Hub."""


def run(options: Export) -> dict[str, Any]:
    """Export, and print the worst difference."""
    from ...io.console import notify

    notify(f"Exporting {options.run} to {options.to}, and comparing on real images ...")
    from ...interop.export import export

    result = export(
        options.run,
        options.to,
        options.out,
        data=options.data,
        normalize=options.preprocessing == "inside",
        push=options.push,
    )
    opset = f", opset {result['opset']}" if "opset" in result else ""
    print(
        f"{result['out']} ({options.to}{opset}): worst difference {result['worst_difference']:.1e}"
        f" in the {result['compared']} of {result['images']} images of {result['of']}."
    )
    if "address" in result:
        print(f"Uploaded to {result['address']}")
    return result
