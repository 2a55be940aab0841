"""WebDataset tars in their parts, and as Python's tarfile reads them: an independent reader.

For tests and for ``benchmarks/fuzz.py``.
"""

import io
import tarfile
from pathlib import Path

import numpy as np

Part = tuple[bytes, bytes]
"""(header of 512 bytes, data)."""

# Names of the members by file; a long one needs a header of its own, in pax as in GNU tar.
LONG = "folder/" + "x" * 120 + "/4.png"
LAYOUT = {
    "train-000000.tar": ("0.jpg", "0.cls", "1.png", "1.cls", "a/2.webp", "a/2.cls"),
    "train-000001.tar": ("3.jpg", "3.cls", LONG, LONG.replace(".png", ".cls")),
}


def tar(members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of these files."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as made:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return file.getvalue()


def parts() -> dict[str, list[Part]]:
    """The headers of small tars, and what stands behind each."""
    draws = np.random.RandomState(0)
    found = {}
    for name, members in LAYOUT.items():
        contents = {
            member: str(draws.randint(3)).encode()
            if member.endswith(".cls")
            else draws.bytes(draws.randint(0, 900))
            for member in members
        }
        gnu = name.endswith("1.tar")
        data = tar(contents, tarfile.GNU_FORMAT if gnu else tarfile.PAX_FORMAT)
        found[name], at = [], 0
        while data[at : at + 512].strip(b"\0"):
            size = int(data[at + 124 : at + 135], 8)
            end = at + 512 + -(-size // 512) * 512
            found[name].append((data[at : at + 512], data[at + 512 : end]))
            at = end
    return found


def sealed(header: bytes) -> bytes:
    """A header of the right length and with the right checksum, whatever is in it."""
    header = header[:512].ljust(512, b"\0")
    total = sum(header[:148]) + 256 + sum(header[156:])
    return header[:148] + f"{total:06o}\0 ".encode() + header[156:]


def joined(found: list[Part]) -> bytes:
    """A tar of such parts."""
    return b"".join(header + data for header, data in found) + bytes(1024)


def by_tarfile(folder: Path) -> list[tuple[bytes, str | None]]:
    """(image, word of its label) of each sample, in order."""
    found: dict[tuple[str, str], list[tuple[bytes | None, str | None]]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path, "r:", errors="surrogateescape") as archive:
            for member in archive:
                folder_name, slash, base = member.name.rpartition("/")
                if not member.isreg() or base.startswith("."):
                    continue
                key, _, extension = base.partition(".")
                file = archive.extractfile(member)
                assert file is not None
                sample = found.setdefault((path.name, folder_name + slash + key), [])
                if extension.lower() == "cls":
                    sample.append((None, file.read().decode().strip()))
                elif extension.lower().rpartition(".")[2] in ("jpg", "png", "webp"):
                    sample.append((file.read(), None))
    images = []
    for sample in found.values():
        image = next((data for data, _ in sample if data is not None), None)
        if image is not None:
            images.append((image, next((word for _, word in sample if word), None)))
    return images
