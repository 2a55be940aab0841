"""Measurements of a run on real images: naive references, left out images, invalid labels."""

import shutil
from pathlib import Path

import naive
import pytest
import torch
from expect import user_error

from localagg.bank import MemoryBank
from localagg.checkpoint import begin_run, save, save_weights
from localagg.config import PretrainConfig, ViewConfig
from localagg.data.sources.open import open_images
from localagg.embeddings.embed import embed
from localagg.engine.device import make_fabric
from localagg.evaluation.knn_queries import select_queries
from localagg.evaluation.measure_run import measure_run
from localagg.evaluation.online_knn import OnlineKnn
from localagg.models import create_encoder

VIEWS = ViewConfig(image_size=16, eval_crop=0.8)


def small():
    return create_encoder("resnet18_small", dim=12, width=8, blocks=(1,), seed=0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_weights(path, small(), VIEWS)
    return path


def measured(weights, data, **options):
    options = {"against": "embeddings", "k": (1, 5), "workers": 0, **options}
    return measure_run(weights, data=str(data), **options)


def table(path: Path, pictures: Path, train, val=None, names=("temple", "flower", "none")) -> str:
    """A saved dataset: the i-th image of a split is a picture of its label, -1 is a temple too."""
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    )

    def split(name, labels):
        folders = [("temple", "flower", "temple")[label] for label in labels]
        files = [sorted((pictures / name / f).iterdir()) for f in folders]
        images = [file[i % len(file)].read_bytes() for i, file in enumerate(files)]
        rows = {"image": [{"bytes": b, "path": None} for b in images], "label": list(labels)}
        return datasets.Dataset.from_dict(rows, features=features)

    splits = {"train": split("train", train), **({"val": split("val", val)} if val else {})}
    datasets.DatasetDict(splits).save_to_disk(str(path))
    return str(path)


def test_scores_are_those_of_naive_references(weights, pictures):
    result = measured(weights, pictures, k=(1, 5, 60), retrieval=True, clusters=True)
    fabric = make_fabric(precision="32-true")
    known, asked = (
        embed(small(), open_images(str(pictures), split), VIEWS, autocast=fabric.autocast)
        for split in ("train", "val")
    )
    for k in (1, 5, 60):
        expected = naive.knn_accuracy(asked.rows, asked.labels, known.rows, known.labels, k, 0.07)
        assert result["accuracy"][f"knn{k}"] == pytest.approx(expected)
    assert (result["asked"], result["known"]) == (12, 48)
    assert set(result["retrieval"]) == {
        "precision1", "precision5", "precision60", "map", "map_left_out"
    }  # fmt: skip
    assert result["retrieval"]["precision1"] == pytest.approx(result["accuracy"]["knn1"])
    assert result["retrieval"]["precision60"] == pytest.approx(0.5)  # of all 48
    assert result["clusters"]["clusters"] == 2
    assert result["clusters"]["images"] == 48
    assert result["capped"] == {"60": 48}
    assert len(result["notes"]) == 1
    assert set(measured(weights, pictures)) == set(result) - {"retrieval", "clusters"}


def test_without_held_out_images_training_images_are_the_queries(weights, pictures):
    result = measured(weights, pictures / "train", k=(1, 48), retrieval=True)
    known = embed(
        small(),
        open_images(str(pictures / "train")),
        VIEWS,
        autocast=make_fabric(precision="32-true").autocast,
    )
    sim = known.rows.double() @ known.rows.double().T
    right = sim.fill_diagonal_(-2).argmax(dim=1)
    expected = (known.labels[right] == known.labels).double().mean().item()
    assert result["accuracy"]["loo_knn1"] == pytest.approx(expected)
    assert "loo_map" in result["retrieval"]
    assert result["capped"] == {"48": 47}


@pytest.mark.parametrize("size", [4, 4999, 5000, 5001, 9999, 10_000, 10_001])
def test_at_most_5000_evenly_spread_training_images_are_queries(pictures, size):
    digits = open_images("digits")
    digits.labels = torch.arange(size) % 2
    choice = select_queries(str(pictures / "train"), digits, torch.arange(size))
    assert min(size, 2500) <= len(choice.query_index) <= 5000
    assert len(choice.query_index.diff().unique()) == 1


def test_unreadable_images_are_left_out_and_counted(weights, pictures, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    for name in ("train/temple/05.jpg", "train/flower/00.png", "val/flower/01.jpg"):
        (data / name).write_bytes(b"no image")
    result = measured(weights, data)
    assert (result["asked"], result["known"]) == (11, 46)
    assert result["left_out"]["known"]["unreadable"] == 2
    assert result["left_out"]["asking"]["unreadable"] == 1
    assert len(result["notes"]) == 2
    # The others are measured as if these did not exist.
    for name in ("train/temple/05.jpg", "train/flower/00.png", "val/flower/01.jpg"):
        (data / name).unlink()
    assert measured(weights, data)["accuracy"] == result["accuracy"]
    for file in (data / "val").rglob("*.*"):
        file.write_bytes(b"no image")
    with user_error("unreadable-images", "11 of"):
        measured(weights, data)


def test_the_bank_is_the_reference_set_without_its_unreadable_rows(pictures, tmp_path):
    run, source, encoder = tmp_path / "run", open_images(str(pictures)), small()
    config = PretrainConfig(views=VIEWS)
    begin_run(run, config, {"data": str(pictures), "fingerprint": source.fingerprint()})
    bank = MemoryBank(48, 12)
    save(
        run,
        1,
        encoder=encoder,
        optimizer=torch.optim.SGD(encoder.parameters(), lr=0.1),
        bank=bank,
        clusters={},
        progress={"unreadable": [3, 40]},
    )
    result = measure_run(run, data=None, against="bank", k=(5,), workers=0)
    assert (result["known"], result["left_out"]["known"]["unreadable"]) == (46, 2)
    valid = [i for i in range(48) if i not in (3, 40)]
    asked = embed(
        encoder,
        open_images(str(pictures), "val"),
        VIEWS,
        autocast=make_fabric(precision="32-true").autocast,
    )
    labels = source.labels[valid]
    expected = naive.knn_accuracy(asked.rows, asked.labels, bank.rows[valid], labels, 5, 0.07)
    assert result["accuracy"]["knn5"] == pytest.approx(expected)


def test_images_without_a_label_or_alone_in_their_class_are_left_out(weights, pictures, tmp_path):
    train, val = [0, 1, -1, 0, 1, 0, 1, -1], [0, 1, 2, -1, 1, 2]
    result = measured(weights, table(tmp_path / "a", pictures, train, val))
    assert (result["asked"], result["known"]) == (3, 6)
    assert result["left_out"] == {
        "known": {"unlabelled": 2, "unreadable": 0},
        "asking": {"unlabelled": 1, "alone": 2, "unreadable": 0},
    }
    assert [note[:10] for note in result["notes"]] == ["2 of the 8", "1 of the 6", "2 of the 6"]
    alone = table(tmp_path / "b", pictures, [0, 1, 1, 2, 1])
    result = measured(weights, alone)
    assert (result["asked"], result["known"]) == (3, 5)
    assert result["left_out"]["asking"]["alone"] == 2


def test_a_class_without_held_out_images_stays_in_the_reference_set(weights, pictures, tmp_path):
    data = table(tmp_path / "a", pictures, [0, 1, 2, 0, 1, 2], [1, 1])
    result = measured(weights, data, k=(6,))
    assert (result["asked"], result["known"]) == (2, 6)


def test_classes_are_matched_by_name(pictures, tmp_path):
    for target in ("train/b", "train/c", "train/d", "val/c", "val/d"):
        shutil.copytree(pictures / "val" / "flower", tmp_path / target)
    choice = select_queries(str(tmp_path), open_images(str(tmp_path)), torch.arange(18))
    assert choice.query_labels.tolist() == [1] * 6 + [2] * 6
    (tmp_path / "val" / "c").rename(tmp_path / "val" / "C")
    (tmp_path / "val" / "e").mkdir()  # no image: no matter
    with user_error("mismatch", "C"):
        select_queries(str(tmp_path), open_images(str(tmp_path)), torch.arange(18))


@pytest.mark.parametrize(
    ("train", "val", "named"),
    [
        ([1, 1, 1], [1, 1], "3 training images"),
        ([-1, -1], [1, 1], ""),
        ([0, 1, 0], [2, 2], "2 held-out images"),
        ([0, 1], None, "2 training images"),
        ([0], None, "1 training images"),
    ],
)
def test_unusable_labels_are_reported(weights, pictures, tmp_path, train, val, named):
    with user_error("no-labels", tmp_path / "a", named):
        measured(weights, table(tmp_path / "a", pictures, train, val))


def test_missing_labels_are_reported(weights, pictures):
    with user_error("no-labels", pictures / "train" / "temple"):
        measured(weights, pictures / "train" / "temple")


def test_two_training_images_are_enough(weights, pictures, tmp_path):
    data = table(tmp_path / "a", pictures, [0, 1], [0, 1, 1])
    result = measured(weights, data, k=(1, 200), retrieval=True, clusters=True)
    assert (result["asked"], result["known"]) == (3, 2)
    assert result["clusters"]["nmi"]["mean"] == pytest.approx(1)
    assert 0 <= result["accuracy"]["knn200"] <= 1


def test_training_continues_without_usable_labels(pictures, tmp_path, capsys):
    data = table(tmp_path / "a", pictures, [1, 1, 1], [1, 1])
    online = OnlineKnn(PretrainConfig(views=VIEWS), data, open_images(data), torch.arange(3))
    assert online(small(), torch.eye(3, 12), make_fabric(precision="32-true")) == {}
    assert "'" + data + "'" in capsys.readouterr().err.replace("\n", "")


def test_held_out_images_without_labels_are_not_queries(weights, pictures, tmp_path):
    shutil.copytree(pictures / "train", tmp_path / "train")
    shutil.copytree(pictures / "val" / "temple", tmp_path / "val")
    result = measured(weights, tmp_path)
    assert set(result["accuracy"]) == {"loo_knn1", "loo_knn5"}
    assert str(tmp_path) in result["notes"][0]
