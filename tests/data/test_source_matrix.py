"""Kind of source x oddity: the number of images and classes of each split, or the error.

Inputs are modelled on what people download and export. A row is: name, function that writes into a
folder and may return the URI, and what is expected: {split: (images, classes)} or (code, values).
"""

import os
from pathlib import Path

import pytest
from expect import user_error
from source_rows import LISTINGS, ROWS, TABLE
from write_sources import JPEG, put, put_parquet

from localagg.data import open_images
from localagg.data.pack.pack_dataset import pack
from localagg.data.sources.open import add_options, check_outside, report_unread, stored_splits


@pytest.mark.parametrize(
    ("make", "expected"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_each_kind_of_source_with_its_oddity(tmp_path, make, expected):
    if any(make is row[1] for row in LISTINGS):
        put(tmp_path, *TABLE)
    uri = str(make(tmp_path) or tmp_path)
    if isinstance(expected, tuple):
        with user_error(expected[0], *expected[1]):
            open_images(uri)
        return
    for split, (images, classes) in expected.items():
        source = open_images(uri, split)
        assert (len(source), source.classes) == (images, classes), split
        assert all(source[i].image == JPEG for i in range(images))
    known = {"train", "val", "test"} & {*expected}
    assert set(stored_splits(uri)) == known or "#" in uri


def test_every_file_is_an_image_or_counted_with_a_reason(tmp_path, capsys):
    put(tmp_path, "a/{3}.jpg", "b/{2}.jfif", "@eaDir/1.jpg", ".hidden/x", "b/.y", "a/00001")
    put(tmp_path, "a/{4}.npy", "x.zip", "y.tar.gz", "notes", "b/t.txt", content=b"z")
    (tmp_path / "a" / "link.txt").symlink_to("0.npy")
    unread = report_unread(tmp_path).files
    counted = {kind.kind: kind.files for kind in unread}
    assert counted == {
        ".npy": 4,
        "in @eaDir/": 1,
        "in .hidden/": 1,
        "hidden": 1,
        ".zip": 1,
        ".tar.gz": 1,
        "without extension": 1,
        ".txt": 1,
    }
    plain = sum(
        len([f for f in files if not os.path.islink(Path(d, f))])
        for d, _, files in os.walk(tmp_path)
    )
    assert len(open_images(tmp_path)) + sum(counted.values()) == plain
    printed = " ".join(capsys.readouterr().err.split())
    assert "11 other files" in printed
    assert "4 .npy (convert to images)" in printed


def test_splits_that_are_not_read_are_reported_with_the_option(tmp_path, capsys):
    put(tmp_path, "train/{3}.jpg", "unlabeled/{9}.jpg", "stray.jpg")
    found = report_unread(tmp_path)
    assert found.splits == ["unlabeled"]
    assert {kind.kind: kind.files for kind in found.files} == {".jpg": 1}
    assert "--split train,unlabeled" in " ".join(capsys.readouterr().err.split())


def test_chosen_splits_are_one_source_whose_images_without_labels_have_minus_one(tmp_path):
    put(tmp_path, "train/a/{2}.jpg", "train/b/1.jpg", "unlabeled/{2}.jpg")
    source = open_images(f"{tmp_path}#split=train,unlabeled")
    assert source.labels.tolist() == [0, 0, 1, -1, -1]
    assert [source[i].index for i in range(5)] == [*range(5)]
    assert source.name(4) == "unlabeled: 1.jpg"
    assert source.file(4) == tmp_path / "unlabeled" / "1.jpg"
    with user_error("not-found", "extra", "unlabeled"):
        open_images(f"{tmp_path}#split=extra")


def test_the_column_that_was_taken_is_named(tmp_path, capsys):
    put_parquet(tmp_path, "t.parquet", 1, depth=[JPEG])
    open_images(tmp_path)
    printed = " ".join(capsys.readouterr().err.split())
    assert "column 'image', not of depth; --image-column" in printed
    assert len(open_images(add_options(str(tmp_path), image_column="depth"))) == 1


def test_an_output_inside_the_images_is_refused(tmp_path, monkeypatch):
    put(tmp_path, "photos/{3}.jpg")
    for output in (tmp_path / "photos" / "run", "views.png"):
        monkeypatch.chdir(tmp_path / "photos")
        with user_error("option-conflict", "--out", output):
            check_outside(".", output, "--out")
    monkeypatch.chdir(tmp_path)
    check_outside("photos", tmp_path / "run", "--out")
    check_outside("digits", "digits/run", "--out")
    with user_error("option-conflict", "DST"):
        pack(tmp_path / "photos", tmp_path / "photos" / "packed")
