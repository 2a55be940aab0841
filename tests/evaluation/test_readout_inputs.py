"""Which labels a read-out takes, and how the classes of two splits are matched."""

import shutil
from pathlib import Path

import pytest
from readouts import saved_dataset

from localagg.errors import UserError
from localagg.evaluation.readout_inputs import open_labeled


def test_labels_that_do_not_fit_are_refused(tmp_path, pictures):
    def made(name, *pairs):
        for source, target in pairs:
            shutil.copytree(pictures / source, tmp_path / name / target)
        return str(tmp_path / name)

    temple, flower = "train/temple", "train/flower"
    with pytest.raises(UserError, match="no split to measure on"):
        open_labeled(made("unsplit", (temple, "a"), (flower, "b")))
    for name, train, val, message in (
        ("flat", ("", ""), ("/a", "/b"), "training images .* have no labels"),
        ("one", ("/a", "/a/more"), ("/a", "/b"), "training images .* have no labels"),
        ("blind", ("/a", "/b"), ("", ""), "held-out images .* have no labels"),
        ("renamed", ("/a", "/b"), ("/a", "/c"), "classes that the training images lack: c"),
    ):
        folder = tmp_path / name
        for split, targets in (("train", train), ("val", val)):
            for source, target in zip((temple, flower), targets, strict=True):
                for file in (pictures / source).iterdir():
                    path = folder / f"{split}{target}" / f"{Path(source).name}-{file.name}"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, path)
        with pytest.raises(UserError, match=message):
            open_labeled(str(folder))


def test_missing_and_constant_labels_are_refused(tmp_path, pictures):
    missing = saved_dataset(tmp_path / "missing", pictures, [0, 1, -1, 2], [0, 1])
    with pytest.raises(UserError, match=r"1 of the 4 training images of .* have no label"):
        open_labeled(missing)
    missing = saved_dataset(tmp_path / "held out", pictures, [0, 1], [-1, -1])
    with pytest.raises(UserError, match=r"The held-out images of .* have no labels"):
        open_labeled(missing)
    constant = saved_dataset(tmp_path / "constant", pictures, [1, 1, 1], [0, 1])
    with pytest.raises(UserError, match="have the same label"):
        open_labeled(constant)


def test_classes_are_matched_by_name_and_may_be_absent_from_a_split(tmp_path, pictures):
    for target in ("train/a", "train/b", "train/c", "val/b", "val/c"):
        shutil.copytree(pictures / "val" / "flower", tmp_path / target)
    labelled = open_labeled(str(tmp_path))
    assert labelled.classes == 3
    assert labelled.held_out.labels is not None
    assert labelled.held_out.labels.unique().tolist() == [0, 1]
    assert labelled.held_out_labels.unique().tolist() == [1, 2]
