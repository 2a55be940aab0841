"""Write tensors as a safetensors file by :func:`localagg.io.files.write_synced`.

The library's own writer passes the whole file to the system at once. The format: eight bytes with
the length of the header; the header as JSON (dtype, shape and place of each tensor); the tensors.
"""

import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .files import atomic_write, write_synced

DTYPE_NAMES = {
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


def load_pickled(path: Path, allowed: list[Any], fix: str) -> Any:
    """Load a file of ``torch.save``: tensors, plain containers and ``allowed`` classes alone.

    Args:
        path: the file.
        allowed: harmless classes or functions, for ``torch.serialization.safe_globals``.
        fix: what a user can do where it holds something else.

    Raises:
        UserError: damaged, or with objects of other classes.
    """
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a TorchScript program, whose error follows
            return torch.load(path, map_location="cpu", weights_only=True)
    # Foreign files make torch raise anything: RuntimeError, KeyError, struct.error, ...
    except Exception as error:
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        holds = f"it holds a {foreign[1]}" if foreign else _describe_file(path)
        raise UserError(
            "unsupported", f"'{path}' cannot be loaded as tensors alone ({holds}); {fix}."
        ) from None


def save_pickled(path: Path, value: Any) -> None:
    """Write as ``torch.save``, through memory: on a full disk its own writer hides the cause.

    Raises:
        OSError: disk full or no permission.
    """
    state = io.BytesIO()
    torch.save(value, state)
    write_synced(path, [state.getbuffer()])


def save_array(path: Path, values: np.ndarray) -> None:
    """Write as ``numpy.save``, atomically; its own errors of a full disk lack their number.

    Raises:
        OSError: disk full or no permission.
    """
    state = io.BytesIO()
    np.save(state, values)
    with atomic_write(path) as beside:
        write_synced(beside, [state.getbuffer()])


def _describe_file(path: Path) -> str:
    """Return what a file is that torch cannot load, by its first bytes and its end."""
    with open(path, "rb") as file:
        head = file.read(9)
    if head[8:] == b"{":
        return "it is a safetensors file; name it .safetensors"
    if head[:2] == b"PK":
        if not zipfile.is_zipfile(path):
            return "it is cut short"
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("constants.pkl") for name in archive.namelist()):
                return "it is a TorchScript program"
        return "its contents are damaged"
    return "it is not a file of torch.save"


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors of any device; ``safetensors`` reads them back.

    Raises:
        OSError: disk full or no permission.
    """
    # Wide numbers first: then each tensor begins at a multiple of the size of its numbers.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)

    def parts() -> Iterator[bytes | memoryview]:
        yield len(encoded).to_bytes(8, "little") + encoded
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy().data

    write_synced(path, parts())
