"""Labeled splits: invalid labels, and classes matched by name."""

import shutil
from pathlib import Path

from expect import user_error
from readouts import saved_dataset

from localagg.data import open_images
from localagg.evaluation.readouts.readout_inputs import open_labeled


def test_missing_splits_and_labels_are_reported(tmp_path, pictures):
    def made(name, *pairs):
        for source, target in pairs:
            shutil.copytree(pictures / source, tmp_path / name / target)
        return str(tmp_path / name)

    temple, flower = "train/temple", "train/flower"
    with user_error("not-found", tmp_path / "unsplit"):
        open_labeled(made("unsplit", (temple, "a"), (flower, "b")))
    for name, train, val, named in (
        ("flat", ("", ""), ("/a", "/b"), "training images"),
        ("one", ("/a", "/a/more"), ("/a", "/b"), "training images"),
        ("blind", ("/a", "/b"), ("", ""), "held-out images"),
    ):
        folder = tmp_path / name
        for split, targets in (("train", train), ("val", val)):
            for source, target in zip((temple, flower), targets, strict=True):
                for file in (pictures / source).iterdir():
                    path = folder / f"{split}{target}" / f"{Path(source).name}-{file.name}"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, path)
        with user_error("no-labels", folder, named):
            open_labeled(str(folder))


def test_images_without_a_label_are_not_used(tmp_path, pictures, capsys):
    missing = saved_dataset(tmp_path / "missing", pictures, [0, -1, 1, 2], [0, -1, 1])
    splits = open_labeled(missing)
    assert (splits.labels.tolist(), splits.held_out_labels.tolist()) == ([0, 1, 2], [0, 1])
    whole = open_images(missing)
    assert splits.source[1] == whole[2]._replace(index=1)
    assert "1 of the 4 training images" in " ".join(capsys.readouterr().err.split())


def test_missing_and_constant_labels_are_reported(tmp_path, pictures):
    missing = saved_dataset(tmp_path / "held out", pictures, [0, 1], [-1, -1])
    with user_error("no-labels", missing, "held-out images"):
        open_labeled(missing)
    constant = saved_dataset(tmp_path / "constant", pictures, [1, 1, 1], [0, 1])
    with user_error("no-labels", constant):
        open_labeled(constant)


def test_classes_are_matched_by_name_and_may_be_absent_from_a_split(tmp_path, pictures):
    for target in ("train/a", "train/b", "train/c", "val/b", "val/c"):
        shutil.copytree(pictures / "val" / "flower", tmp_path / target)
    labelled = open_labeled(str(tmp_path))
    assert labelled.classes == 3
    assert labelled.held_out.labels is not None
    assert labelled.held_out.labels.unique().tolist() == [0, 1]
    assert labelled.held_out_labels.unique().tolist() == [1, 2]
