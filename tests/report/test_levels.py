"""Deep samples and chosen bands: every command reads, shows and compares what the network sees."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from localagg import cli
from localagg.embeddings.open_table import open_table, open_table_pictures
from localagg.report.run_report import read_pictured
from localagg.report.thumbnails import thumbnail

tifffile = pytest.importorskip("tifffile")
LOW, HIGH = 100, 1100
BANDS = (5, 1, 3)
CHOSEN = ["--range", str(LOW), str(HIGH), "--bands", *map(str, BANDS)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on 24 images of five bands of 16 bits, of which few of the levels are used."""
    folder = tmp_path_factory.mktemp("levels")
    draws = np.random.default_rng(0)
    kind = {"planarconfig": "separate", "photometric": "minisblack"}
    for number in range(36):
        place = folder / "images" / ("train" if number < 24 else "val") / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        if number != 23:  # nearly the image before
            coarse = draws.integers(LOW, HIGH, (5, 4, 4))
        values = np.kron(coarse, np.ones((1, 8, 8))).astype(np.uint16)
        values[0, 0, 0] += number == 23
        tifffile.imwrite(place / f"{number:02}.tif", values, **kind)
    words = ["pretrain", "folder", "--data", str(folder / "images"), "--out", str(folder / "run")]
    small = ["--epochs", "2", "--width", "8", "--device", "cpu", "--workers", "0"]
    assert cli.main([*words, *CHOSEN, *small]) == 0
    return folder / "run"


def wanted(run, name):
    values = tifffile.imread(run.parent / "images" / name).astype(float)
    chosen = values[[band - 1 for band in BANDS]]
    return np.clip((chosen - LOW) / (HIGH - LOW) * 255, 0, 255).round().transpose(1, 2, 0)


def test_pictures_of_pages_show_the_mapped_bands(run):
    shown = read_pictured(run, 0, most=None)
    for number in (0, 7, 23):
        drawn = thumbnail(shown.images, number, 32)
        assert drawn is not None
        assert np.abs(np.asarray(drawn, float) - wanted(run, shown.paths[number])).max() <= 1


def test_duplicates_compare_the_mapped_bands(run, tmp_path):
    out = tmp_path / "d.json"
    assert cli.main(["duplicates", str(run), "--json", str(out), "--above", "0.99"]) == 0
    found = json.loads(out.read_text())
    assert found["unreadable"] == 0
    assert [sorted(each["path"] for each in group) for group in found["groups"]] == [
        ["train/a/22.tif", "train/b/23.tif"]
    ]


def test_tables_get_pictures_and_queries_are_read_alike(run, tmp_path):
    images, table = run.parent / "images", tmp_path / "e.parquet"
    words = ["embed", str(run), "--data", str(images), "--out", str(table), "--images"]
    assert cli.main(words) == 0
    stored = open_table(table).file.read(columns=["image"])["image"].to_pylist()
    assert all(stored)
    assert open_table_pictures(open_table(table))[3].image.shape == (3, 32, 32)
    (tmp_path / "new.tif").write_bytes((images / "train" / "b" / "05.tif").read_bytes())
    out = tmp_path / "s.json"
    assert cli.main(["search", str(table), str(tmp_path / "new.tif"), "--json", str(out)]) == 0
    nearest = json.loads(out.read_text())["queries"][0]["neighbors"][0]
    assert nearest["path"].endswith("b/05.tif")
    assert nearest["similarity"] == pytest.approx(1, abs=1e-5)


def test_galleries_show_the_mapped_bands(run, tmp_path):
    page = tmp_path / "c.html"
    assert cli.main(["clusters", str(run), "--k", "2", "--html", str(page)]) == 0
    sheets = re.findall(r"UklGR[A-Za-z0-9+/=]+", page.read_text())
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(sheets[0]))).convert("RGB"))
    assert pixels.max() > 200, "levels of 1,100 of 65,535 would be nearly black"


@pytest.mark.parametrize(
    "command",
    [
        "pretrain folder --data DATA --out OUT --dry-run CHOSEN",
        "pretrain folder --data DATA --out OUT --minutes 0.05 --workers 0 CHOSEN",
        "knn RUN --workers 0",
        "knn RUN --against embeddings --workers 0",
        "transfer RUN --data DATA --out OUT --epochs 1 --workers 0 --cache CACHE",
        "transfer RUN --data DATA --out OUT --quick --workers 0 --cache CACHE",
        "export RUN --to safetensors --out OUT.safetensors",
        "outliers RUN",
        "report RUN --out OUT.html",
        "pretrain adapt --data DATA --out OUT --model resnet18_small --width 8 --weights RUN"
        " --image-size 32 --epochs 2 --workers 0 --cache CACHE CHOSEN",
    ],
)
def test_commands_read_the_chosen_bands(command, run, tmp_path):
    places = {"RUN": run, "DATA": run.parent / "images", "OUT": tmp_path / "o", "CACHE": tmp_path}
    words = []
    for word in command.split():
        stem, dot, suffix = word.partition(".")
        words += CHOSEN if word == "CHOSEN" else [f"{places.get(stem, stem)}{dot}{suffix}"]
    assert cli.main(words) == 0
