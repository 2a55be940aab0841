"""What is in a folder that pack wrote."""

from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """{name: bytes} of its files, but for hidden indices, which hold times."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if not path.name.startswith(".")
    }
