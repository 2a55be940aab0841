"""Sources with oddities: (name, writer, images and classes of each split, or error and values)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from write_sources import JPEG, lines, put, put_parquet, put_tar, text

from localagg.data.sources.open import add_options

Row = tuple[str, Callable[[Path], Any], Any]
FILES: list[Row] = [
    ("jfif", lambda r: put(r, "a.jfif", "b.JFIF", "c.jpg"), {"train": (3, None)}),
    ("no extension", lambda r: put(r, "00001", "00002"), {"train": (2, None)}),
    (
        "no extension, no image",
        lambda r: put(r, "README", content=b"text"),
        ("no-images", ["1 without extension"]),
    ),
    (
        "archives alone",
        lambda r: put(r, "a.zip", "b.tar.gz", content=b"PK\3\4"),
        ("no-images", ["1 .zip (unpack)", "1 .tar.gz (unpack)"]),
    ),
    ("arrays alone", lambda r: put(r, "{4}.npy", content=b"\x93NUMPY"), ("no-images", ["4 .npy"])),
    ("empty folder", lambda r: None, ("no-images", [])),
    ("one image", lambda r: put(r, "a.jpg") or r / "a.jpg", ("unsupported", ["a.jpg", "folder"])),
    (
        "a zip",
        lambda r: put(r, "a.zip", content=b"PK\3\4") or r / "a.zip",
        ("unsupported", ["ZIP"]),
    ),
    (
        "an array",
        lambda r: put(r, "a.npy", content=b"\x93NUMPY") or r / "a.npy",
        ("unsupported", ["NumPy"]),
    ),
    (
        "a table that git lfs left out",
        lambda r: put(
            r, "data/train.parquet", content=b"version https://git-lfs.github.com/spec/v1"
        ),
        ("damaged", ["git lfs pull"]),
    ),
    (
        "a tar that git lfs left out",
        lambda r: put(r, "train.tar", content=b"version https://git-lfs.github.com/spec/v1"),
        ("damaged", ["git lfs pull"]),
    ),
    (
        "system folders",
        lambda r: put(
            r, "a/1.jpg", "b/1.jpg", "@eaDir/1.jpg", "#recycle/1.jpg", "$RECYCLE.BIN/1.jpg"
        ),
        {"train": (2, ["a", "b"])},
    ),
    (
        "a stray file among classes",
        lambda r: put(r, "a/1.jpg", "b/1.jpg", "x.jpg"),
        {"train": (3, None)},
    ),
]
SIDE_FILES: list[Row] = [
    (
        "img2dataset, tars",
        lambda r: (
            put_tar(r, "00000.tar", a__jpg=JPEG, a__txt=b"a dog", b__jpg=JPEG, b__txt=b"a cat")
            or put_parquet(r, "00000.parquet", images=False, url=["x", "y"], caption=["a", "b"])
            or put(r, "00000_stats.json", content=b"{}")
        ),
        {"train": (2, None)},
    ),
    (
        "img2dataset, files",
        lambda r: (
            put(r, "00000/{3}.jpg", "00001/{2}.jpg")
            or put(r, "00000/{3}.json", "00000_stats.json", content=b"{}")
            or put_parquet(r, "00000.parquet", images=False, url=["x", "y"])
        ),
        {"train": (5, None)},
    ),
    (
        "embeddings beside photos",
        lambda r: (
            put(r, "a/{3}.jpg", "b/{3}.jpg")
            or put_parquet(r, "e.parquet", images=False, path=["a", "b"], embedding=[[0.5], [1.0]])
        ),
        {"train": (6, ["a", "b"])},
    ),
    (
        "embeddings alone",
        lambda r: put_parquet(r, "e.parquet", images=False, path=["a"], embedding=[[0.5]]),
        ("no-images", ["path, embedding", "e.parquet"]),
    ),
    (
        "a hash column beside photos",
        lambda r: put(r, "{3}.jpg") or put_parquet(r, "h.parquet", images=False, sha=[b"\x91\0ab"]),
        {"train": (3, None)},
    ),
    (
        "photos beside a table of images",
        lambda r: put(r, "{20}.jpg") or put_parquet(r, "t.parquet", 1),
        ("mismatch", ["t.parquet", "0.jpg"]),
    ),
    (
        "photos beside a damaged table",
        lambda r: put(r, "{3}.jpg") or put(r, "t.parquet", content=b"PAR1"),
        {"train": (3, None)},
    ),
    (
        "photos beside a tar of them",
        lambda r: put(r, "a/{3}.jpg") or put_tar(r, "all.tar", a__jpg=JPEG),
        ("mismatch", ["all.tar", "a/0.jpg"]),
    ),
    (
        "photos beside a tar of notes",
        lambda r: put(r, "a/{3}.jpg") or put_tar(r, "notes.tar", a__txt=b"a"),
        {"train": (3, None)},
    ),
    (
        "photos beside another program's state.json",
        lambda r: put(r, "{3}.jpg") or put(r, "state.json", "dataset_dict.json", content=b"{}"),
        {"train": (3, None)},
    ),
    (
        "metadata beside images/",
        lambda r: (
            (put(r, "images/{3}.jpg") and None)
            or (text(r, "train_meta.csv", "id,age", "7,8") and None)
        ),
        {"train": (3, None)},
    ),
    (
        "a listing of some of the photos",
        lambda r: put(r, "{3}.jpg") or (text(r, "train_list.csv", "0.jpg 1") and None),
        ("mismatch", ["train_list.csv", "0.jpg"]),
    ),
    (
        "a listing of all photos",
        lambda r: (
            put(r, "{3}.jpg") or (text(r, "train_l.csv", "2.jpg 1", "0.jpg 0", "1.jpg 1") and None)
        ),
        {"train": (3, ["0", "1"])},
    ),
]
LEVELS: list[Row] = [
    (
        "a Hub download",
        lambda r: (
            put(r, "README.md", ".gitattributes", content=b"#")
            or put_parquet(r, "data/train-00000-of-00001.parquet", 3)
            or put_parquet(r, "data/test-00000-of-00001.parquet", 2)
        ),
        {"train": (3, None), "test": (2, None)},
    ),
    (
        "the Hub's converted Parquet",
        lambda r: (
            put_parquet(r, "default/train/0000.parquet", 3)
            or put_parquet(r, "default/test/0000.parquet", 2)
        ),
        {"train": (3, None), "test": (2, None)},
    ),
    (
        "two configurations",
        lambda r: put_parquet(r, "en/train/0.parquet") or put_parquet(r, "de/train/0.parquet"),
        ("mismatch", ["/de'", "/en'"]),
    ),
    ("tars below", lambda r: put_tar(r, "x/shards/0.tar", a__jpg=JPEG), {"train": (1, None)}),
    (
        "a folder in a folder",
        lambda r: put(r, "flowers/flowers/rose/{2}.jpg", "flowers/flowers/lily/{3}.jpg"),
        {"train": (5, ["lily", "rose"])},
    ),
    (
        "splits in a folder",
        lambda r: put(r, "d/train/a/1.jpg", "d/train/b/1.jpg", "d/test/a/1.jpg", "d/notes/x.txt"),
        {"train": (2, ["a", "b"]), "test": (1, ["a"])},
    ),
    (
        "YOLO",
        lambda r: (
            put(r, "images/train/{3}.jpg", "images/val/{2}.jpg") or put(r, "labels/train/0.txt")
        ),
        {"train": (3, None), "val": (2, None)},
    ),
    (
        "splits inside of classes",
        lambda r: put(r, "cat/train/1.jpg", "cat/test/1.jpg", "dog/train/1.jpg", "dog/test/1.jpg"),
        ("mismatch", ["cat", "train", "test"]),
    ),
]
SPLITS: list[Row] = [
    (
        "COCO",
        lambda r: put(r, "train2017/{3}.jpg", "val2017/{2}.jpg") or put(r, "annotations/a.json"),
        {"train": (3, None), "val": (2, None)},
    ),
    (
        "Kaggle's nested sets",
        lambda r: put(
            r, *(f"{s}_set/{s}_set/{c}/1.jpg" for s in ("training", "test") for c in ("cat", "dog"))
        ),
        {"train": (2, ["cat", "dog"]), "test": (2, ["cat", "dog"])},
    ),
    (
        "a shared word",
        lambda r: put(r, "food-train/a/1.jpg", "food-train/b/1.jpg", "food-test/a/1.jpg"),
        {"train": (2, ["a", "b"]), "test": (1, ["a"])},
    ),
    (
        "names that look like splits",
        lambda r: put(r, "cats_train/1.jpg", "dogs_test/1.jpg"),
        ("mismatch", ["cats_train", "dogs_test"]),
    ),
    (
        "a class that contains a word",
        lambda r: put(r, "test_tube/1.jpg", "flask/{2}.jpg"),
        {"train": (3, ["flask", "test_tube"])},
    ),
    ("dev", lambda r: put(r, "train/{3}.jpg", "dev/1.jpg"), {"train": (3, None), "val": (1, None)}),
    (
        "unlabeled",
        lambda r: put(r, "train/{3}.jpg", "test/1.jpg", "unlabeled/{9}.jpg"),
        {"train": (3, None), "test": (1, None), "unlabeled": (9, None)},
    ),
    (
        "an unlabeled split, chosen",
        lambda r: (
            put(r, "train/{3}.jpg", "test/1.jpg", "unlabeled/{9}.jpg")
            or add_options(str(r), split="train,unlabeled")
        ),
        {"train": (12, None), "val": (1, None)},
    ),
    (
        "splits of other names in Parquet",
        lambda r: (
            [
                put_parquet(r, f"{n}-00000-of-00001.parquet", k)
                for n, k in (("train", 3), ("test", 2), ("query", 1), ("unlabeled", 5))
            ]
            and None
        ),
        {"train": (3, None), "test": (2, None), "query": (1, None), "unlabeled": (5, None)},
    ),
    (
        "upper case",
        lambda r: put_parquet(r, "TRAIN.PARQUET", 3) or put_parquet(r, "Val.Parquet", 2),
        {"train": (3, None), "val": (2, None)},
    ),
    (
        "upper case tar",
        lambda r: put_tar(r, "A.TAR", a__jpg=JPEG) or r / "A.TAR",
        {"train": (1, None)},
    ),
]
TABLE = [f"images/{i}.jpg" for i in range(4)]
LISTINGS: list[Row] = [
    (
        "pandas",
        lambda r: text(
            r, "a.csv", ",path,label", *(f"{i},{p},c{i % 2}" for i, p in enumerate(TABLE))
        ),
        {"train": (4, ["c0", "c1"])},
    ),
    (
        "more columns",
        lambda r: text(
            r, "a.csv", "age;Class;File Name", *(f"7;c{i % 2};{p}" for i, p in enumerate(TABLE))
        ),
        {"train": (4, ["c0", "c1"])},
    ),
    ("paths alone", lambda r: text(r, "a.txt", *TABLE), {"train": (4, None)}),
    ("paths alone, header", lambda r: text(r, "a.csv", "filename", *TABLE), {"train": (4, None)}),
    ("tsv", lambda r: text(r, "a.tsv", *(f"{p}\tb c" for p in TABLE)), {"train": (4, ["b c"])}),
    (
        "UTF-16",
        lambda r: text(r, "a.csv", "image,category", *(f"{p},é" for p in TABLE), encoding="utf-16"),
        {"train": (4, ["é"])},
    ),
    (
        "JSON lines",
        lambda r: text(
            r, "m.jsonl", *lines(*({"file_name": p, "label": 1, "text": "x"} for p in TABLE))
        ),
        {"train": (4, ["0", "1"])},
    ),
    (
        "JSON lines with captions",
        lambda r: text(r, "m.jsonl", *lines(*({"file_name": p, "text": "x"} for p in TABLE))),
        {"train": (4, None)},
    ),
    ("a JSON list", lambda r: text(r, "m.json", json.dumps(TABLE)), {"train": (4, None)}),
    (
        "missing labels",
        lambda r: text(
            r,
            "a.csv",
            "path,label",
            *(f"{p},{x}" for p, x in zip(TABLE, ["1.0", "", "nan", "0"], strict=True)),
        ),
        {"train": (4, ["0", "1"])},
    ),
    (
        "a split column",
        lambda r: text(
            r,
            "a.csv",
            "path,split,label",
            *(f"{p},{s},x" for p, s in zip(TABLE, ["train", "train", "val", "test"], strict=True)),
        ),
        {"train": (2, ["x"]), "val": (1, ["x"]), "test": (1, ["x"])},
    ),
    (
        "words without a header",
        lambda r: text(r, "a.csv", *(f"{i},{p},c{i % 2}" for i, p in enumerate(TABLE))),
        {"train": (4, ["c0", "c1"])},
    ),
    (
        "names without extension",
        lambda r: text(r, "images/a.csv", "id,breed", *(f"{i},b{i % 2}" for i in range(4))),
        {"train": (4, ["b0", "b1"])},
    ),
    (
        "backslashes",
        lambda r: text(r, "a.csv", "path,label", *(p.replace("/", "\\") + ",1" for p in TABLE)),
        {"train": (4, ["0", "1"])},
    ),
    (
        "paths below another folder",
        lambda r: text(r, "a.csv", "path,label", "0.jpg,1"),
        ("not-found", ["a.csv:", "/images."]),
    ),
    ("labels first", lambda r: text(r, "a.csv", *(f"c,{p}" for p in TABLE)), {"train": (4, ["c"])}),
    (
        "an index, a path and a number",
        lambda r: text(r, "a.csv", *(f"{i},{p},1" for i, p in enumerate(TABLE))),
        {"train": (4, ["0", "1"])},
    ),
    (
        "Kaggle's table beside two folders",
        lambda r: (
            put(r, "train/{5}.jpg", "test/{3}.jpg")
            or text(r, "train.csv", "id,label", *(f"{i}.jpg,x" for i in range(5)))
        ),
        ("not-found", ["train.csv:", "/train."]),
    ),
    (
        "addresses",
        lambda r: text(r, "a.csv", "image,label", "https://x.org/a.jpg,1"),
        ("not-found", ["https://x.org/a.jpg", "download"]),
    ),
]
CHOICES: list[Row] = [
    (
        "a hash before the image",
        lambda r: put_parquet(
            r, "t.parquet", images=False, hash=[b"\x93\1"] * 3, content=[JPEG] * 3
        ),
        {"train": (3, None)},
    ),
    (
        "a column that does not exist",
        lambda r: put_parquet(r, "t.parquet") or add_options(str(r), image_column="left"),
        ("not-found", ["left", "image"]),
    ),
    (
        "null labels",
        lambda r: put_parquet(r, "t.parquet", 3, label=["b", None, "a"]),
        {"train": (3, ["a", "b"])},
    ),
]
ROWS = FILES + SIDE_FILES + LEVELS + SPLITS + LISTINGS + CHOICES
