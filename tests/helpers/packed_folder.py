"""Folders that pack reads and writes."""

from pathlib import Path

from localagg.data import open_images


def contents(folder: Path) -> dict[str, bytes]:
    """Return {name: bytes} of a folder's files, without hidden indices, which hold times."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if not path.name.startswith(".")
    }


def save_splits(pictures: Path, folder: Path, *names: str) -> str:
    """Write a saved data set with the 12 pictures of val in each of some splits."""
    import datasets

    rows = [{"image": {"bytes": s.image, "path": None}} for s in open_images(pictures, "val")]
    table = datasets.Dataset.from_list(rows)
    datasets.DatasetDict(dict.fromkeys(names, table)).save_to_disk(folder)
    return str(folder)
