"""Near-duplicates: planted copies are found, and nothing else; the best file is kept."""

import csv

import numpy as np
import pytest
import torch
from altered_images import ALTERATIONS, save_altered, texture
from expect import user_error

from embeddings import save_small_encoder
from localagg.data.images.pixel_agreement import agreement, gray_thumbnail
from localagg.embeddings.duplicates import find_duplicates, sharpness
from localagg.embeddings.tables.write_table import write_embeddings

KINDS = list(ALTERATIONS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 pictures, and a copy of each kind of the first eight."""
    folder = tmp_path_factory.mktemp("copies")
    for number in range(40):
        image = texture(number)
        image.save(folder / f"{number:02d}.jpg", quality=95)
        if number < len(KINDS):
            save_altered(image, KINDS[number], folder / f"{number:02d}-{KINDS[number]}.jpg")
    return folder


@pytest.fixture(scope="module")
def table(folder, tmp_path_factory):
    work = tmp_path_factory.mktemp("table")
    weights, _ = save_small_encoder(work / "small.safetensors")
    write_embeddings(weights, folder, work / "e.parquet")
    return work / "e.parquet"


def test_planted_copies_are_found_and_nothing_else(table, folder, tmp_path):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    found = find_duplicates(table, out=tmp_path / "d.csv")
    groups = {tuple(sorted(each["path"] for each in group)) for group in found["groups"]}
    assert groups == {(f"{n:02d}-{kind}.jpg", f"{n:02d}.jpg") for n, kind in enumerate(KINDS)}
    assert (found["images"], found["redundant"]) == (48, 8)
    assert found["others"] < found["above"] < found["views"]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    with open(tmp_path / "d.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    flat = [each for group in found["groups"] for each in group]
    assert [row["path"] for row in rows] == [each["path"] for each in flat]
    assert [row["keep"] for row in rows] == ["true", "false"] * 8
    assert [int(row["width"]) for row in rows] == [each["width"] for each in flat]


def test_the_larger_and_sharper_file_is_kept(table):
    kept = {group[0]["path"]: group[1]["path"] for group in find_duplicates(table)["groups"]}
    for kind in ("shrunk", "cropped", "blurred", "resaved"):
        original = f"{KINDS.index(kind):02d}.jpg"
        assert kept[original] == original.replace(".", f"-{kind}.")


def test_a_threshold_is_kept_to(table):
    assert find_duplicates(table, above=1.0)["groups"] == []
    one = find_duplicates(table, above=0.97)
    assert one["above"] == 0.97
    assert 0 < len(one["groups"]) <= 8


def test_agreement_is_symmetric_and_one_for_the_same_picture():
    pictures = [
        gray_thumbnail(torch.from_numpy(np.array(texture(n)).transpose(2, 0, 1))) for n in range(6)
    ]
    first, second = torch.stack(pictures[:3]), torch.stack(pictures[3:])
    torch.testing.assert_close(agreement(first, second), agreement(second, first))
    assert agreement(first, second).max() < 0.7
    torch.testing.assert_close(agreement(first, first.flip(2)), torch.ones(3))
    torch.testing.assert_close(agreement(first, first * 0.7 + 40), torch.ones(3), atol=1e-3, rtol=0)


def test_pictures_of_one_color_agree_if_it_is_the_same():
    black, white = torch.zeros(1, 48, 48).half(), torch.full((1, 48, 48), 255).half()
    assert agreement(black, black).item() == 1
    assert agreement(black, white).item() == 0


def test_sharpness_falls_by_blur_and_not_by_brightness():
    image = torch.randint(0, 128, (3, 40, 40), generator=torch.Generator().manual_seed(0)).byte()
    blurred = torch.nn.functional.avg_pool2d(image.float(), 3, 1, 1).byte()
    assert sharpness(blurred) < sharpness(image) / 2
    assert sharpness(image * 2 + 1) == pytest.approx(sharpness(image), rel=1e-3)


def test_images_that_moved_and_invalid_options_raise(table, folder, tmp_path):
    with user_error("option-invalid", "--above", 1.5):
        find_duplicates(table, above=1.5)
    texture(0).save(folder / "zz.png")
    try:
        with user_error("mismatch", folder, table):
            find_duplicates(table)
    finally:
        (folder / "zz.png").unlink()
    with user_error("option-invalid", "d.txt"):
        find_duplicates(table, out=tmp_path / "d.txt")
