"""Write small sources of images of any kind."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from encode_image import encoded
from PIL import Image

JPEG = encoded(Image.fromarray(np.arange(48 * 32 * 3, dtype=np.uint8).reshape(32, 48, 3)), "JPEG")


def put(root: Path, *names: str, content: bytes = JPEG) -> None:
    """Write a file at each path; ``a/{3}.jpg`` stands for three files."""
    for name in names:
        start, brace, rest = name.partition("{")
        count, _, end = rest.partition("}")
        for path in [f"{start}{i}{end}" for i in range(int(count))] if brace else [name]:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)


def put_parquet(root: Path, name: str, count: int = 2, images: bool = True, **columns: Any) -> None:
    """Write a table, of images or not, with more columns."""
    own = {"image": pa.array([{"bytes": JPEG, "path": None}] * count)} if images else {}
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.table({**own, **columns}), root / name)


def put_tar(root: Path, name: str, **members: bytes) -> None:
    """Write a tar; ``a__jpg`` becomes ``a.jpg``."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / name, "w") as tar:
        for member, content in members.items():
            info = tarfile.TarInfo(member.replace("__", "."))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def text(root: Path, name: str, *lines: str, encoding: str = "utf-8") -> str:
    """Write lines; return the path, which is the URI of a listing."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes("".join(line + "\n" for line in lines).encode(encoding))
    return str(root / name)


def lines(*values: dict[str, Any]) -> list[str]:
    return [json.dumps(value) for value in values]
