"""Tensors as a safetensors file, written by :func:`localagg.io.files.write_synced`.

The library's own writer hands the file to the system in one piece. The format is eight bytes with
the header's length, the header (JSON: dtype, shape and place of each tensor), and the tensors.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .files import write_synced

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors, of any device, that ``safetensors`` reads back.

    Raises:
        OSError: the disk is full, or otherwise refuses.
    """
    # Wide numbers first, so that each tensor lies at a multiple of its number's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)

    def parts() -> Iterator[bytes | memoryview]:
        yield len(words).to_bytes(8, "little") + words
        for name in names:
            yield _bytes(tensors[name])

    write_synced(path, parts())


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
